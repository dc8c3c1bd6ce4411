"""F4: a run's tokenizer as transformers and inference servers read it, checked text by text before it appears.

A sentencepiece model alone is read as another tokenizer by AutoTokenizer. So it is written as a tokenizer.json, and
refused where there is none with the same ids. A Hugging Face folder is passed on as it came.
"""

import json
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_jq.data.tokenizers import SentencePieceTokenizer, Tokenizer
from megatron_jq.errors import UserError

#: Texts that tokenizers differ on, beside those that are made of the vocabulary's own pieces.
ODD_TEXTS = (
    "", " ", "  ", " a", "a ", " a b ", "a  b", "\n", "a\nb", "\n\n42", "\ta", "a\r\nb", "12 + 30 = 42", "3,000.50",
    "1234567890", "\u00e9\u00bd\ufb01 \u0130", "a\u0301e", "\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4",
    "\U0001f642\U0001f642", "\u00a0x\u3000y",
    "| a | b |\n|---|---|", "def f(x):\n    return x  # comment", "http://example.org/?a=b&c=%20", "<b>x</b> & \"y\"",
    "\\boxed{\\frac{1}{2}}", "#### 18", "\u2581", "a\u2581b", "...!!??", "_x__y", "CamelCase snake_case",
)  # fmt: skip
_RANDOM_TEXTS, _MOST_PIECES = 1000, 12
#: Share of texts that a unigram model may cut at another of several equally likely places.
_TIES = 0.01
FLAG = "--no-tokenizer exports the weights without it"


@dataclass(frozen=True)
class Comparison:
    """texts: how many both tokenizers read; different: those of which the ids differ."""

    texts: int
    different: tuple[str, ...]


def sentencepiece_files(tokenizer: SentencePieceTokenizer, model: Path, context: int) -> tuple[dict[str, str], str]:
    """(name → contents of tokenizer.json and tokenizer_config.json, a note for the user or nothing).

    model: the sentencepiece file. context: tokens that the model holds. UserError where no tokenizer.json has its ids.
    """
    try:
        kind = tokenizer.kind
        text = _word_level(tokenizer) if kind == "word" else _converted(model)
        from tokenizers import Tokenizer as FastTokenizer
    except ImportError as error:
        raise UserError(
            f"a tokenizer.json is made with: pip install megatron-jq[hf] ({error.name} is missing); {FLAG}"
        ) from error
    fast = FastTokenizer.from_str(text)
    _check_pieces(tokenizer, fast)
    names = {"eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    if bos := _bos_ids(tokenizer):
        names["bos_token"] = bos[0]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: fast.id_to_token(token) for name, token in names.items()},
        "unk_token": tokenizer.unknown,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    comparison = compare(tokenizer, lambda text: fast.encode(text, add_special_tokens=False).ids)
    note = ""
    different = comparison.different
    if different:
        share = len(different) / comparison.texts
        if kind != "unigram" or share > _TIES:
            raise _unequal(comparison, f"its sentencepiece tokenizer ({kind})")
        note = (
            f"of {comparison.texts} texts the exported tokenizer cuts {len(different)} at another of several equally "
            f"likely places, {different[0]!r} among them"
        )
    return {"tokenizer.json": text, "tokenizer_config.json": json.dumps(settings, indent=2) + "\n"}, note


