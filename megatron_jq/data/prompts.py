"""F2: pairs to examples. A row of the trainer is prompt, `<think>`, rationale, `</think>`, bridge, y*, end of text.

Here are its fixed parts: prompt_ids end with `<think>` (and what the template puts after it), answer_ids end with the
end of text. The rationale and its `</think>`, sampled or forced, come between them later, and after them bridge_ids:
what the template puts after `</think>`, which is given like the prompt. y* is tokenised on its own and joined on ids,
so that its tokens depend neither on the rationale nor on the bridge. `<think>` and `</think>` stand here for the tokens
that the settings name; the end of text may be the second, and the first may be missing.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_jq.data.bad_records import BadRecords
from megatron_jq.data.chat import ChatFrame
from megatron_jq.data.template import PromptStyle
from megatron_jq.data.tokenizers import Tokenizer
from megatron_jq.errors import UserError
from megatron_jq.formats.pair import Pair
from megatron_jq.formats.record_error import RecordError
from megatron_jq.records import Example

OVERLONG_POLICIES = ("error", "drop")
_NAMED_AT_MOST = 3
# In a fingerprint: no length is negative
_BRIDGE_MARK, _RATIONALE_MARK = ((-n).to_bytes(8, "little", signed=True) for n in (1, 2))


@dataclass(frozen=True)
class Placed:
    """An example and where its pair came from."""

    example: Example
    place: str


@dataclass(frozen=True)
class OverlongReport:
    """How many pairs did not fit, of how many. `first` names some of them: "train.jsonl:17 (310 prompt tokens)"."""

    count: int
    total: int
    first: tuple[str, ...]

    def __str__(self) -> str:
        """What was left out, in a line; nothing where all fits."""
        more = ", …" if self.count > len(self.first) else ""
        plural = "s" if self.count > 1 else ""
        return f"{self.count} overlong example{plural} left out: {', '.join(self.first)}{more}" if self.count else ""


@dataclass(frozen=True)
class EncodedExamples:
    """Examples in the order of their pairs. Their `index` is the pair's row, whether or not others were dropped."""

    examples: tuple[Example, ...]
    overlong: OverlongReport
    places: tuple[str, ...]  # of each example
    misfits: tuple[RecordError, ...]


class PromptWriter:
    """Writes pairs as token ids, in one style with one tokenizer."""

    def __init__(
        self, style: PromptStyle, tokenizer: Tokenizer, *, add_bos_token: str = "auto", chat_date: str | None = None
    ):
        """UserError: the style wants a chat template and the tokenizer has none that can be used; no such token; a
        closing token that ends the answer too, with nothing between the two.
        """
        self.style, self.tokenizer = style, tokenizer
        # With a system message and without: a record of a chat file may have none.
        self._date, self._frames = chat_date, {}
        # A chat template writes what a conversation begins with.
        self._bos = [] if style.chat and add_bos_token == "auto" else tokenizer.bos_ids(add_bos_token)
        if style.chat and not style.system:
            self._frame(system=False)
        self._after_open = self._following(style.after_open)
        self._bridge_ids = tuple(self._bridge())

    def example(self, index: int, pair: Pair) -> Example:
        """UserError: the template asks for a piece that the pair does not have. RecordError: a text that the tokenizer
        cannot read.
        """
        text = self.style.fill(pair)
        system = self.style.fill_system(pair) if self.style.system else ""
        frame = self._frame(system=bool(system)) if self.style.chat else None
        try:
            prompt_ids = self._prompt(frame, system, text)
            gold = self._continued(pair.answer, self._bridge_ids or (self.tokenizer.think_close_id,))
            wanted = pair.rationale is not None and bool(prompt_ids)
            rationale_ids = self._given(pair.rationale, prompt_ids) if wanted else None
        except UserError as error:
            raise RecordError(pair.place, "not in the tokenizer", str(error)) from error
        if not prompt_ids:
            raise RecordError(pair.place, "no prompt", f"the tokenizer makes no token of the prompt {text!r}")
        if not gold:
            raise RecordError(pair.place, "no answer", f"the tokenizer makes no token of the answer {pair.answer!r}")
        answer_ids = (*gold, self.tokenizer.eos_id)
        others = (pair.aliases, self._bridge_ids, rationale_ids)
        return Example(index, text, pair.answer, tuple(prompt_ids), answer_ids, *others)

    @property
    def notes(self) -> list[str]:
        """What a user should know of the prompts."""
        return sorted({frame.note for frame in self._frames.values() if frame.note})

    def _frame(self, *, system: bool) -> ChatFrame:
        if system not in self._frames:
            self._frames[system] = self.tokenizer.chat_frame(system=system, date=self._date)
        return self._frames[system]

    def _prompt(self, frame: ChatFrame | None, system: str, text: str) -> list[int]:
        """x, up to `<think>` and what follows it."""
        if frame is None:
            ids = [*self._bos, *self.tokenizer.encode(text)]
        else:
            ids = self.tokenizer.encode_chat(frame, [system, text] if system else [text])
            if ids[: len(self._bos)] != self._bos:
                ids = [*self._bos, *ids]
            if frame.opened is not None:
                return ids
        opens = self.tokenizer.think_open_id
        return ids if opens is None else [*ids, opens, *self._after_open]

    def _given(self, rationale: str, prompt_ids: list[int]) -> tuple[int, ...]:
        return (*self._continued(rationale, prompt_ids), self.tokenizer.think_close_id)

    def _bridge(self) -> list[int]:
        """What is given between the closing token and y*."""
        t, style = self.tokenizer, self.style
        if t.think_close_id != t.eos_id:
            return self._following(style.after_close)
        if style.chat:
            return t.encode_next_turn(style.answer_prompt, date=self._date)
        if not style.after_close:
            raise UserError(
                f"--think-close {t.think_close} ends the answer too, and nothing stands between: give --prompt-style "
                "warm, whose chat template opens another turn, or a --prompt-template with after_close; or name "
                "another token"
            )
        return self._following(style.after_close)

    def _following(self, text: str) -> list[int]:
        """Fixed text directly after `<think>` or `</think>`."""
        return self.tokenizer.encode_inside(text, after_token=True) if text else []

    def _continued(self, text: str, before: Sequence[int]) -> list[int]:
        """Text after the ids `before`, on its own."""
        return self.tokenizer.encode_inside(text, after_token=self.tokenizer.is_special(before[-1]))


