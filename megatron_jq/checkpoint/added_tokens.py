"""F4: tokens that a Hugging Face folder's tokenizer lacks, added while the folder is converted (--add-tokens).

A token takes the tokenizer's next id. In a model with more rows than tokens (Qwen's) that row is there and no token
used it; otherwise the vocabulary grows by the missing rows. Every other row stays as it is.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_jq.architecture import Architecture
from megatron_jq.checkpoint.huggingface import CONFIG, Signature, WeightReader, read_json
from megatron_jq.data.tokenizer_choice import HUGGING_FACE, tokenizer_in
from megatron_jq.errors import UserError

TOKENIZER_JSON, TOKENIZER_CONFIG, ADDED_TOKENS = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_CLASS = f"remove tokenizer_class from {TOKENIZER_CONFIG}, or name another token"


@dataclass(frozen=True)
class AddedTokens:
    """Tokens and what they change. ids: name → id, in a row from the tokenizer's end on. pieces: name → the ids that
    spelled it before. files: name → text of the tokenizer's files and config.json, as far as they change. vocab_size:
    the model's rows with them; previous_vocab_size: without.
    """

    ids: dict[str, int]
    pieces: dict[str, list[int]]
    files: dict[str, str]
    vocab_size: int
    previous_vocab_size: int

    @property
    def first_id(self) -> int:
        return min(self.ids.values())

    def write(self, folder: Path, log: Callable[[str], None]) -> None:
        """Write the files over those that were carried along, and see that transformers reads the tokens there.

        UserError where it gives one another id. log: gets what could not be checked.
        """
        for name, text in self.files.items():
            (folder / name).write_text(text, encoding="utf-8")
        try:
            import transformers
        except ImportError:
            log("note: whether transformers reads the added tokens was not checked: it is not installed")
            return
        before = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        try:
            auto = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
            log(f"note: transformers does not read this folder's tokenizer: {error}")
            return
        finally:
            transformers.logging.set_verbosity(before)
        for name, token in self.ids.items():
            ids = auto(name, add_special_tokens=False)["input_ids"]
            if ids != [token]:
                raise UserError(f"--add-tokens {name!r}: transformers reads it as {ids}, not as {token}; {_CLASS}")

    def description(self) -> str:
        """For the user."""
        tokens = ", ".join(f"{name!r} is token {token}" for name, token in self.ids.items())
        if self.vocab_size == self.previous_vocab_size:
            return f"{tokens}; the vocabulary stays at {self.vocab_size} rows, of which no token used these"
        return f"{tokens}; the vocabulary grows from {self.previous_vocab_size} to {self.vocab_size} rows"


class GrownReader:
    """A folder's tensors with rows for added tokens, read as HuggingFaceReader reads them."""

    def __init__(self, reader: WeightReader, added: AddedTokens):
        self.folder = reader.folder
        self._reader, self._first, self._rows = reader, added.first_id, {}
        self.signature: Signature = dict(reader.signature)
        for name in _VOCABULARY:
            if name in self.signature:
                (_, width), dtype = self.signature[name]
                self.signature[name] = (added.vocab_size, width), dtype
                self._rows[name] = _initial_rows(reader, name, added)

    def read(self, name: str, rows: tuple[int, int], columns: tuple[int, int] | None = None) -> torch.Tensor:
        """As HuggingFaceReader.read."""
        if name not in self._rows:
            return self._reader.read(name, rows, columns)
        (start, end), new = rows, self._rows[name]
        columns = columns or (0, new.shape[1])
        out = new.new_zeros(end - start, columns[1] - columns[0])
        stop = min(end, self._reader.signature[name][0][0])
        if start < stop:
            out[: stop - start] = self._reader.read(name, (start, stop), columns)
        low, high = max(start, self._first), min(end, self._first + len(new))
        if low < high:
            out[low - start : high - start] = new[low - self._first : high - self._first, slice(*columns)]
        return out


def plan_tokens(names: Sequence[str], folder: Path, source: Path, architecture: Architecture) -> AddedTokens:
    """Return the tokens with their ids and what they change; nothing is written.

    folder: of config.json and the tokenizer. source: what messages name. UserError, which names flag or file: a token
    that cannot be added, is there already, or that ordinary text holds; a tokenizer without tokenizer.json, or with ids
    beyond the model's vocabulary.
    """
    _check_names(names)
    vocab_size = architecture.vocab_size
    assert vocab_size is not None
    _check_kind(folder, source)
    place = f"{source / TOKENIZER_JSON}" if folder == source else f"{source}"
    table = read_json(folder / TOKENIZER_JSON)
    fast = _loaded(table, place)
    _check_new(names, fast, place)
    first = max(fast.get_vocab(with_added_tokens=True).values()) + 1
    if first > vocab_size:
        raise UserError(
            f"{place} has tokens up to id {first - 1}, and the model a vocabulary of {vocab_size}: the tokenizer is "
            "another model's; put the model's own there"
        )
    ids = {name: first + i for i, name in enumerate(names)}
    entries = [{"id": token, "content": name, **_FLAGS} for name, token in ids.items()]
    table["added_tokens"] = [*table.get("added_tokens", ()), *entries]
    _check_read(ids, _loaded(table, place), place)
    files = {TOKENIZER_JSON: _text(table), **_other_files(folder, ids)}
    grown = max(vocab_size, first + len(ids))
    if grown > vocab_size:
        files[CONFIG] = _text({**read_json(folder / CONFIG), "vocab_size": grown})
    pieces = {name: fast.encode(name, add_special_tokens=False).ids for name in names}
    return AddedTokens(ids, pieces, files, grown, vocab_size)