def check_with_transformers(tokenizer: Tokenizer, folder: Path, *, strict: bool) -> str:
    """Hold a whole folder's tokenizer, as AutoTokenizer reads it, against the run's; returns a note, or nothing.

    strict: UserError where they differ by more than a unigram model's ties; otherwise the note says so.
    """
    try:
        import transformers
    except ImportError:
        return "the tokenizer was not compared with transformers', which is not installed (pip install megatron-jq[hf])"
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        auto = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        comparison = compare(tokenizer, lambda text: auto(text, add_special_tokens=False)["input_ids"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        if strict:
            raise UserError(f"transformers does not read the exported tokenizer ({error}); {FLAG}") from error
        return f"transformers does not read this tokenizer: {error}"
    finally:
        transformers.logging.set_verbosity(before)
    ties = _TIES if getattr(tokenizer, "kind", None) == "unigram" else 0.0
    different = comparison.different
    if len(different) <= ties * comparison.texts:
        return ""
    if strict:
        raise _unequal(comparison, f"as transformers {transformers.__version__} reads it, its tokenizer")
    return (
        f"transformers {transformers.__version__} reads this tokenizer otherwise than the run did: "
        f"{len(different)} of {comparison.texts} texts have other ids, {different[0]!r} among them"
    )


def forgeable(tokenizer: Tokenizer, folder: Path) -> list[str]:
    """Names that text can spell in an exported folder, and not in a run: its special and control tokens."""
    table, control = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")), tokenizer.control_ids
    added = [token for token in table.get("added_tokens", ()) if token["special"] or token["id"] in control]
    return [token["content"] for token in sorted(added, key=lambda token: token["id"] not in control)]


def compare(tokenizer: Tokenizer, encode: Callable[[str], list[int]]) -> Comparison:
    """The run's tokenizer against another's `encode`, on every text that the run reads and that spells no token."""
    texts, different = 0, []
    for text in sample_texts(tokenizer):
        try:
            ids = tokenizer.encode(text)
        except UserError:
            continue  # a run refuses such a text, so that it is none of what was trained
        texts += 1
        if encode(text) != ids:
            different.append(text)
    return Comparison(texts, tuple(different))


def sample_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Every piece alone, pieces in a row, and odd texts; the same at every call."""
    control, size = tokenizer.control_ids, tokenizer.vocab_size
    pieces = [tokenizer.decode([token]) for token in range(size) if token not in control]
    pieces = sorted({piece for piece in pieces if piece and "\ufffd" not in piece and "<" not in piece})
    yield from ODD_TEXTS
    yield from pieces
    if not pieces:
        return
    draw = random.Random(0)
    for _ in range(_RANDOM_TEXTS):
        row = draw.choices(pieces, k=draw.randint(2, _MOST_PIECES))
        yield draw.choice(("", " ")).join(row)


def _converted(model: Path) -> str:
    """tokenizer.json, as transformers makes it of a folder with the sentencepiece file alone: a config.json beside it
    would have another class read it.
    """
    import google.protobuf  # noqa: F401 - transformers reads the model with it
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "tokenizer.model").write_bytes(model.read_bytes())
        try:
            auto = transformers.AutoTokenizer.from_pretrained(scratch, local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"transformers cannot convert the sentencepiece tokenizer ({error}); {FLAG}") from error
        finally:
            transformers.logging.set_verbosity(before)
        return auto.backend_tokenizer.to_str()


def _word_level(tokenizer: SentencePieceTokenizer) -> str:
    """A model of whole words, as the built-in tasks': a word of the text after its blank is a token, or unknown."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as FastTokenizer

    vocab = {tokenizer.name(token): token for token in range(tokenizer.vocab_size)}
    fast = FastTokenizer(models.WordLevel(vocab, unk_token=tokenizer.unknown))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always", split=True)
    fast.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    special = [tokenizer.name(token) for token in range(tokenizer.vocab_size) if tokenizer.is_special(token)]
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return fast.to_str()


def _check_pieces(tokenizer: SentencePieceTokenizer, fast: Any) -> None:
    """UserError where an id has another piece, a special one is none, or the vocabulary another size."""
    size = fast.get_vocab_size(with_added_tokens=True)
    if size != tokenizer.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} pieces, and {size} as tokenizer.json; {FLAG}")
    added = fast.get_added_tokens_decoder()
    for token in range(size):
        name = tokenizer.name(token)
        if fast.id_to_token(token) != name or (tokenizer.is_special(token) and token not in added):
            raise UserError(f"piece {token}, {name!r}, has no equal in tokenizer.json; {FLAG}")


def _bos_ids(tokenizer: SentencePieceTokenizer) -> list[int]:
    try:
        return tokenizer.bos_ids("on")
    except UserError:
        return []


def _unequal(comparison: Comparison, what: str) -> UserError:
    different = comparison.different
    shown: Iterable[str] = different[:3]
    return UserError(
        f"{what} has no tokenizer.json with the same ids: {len(different)} of {comparison.texts} texts differ, "
        f"{', '.join(map(repr, shown))}; {FLAG}"
    )