def unwritten(style: PromptStyle, tokenizer: Tokenizer) -> list[str]:
    """What a style says that these markers leave out, a line each."""
    closes_turn = tokenizer.think_close_id == tokenizer.eos_id and style.chat
    reasons = {
        "after_open": None if tokenizer.think_open is not None else "nothing opens a rationale (--think-open)",
        "after_close": "the end of the turn closes a rationale, and answer_prompt follows it" if closes_turn else None,
        "answer_prompt": None if closes_turn else f"{tokenizer.think_close} closes a rationale; after_close follows",
    }
    return [
        f"{name} of the prompt template is not written: {reason}"
        for name, reason in reasons.items()
        if reason is not None and getattr(style, name)
    ]


def encode_pairs(pairs: Sequence[Pair], writer: PromptWriter, bad: BadRecords) -> list[Placed]:
    """Token ids for every pair that has some; errors go to `bad`."""
    return bad.sieve(enumerate(pairs), lambda row: Placed(writer.example(*row), row[1].place))


def select_fitting(
    placed: Sequence[Placed],
    *,
    max_prompt_tokens: int | None,
    answer_budget: int | None = None,
    rationale_budget: int | None = None,
    overlong: str = "error",
) -> EncodedExamples:
    """The examples that fit; others stop the run ("error") or are left out ("drop").

    max_prompt_tokens counts `<think>`; answer_budget counts the end of text; rationale_budget is of given rationales
    and counts `</think>`; None is without limit. UserError: something does not fit under "error", nothing is left under
    "drop", an unknown policy.
    """
    if overlong not in OVERLONG_POLICIES:
        raise UserError(f"--overlong-prompts {overlong} is not known; it is one of {', '.join(OVERLONG_POLICIES)}")
    limits = {"prompt": max_prompt_tokens, "rationale": rationale_budget, "answer": answer_budget}
    fitting, misfits = [], []
    for entry in placed:
        excess = _excess(entry.example, limits)
        if excess:
            detail = ", ".join(f"{tokens} {part} tokens" for part, tokens in excess.items())
            misfits.append(RecordError(entry.place, f"{next(iter(excess))} too long", detail))
        else:
            fitting.append(entry)
    examples_shown = tuple(f"{error.place} ({error.detail})" for error in misfits[:_NAMED_AT_MOST])
    report = OverlongReport(len(misfits), len(placed), examples_shown)
    if misfits and (overlong == "error" or not fitting):
        raise UserError(_misfit_message(report, limits, can_drop=bool(fitting)))
    examples, places = (tuple(entry.example for entry in fitting), tuple(entry.place for entry in fitting))
    return EncodedExamples(examples, report, places, tuple(misfits))


def longest_bridge(placed: Iterable[Placed]) -> int:
    """Tokens of the longest bridge between `</think>` and an answer: what a row needs for it."""
    return max((len(entry.example.bridge_ids) for entry in placed), default=0)


def fingerprint(examples: Iterable[Example]) -> str:
    """SHA-256 of the examples' token ids and accepted answers, in order: equal where training is the same."""
    digest = hashlib.sha256()
    for example in examples:
        for ids in (example.prompt_ids, example.answer_ids):
            digest.update(_with_length(ids))
        if example.bridge_ids:
            digest.update(_BRIDGE_MARK + _with_length(example.bridge_ids))
        if example.rationale_ids is not None:
            digest.update(_RATIONALE_MARK + _with_length(example.rationale_ids))
        for alias in example.aliases:  # a sampled answer is right if it is one of them
            digest.update(len(alias).to_bytes(8, "little") + alias.encode("utf-8"))
    return digest.hexdigest()


def _with_length(ids: tuple[int, ...]) -> bytes:
    return len(ids).to_bytes(8, "little") + array("q", ids).tobytes()


def _excess(example: Example, limits: dict[str, int | None]) -> dict[str, int]:
    """Part of the example that is too long → its tokens."""
    lengths = {
        "prompt": len(example.prompt_ids),
        "rationale": len(example.rationale_ids or ()),
        "answer": len(example.answer_ids),
    }
    return {part: n for part, n in lengths.items() if limits[part] is not None and n > limits[part]}


def _misfit_message(report: OverlongReport, limits: dict[str, int | None], *, can_drop: bool) -> str:
    more = ", …" if report.count > len(report.first) else ""
    fix = "leave them out with --overlong-prompts drop, or allow for more" if can_drop else "allow for more"
    exceeded = " and ".join(f"{limit} {part} tokens" for part, limit in limits.items() if limit is not None)
    return f"{report.count} of {report.total} examples exceed {exceeded}: {', '.join(report.first)}{more}; {fix}"
