"""F2: a tokenizer.json that reads control tokens only where it is told to, whatever the data spells out.

The `tokenizers` library matches added tokens in any text. So a text of which control tokens were read is tokenised
again by a second tokenizer, the same but for the control tokens' names, which no text holds. What is meant as control
tokens (the frame of a conversation) is handed over under those names. Each text is tokenised in one piece, and has the
ids that transformers gives it wherever no control token is forged.
"""

import copy
import functools
import json
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from megatron_jq.errors import UserError

#: (text, fixed): control tokens may stand in fixed text alone.
Piece = tuple[str, bool]
#: (id, start, stop): an added token and the characters that it was read from.
Span = tuple[int, int, int]
_ANY = "x"
_MARK = "\ue002"  # of private use: no normaliser changes it

#: Of normalizers and pre-tokenizers: what puts a blank before a text's beginning → how to have it leave that.
_PREFIXES: dict[str, dict[str, Any]] = {
    "Metaspace": {"prepend_scheme": "never"},
    "ByteLevel": {"add_prefix_space": False},
}


class GuardedEncoder:
    """Texts to ids by one tokenizer.json. guarded: ids of the added tokens that free text must not give."""

    def __init__(self, table: dict[str, Any], guarded: Collection[int]):
        self._table = table
        self._guarded = frozenset(guarded)
        self._plain = _tokenizer(table)
        self._spans = functools.lru_cache(maxsize=64)(self._spans_of)

    def encode(self, pieces: Sequence[Piece]) -> list[int]:
        """Ids of the joined text. UserError: a token that free text must not give comes out of it all the same."""
        fixed = self._spans(tuple(text if is_fixed else None for text, is_fixed in pieces))
        guarded = self._guarded.union(token for spans in fixed for token, _, _ in spans)
        joined, marks = "".join(text for text, _ in pieces), 1
        encoding = self._plain.encode(joined, add_special_tokens=False)
        if not _is_forged(encoding, guarded, pieces):
            return encoding.ids
        while _MARK * marks in joined:
            marks += 1
        renamed = [(_with_private(text, spans, marks), fix) for (text, fix), spans in zip(pieces, fixed, strict=True)]
        tokenizer = self._renamed(guarded, marks)
        encoding = tokenizer.encode("".join(text for text, _ in renamed), add_special_tokens=False)
        if _is_forged(encoding, guarded, renamed):
            raise self._forged(encoding.ids, pieces)
        return encoding.ids

    def _spans_of(self, texts: tuple[str | None, ...]) -> list[list[Span]]:
        """Of each text the added tokens that are read in it, between others of which nothing is known (None). Those of
        blanks alone are no control tokens.
        """
        pieces = [(_ANY if text is None else text, text is not None) for text in texts]
        encoding = self._plain.encode("".join(text for text, _ in pieces), add_special_tokens=False)
        added = self._plain.get_added_tokens_decoder()
        control = [
            (token, *encoding.token_to_chars(i))
            for i, token in enumerate(encoding.ids)
            if token in self._guarded or (token in added and added[token].content.strip())
        ]
        spans: list[list[Span]] = []
        start = 0
        for text, is_fixed in pieces:
            stop = start + len(text)
            inside = [(token, a - start, b - start) for token, a, b in control if start <= a and b <= stop]
            spans.append(inside if is_fixed else [])
            start = stop
        return spans

    @functools.lru_cache(maxsize=8)  # noqa: B019 - an encoder lives as long as the process
    def _renamed(self, guarded: frozenset[int], marks: int):
        """The tokenizer in which the guarded tokens have names that a text does not hold."""
        added = {token["id"]: token["content"] for token in self._table["added_tokens"]}
        names = {added[token]: _private(token, marks) for token in guarded if token in added}
        tokenizer = _tokenizer(_with_names(self._table, names))
        for name in names.values():
            assert _private(tokenizer.token_to_id(name), marks) == name, f"{name!r} moved when it was renamed"
        return tokenizer

    def _forged(self, ids: list[int], pieces: Sequence[Piece]) -> UserError:
        free = "".join(text for text, is_fixed in pieces if not is_fixed)
        model = self._table["model"]
        unknown = model.get("unk_token")
        position = model.get("unk_id")
        if position is not None:
            unknown = model["vocab"][position][0]
        if unknown is not None and self._plain.token_to_id(unknown) in ids:
            return UserError(f"the tokenizer has no token for a character of {free[:80]!r}; remove it from the data")
        return UserError(f"the tokenizer reads a control token out of {free[:80]!r}; remove it from the data")


def without_prefix(table: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json for text that stands after other text: no blank is put before it. The same where none is anyway.

    table: as the library itself writes it.
    """
    changed = copy.deepcopy({key: table[key] for key in ("normalizer", "pre_tokenizer")})
    changed["normalizer"] = _without_prepend(changed["normalizer"])
    for part in _parts(changed["pre_tokenizer"]):
        part.update({key: value for key, value in _PREFIXES.get(part["type"], {}).items() if key in part})
    return {**table, **changed}


def _without_prepend(part: dict[str, Any] | None) -> dict[str, Any] | None:
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Replace" and part["pattern"].get("Regex") in (r"\A▁", r"^▁"):
        return None  # it doubles a blank that Metaspace would take for its own
    if part["type"] == "Sequence":
        inner = [_without_prepend(normalizer) for normalizer in part["normalizers"]]
        return {**part, "normalizers": [normalizer for normalizer in inner if normalizer is not None]}
    return part


def _parts(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A pre-tokenizer and those that it is made of."""
    if part is not None:
        yield part
        for inner in part.get("pretokenizers", ()):
            yield from _parts(inner)


def _with_names(table: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """tokenizer.json with other names for some of its tokens, and nothing of what its post-processor adds."""
    model = dict(table["model"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(name, name): token for name, token in vocab.items()}
    else:
        model["vocab"] = [[names.get(name, name), score] for name, score in vocab]
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if names.keys().isdisjoint([*pair, "".join(pair)])]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    added = [{**token, "content": names.get(token["content"], token["content"])} for token in table["added_tokens"]]
    return {**table, "model": model, "added_tokens": added, "post_processor": None}


def _tokenizer(table: dict[str, Any]):
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(table))


def _private(token: int, marks: int) -> str:
    return f"{_MARK * marks}{token}\ue003"


def _with_private(text: str, spans: Sequence[Span], marks: int) -> str:
    parts, end = [], 0
    for token, start, stop in spans:
        parts += [text[end:start], _private(token, marks)]
        end = stop
    return "".join([*parts, text[end:]])


def _is_forged(encoding, guarded: frozenset[int], pieces: Sequence[Piece]) -> bool:
    """Whether a guarded token was read elsewhere than in fixed text."""
    ids = encoding.ids
    if guarded.isdisjoint(ids):
        return False
    ranges = _fixed_ranges(pieces)
    spans = [encoding.token_to_chars(i) for i, token in enumerate(ids) if token in guarded]
    return not all(any(start <= a and b <= stop for start, stop in ranges) for a, b in spans)


def _fixed_ranges(pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    """[start, stop) of the fixed texts, in characters of the joined text."""
    ranges, start = [], 0
    for text, is_fixed in pieces:
        if is_fixed:
            ranges.append((start, start + len(text)))
        start += len(text)
    return ranges
