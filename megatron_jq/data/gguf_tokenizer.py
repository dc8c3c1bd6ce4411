"""F2: the tokenizer of a GGUF file as the files of a Hugging Face folder (tokenizer.json and what stands beside it).

The file has pieces, merges or scores, and the name of a rule by which a text is split before it is merged. Here are the
rules of the families that are converted; a tokenizer with another one would read texts otherwise and is refused.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_jq.data.gguf_files import GgufFile, read_gguf
from megatron_jq.errors import UserError

#: What the file says a piece is.
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
_BLANK = "\u2581"
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: tokenizer.ggml.pre → (what a text is split by, None for GPT-2's rule; digits one by one before; a text that is a
#: piece is not merged; NFC before all; whether a text begins with the beginning of text where the file does not say).
_RULES: dict[str, tuple[str | None, bool, bool, bool, bool]] = {
    "gpt-2": (None, False, False, False, False),
    "smollm": (None, True, False, False, False),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), (_LLAMA_3, False, True, False, True)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (_QWEN_2, False, False, True, False)),
    "tekken": (_TEKKEN, False, True, False, True),
}
#: tokenizer_config.json's name → tokenizer.ggml's.
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def gguf_tokenizer_files(path: Path, flag: str) -> dict[str, bytes]:
    """Name → content of tokenizer.json, tokenizer_config.json and, where there is one, chat_template.jinja.

    UserError: no GGUF file, or a tokenizer of a kind that is not known here.
    """
    gguf = read_gguf(path, flag)
    try:
        files = tokenizer_files(gguf)
    except ImportError as error:
        raise UserError("GGUF files need: pip install megatron-jq[hf]") from error
    return {name: text.encode("utf-8") for name, text in files.items()}


def tokenizer_files(gguf: GgufFile) -> dict[str, str]:
    """As gguf_tokenizer_files, of a file that was read. ImportError without the package `tokenizers`."""
    from tokenizers import AddedToken, processors

    values = gguf.values
    pieces, kinds = values.get("tokenizer.ggml.tokens"), values.get("tokenizer.ggml.token_type")
    model = values.get("tokenizer.ggml.model")
    build = {"gpt2": _byte_level, "llama": _sentencepiece}.get(model)
    if not pieces or build is None:
        raise _unknown(gguf, f"is of kind {model!r}" if pieces else "is missing")
    kinds = kinds or [1] * len(pieces)
    while kinds[-1] == _UNUSED:  # names of the embedding's padding rows
        pieces, kinds = pieces[:-1], kinds[:-1]
    tokenizer, adds_bos = build(gguf, pieces, kinds)
    added = [
        AddedToken(piece, normalized=False, special=kind == _CONTROL)
        for piece, kind in zip(pieces, kinds, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    if tokenizer.get_vocab_size(with_added_tokens=True) != len(pieces):
        raise _unknown(gguf, "holds a piece twice")
    ids = {name: values.get(f"tokenizer.ggml.{key}") for name, key in _NAMED.items()}
    names = {name: pieces[token] for name, token in ids.items() if token is not None and token < len(pieces)}
    if "eos_token" not in names:
        raise _unknown(gguf, "names no token that ends a text")
    adds_bos = bool(values.get("tokenizer.ggml.add_bos_token", adds_bos)) and "bos_token" in names
    if adds_bos:
        bos = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, ids["bos_token"])]
        )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "add_bos_token": adds_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": values.get(f"{gguf.architecture}.context_length", 1 << 20),
    }
    files = {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(settings, indent=2) + "\n"}
    if template := values.get("tokenizer.chat_template"):
        files["chat_template.jinja"] = template
    return files


def _byte_level(gguf: GgufFile, pieces: Sequence[str], kinds: Sequence[int]) -> tuple[Any, bool]:
    """(tokenizer, whether it begins texts): pieces of bytes in GPT-2's alphabet, and merges."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    rule = gguf.values.get("tokenizer.ggml.pre")
    if rule not in _RULES:
        raise _unknown(gguf, f"splits texts by rule {rule!r}")
    pattern, single_digits, ignores_merges, composed, adds_bos = _RULES[rule]
    merges = [tuple(merge.split(" ", 1)) for merge in gguf.values.get("tokenizer.ggml.merges", ())]
    vocab = {piece: token for token, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=ignores_merges))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
    if pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if composed:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer, adds_bos


def _sentencepiece(gguf: GgufFile, pieces: Sequence[str], kinds: Sequence[int]) -> tuple[Any, bool]:
    """(tokenizer, whether it begins texts): sentencepiece's pieces with scores, as Llama 2 and Mistral have them."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = gguf.values.get("tokenizer.ggml.scores")
    if scores is None or _UNKNOWN not in kinds:
        raise _unknown(gguf, "has no scores, or no piece for what has none")
    vocab = {piece: token for token, piece in enumerate(pieces)}
    merged = [token for token, kind in enumerate(kinds) if kind not in (_UNKNOWN, _CONTROL, _BYTE)]
    usable = {pieces[token] for token in merged}
    ranked = [
        (-scores[token], len(left), len(right), left, right)
        for token in merged
        for left, right in _halves(pieces[token])
        if left in usable and right in usable
    ]
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    unknown = pieces[kinds.index(_UNKNOWN)]
    bpe = models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=_BYTE in kinds)
    tokenizer = Tokenizer(bpe)
    has_prefix = gguf.values.get("tokenizer.ggml.add_space_prefix", True)
    before = [normalizers.Prepend(_BLANK)] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _BLANK)])
    after = [decoders.Strip(content=" ", left=1, right=0)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return tokenizer, True


def _halves(piece: str) -> list[tuple[str, str]]:
    return [(piece[:n], piece[n:]) for n in range(1, len(piece))]


def _unknown(gguf: GgufFile, what: str) -> UserError:
    return UserError(
        f"{gguf.path}: its tokenizer {what}, of which no tokenizer.json is made here; give the tokenizer of the model "
        "that the file was made of with --tokenizer-model FOLDER"
    )