#: As Qwen3 has `<think>`: matched as it is written, and shown where special tokens are left out.
_FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)


def _check_names(names: Sequence[str]) -> None:
    for i, name in enumerate(names):
        if not name or name != name.strip():
            raise UserError(f"--add-tokens {name!r}: a token is not empty and has no blank at its ends; name another")
        if name in names[:i]:
            raise UserError(f"--add-tokens names {name!r} twice; name it once")
        if all(letter.isalnum() or letter.isspace() for letter in name):
            raise UserError(
                f"--add-tokens {name!r}: a word of ordinary text would be cut differently; name one that text does not "
                f"hold, such as '<{name}>'"
            )


def _check_kind(folder: Path, source: Path) -> None:
    """UserError where the tokenizer that is used is not tokenizer.json."""
    tokenizer = tokenizer_in(folder)
    if tokenizer is None:
        raise UserError(f"--add-tokens: {source} holds no tokenizer; put the model's {TOKENIZER_JSON} there")
    kind, path = tokenizer
    if kind == HUGGING_FACE:
        return
    if (folder / TOKENIZER_JSON).is_file():
        raise UserError(
            f"--add-tokens: {path} is the tokenizer that is used, and nothing can be added to a sentencepiece model; "
            f"remove it to have {TOKENIZER_JSON} used"
        )
    raise UserError(
        f"--add-tokens: {source} holds {path.name} alone, and nothing can be added to a sentencepiece model; write "
        f"{TOKENIZER_JSON} beside it with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    )


def _loaded(table: dict[str, Any], place: str) -> Any:
    try:
        from tokenizers import Tokenizer as FastTokenizer
    except ImportError as error:
        raise UserError("--add-tokens needs: pip install megatron-jq[hf]") from error
    try:
        fast = FastTokenizer.from_buffer(json.dumps(table).encode())
    except ValueError as error:
        raise UserError(
            f"{place} does not hold a Hugging Face tokenizer: {error}; put the model's own there"
        ) from error
    fast.no_truncation()
    fast.no_padding()
    return fast


def _check_new(names: Sequence[str], fast: Any, place: str) -> None:
    added = {token.content: number for number, token in fast.get_added_tokens_decoder().items()}
    present = [name for name in names if name in added]
    if present:
        those = ", ".join(f"{name!r} (id {added[name]})" for name in present)
        fix = "leave --add-tokens out" if len(present) == len(names) else "name the others alone"
        raise UserError(f"--add-tokens: {place} has {those} already, so that nothing needs adding for it; {fix}")
    for name in names:
        ids = fast.encode(name, add_special_tokens=False).ids
        if len(ids) == 1 and fast.decode(ids, skip_special_tokens=False).strip() == name:
            raise UserError(
                f"--add-tokens {name!r}: it is a piece of {place} (id {ids[0]}), which ordinary text holds; name one "
                "that text does not hold, such as '<think>'"
            )


def _check_read(ids: Mapping[str, int], fast: Any, place: str) -> None:
    """UserError where the library, with the tokens added, has another id for one, or does not read it in a text."""
    for name, token in ids.items():
        alone, inside = (fast.encode(text, add_special_tokens=False).ids for text in (name, f"a{name}a"))
        if fast.token_to_id(name) != token or alone != [token] or inside.count(token) != 1:
            raise UserError(
                f"--add-tokens {name!r}: {place} does not read it as one token with the next id, {token}; its ids have "
                "gaps, or one of its tokens takes part of the text: name another token, or number its tokens in a row"
            )


def _other_files(folder: Path, ids: Mapping[str, int]) -> dict[str, str]:
    """The files that list added tokens again, as older versions of transformers write them."""
    files = {}
    if (folder / ADDED_TOKENS).is_file():
        files[ADDED_TOKENS] = _text({**read_json(folder / ADDED_TOKENS), **ids})
    if (folder / TOKENIZER_CONFIG).is_file():
        settings = read_json(folder / TOKENIZER_CONFIG)
        listed = settings.get("added_tokens_decoder")
        if isinstance(listed, dict):
            entries = {str(token): {"content": name, **_FLAGS} for name, token in ids.items()}
            files[TOKENIZER_CONFIG] = _text({**settings, "added_tokens_decoder": {**listed, **entries}})
    return files


def _text(table: dict[str, Any]) -> str:
    return json.dumps(table, indent=2, ensure_ascii=False) + "\n"


def _initial_rows(reader: WeightReader, name: str, added: AddedTokens) -> torch.Tensor:
    """Rows of the new tokens, [tokens, H], in the tensor's dtype: means of the rows of what spelled them before."""
    dtype = reader.signature[name][1]
    rows = []
    for pieces in added.pieces.values():
        rows.append(torch.cat([reader.read(name, (piece, piece + 1)) for piece in pieces]).double().mean(0))
    return torch.stack(rows).to(dtype)
