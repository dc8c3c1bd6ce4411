"""F2: pairs to examples. A row of the trainer is prompt, `<think>`, rationale, `</think>`, y*, end of text.

Here are its fixed parts: prompt_ids end with `<think>` (and what the template puts after it), answer_ids end with the
end of text. The rationale and its `</think>`, sampled or forced, come between them later. y* is tokenised on its own
and joined on ids, so that its tokens do not depend on the rationale (PAPER.md, consequence 6). What a template puts
after `</think>` is the head of answer_ids: the policy is to write it, and P counts it.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_jq.data.faults import BadRecords, RecordError
from megatron_jq.data.pair import Pair
from megatron_jq.data.template import PromptStyle
from megatron_jq.data.tokenizers import Tokenizer
from megatron_jq.errors import UserError
from megatron_jq.records import Example

OVERLONG_POLICIES = ("error", "drop")
_NAMED_AT_MOST = 3


@dataclass(frozen=True)
class Placed:
    """An example and where its pair came from."""

    example: Example
    where: str


@dataclass(frozen=True)
class OverlongReport:
    """How many pairs did not fit, of how many. `first` names some of them: "train.jsonl:17 (310 prompt tokens)"."""

    count: int
    total: int
    first: tuple[str, ...]


@dataclass(frozen=True)
class EncodedExamples:
    """Examples in the order of their pairs. Their `index` is the pair's row, whether or not others were dropped."""

    examples: tuple[Example, ...]
    overlong: OverlongReport
    where: tuple[str, ...]  # of each example
    misfits: tuple[RecordError, ...]


class PromptWriter:
    """Writes pairs as token ids, in one style with one tokenizer."""

    def __init__(self, style: PromptStyle, tokenizer: Tokenizer):
        """UserError: the style wants a chat template and the tokenizer has none that can be used."""
        self.style, self.tokenizer = style, tokenizer
        self._frame = tokenizer.chat_frame(system=bool(style.system)) if style.chat else ([], [])
        self._after_open = tokenizer.encode(style.after_open) if style.after_open else []
        self._after_close = tokenizer.encode(style.after_close) if style.after_close else []

    def example(self, index: int, pair: Pair) -> Example:
        """UserError: the template asks for a piece that the pair does not have. RecordError: a text that the tokenizer
        cannot read.
        """
        text = self.style.fill(pair)
        messages = [self.style.fill_system(pair), text] if self.style.system else [text]
        encode = self.tokenizer.encode
        try:
            contents = [encode(message) for message in messages]
            gold = encode(pair.answer)
        except UserError as error:
            raise RecordError(pair.where, "not in the tokenizer", str(error)) from error
        prompt_ids = list(self._frame[0])
        for content, following in zip(contents, self._frame[1:], strict=True):
            prompt_ids += [*content, *following]
        prompt_ids += [self.tokenizer.think_open_id, *self._after_open]
        answer_ids = (*self._after_close, *gold, self.tokenizer.eos_id)
        return Example(index, text, pair.answer, tuple(prompt_ids), answer_ids, pair.aliases)


def encode_pairs(pairs: Sequence[Pair], writer: PromptWriter, bad: BadRecords) -> list[Placed]:
    """Token ids for every pair that has some; faults go to `bad`."""
    return bad.sieve(enumerate(pairs), lambda row: Placed(writer.example(*row), row[1].where))


def select_fitting(
    placed: Sequence[Placed],
    *,
    max_prompt_tokens: int | None,
    answer_budget: int | None = None,
    overlong: str = "error",
) -> EncodedExamples:
    """The examples that fit; others stop the run ("error") or are left out ("drop").

    max_prompt_tokens counts `<think>`; answer_budget counts the end of text; None is without limit. UserError:
    something does not fit under "error", nothing is left under "drop", an unknown policy.
    """
    if overlong not in OVERLONG_POLICIES:
        raise UserError(f"--overlong-prompts {overlong} is not known; it is one of {', '.join(OVERLONG_POLICIES)}")
    fitting, misfits = [], []
    for one in placed:
        excess = _excess(one.example, max_prompt_tokens, answer_budget)
        if excess:
            kind = "prompt too long" if "prompt" in excess else "answer too long"
            misfits.append(RecordError(one.where, kind, excess))
        else:
            fitting.append(one)
    named = tuple(f"{fault.where} ({fault.detail})" for fault in misfits[:_NAMED_AT_MOST])
    report = OverlongReport(len(misfits), len(placed), named)
    if misfits and (overlong == "error" or not fitting):
        raise UserError(_misfit_message(report, max_prompt_tokens, answer_budget, can_drop=bool(fitting)))
    examples, where = (tuple(one.example for one in fitting), tuple(one.where for one in fitting))
    return EncodedExamples(examples, report, where, tuple(misfits))


def encode_examples(
    pairs: Sequence[Pair],
    tokenizer: Tokenizer,
    *,
    max_prompt_tokens: int,
    answer_budget: int | None = None,
    overlong: str = "error",
) -> EncodedExamples:
    """Token ids for every pair as it stands, without a template. UserError as for select_fitting, and for a text that
    the tokenizer cannot read.
    """
    writer = PromptWriter(PromptStyle(), tokenizer)
    placed = [Placed(writer.example(index, pair), pair.where) for index, pair in enumerate(pairs)]
    return select_fitting(placed, max_prompt_tokens=max_prompt_tokens, answer_budget=answer_budget, overlong=overlong)


def fingerprint(examples: Iterable[Example]) -> str:
    """SHA-256 of the examples' token ids and accepted answers, in order: equal where training is the same."""
    digest = hashlib.sha256()
    for example in examples:
        for ids in (example.prompt_ids, example.answer_ids):
            digest.update(len(ids).to_bytes(8, "little") + array("q", ids).tobytes())
        for alias in example.aliases:  # a sampled answer is right if it is one of them
            digest.update(len(alias).to_bytes(8, "little") + alias.encode("utf-8"))
    return digest.hexdigest()


def _excess(example: Example, max_prompt_tokens: int | None, answer_budget: int | None) -> str:
    """What is too long about it, or nothing."""
    faults = []
    if max_prompt_tokens is not None and len(example.prompt_ids) > max_prompt_tokens:
        faults.append(f"{len(example.prompt_ids)} prompt tokens")
    if answer_budget is not None and len(example.answer_ids) > answer_budget:
        faults.append(f"{len(example.answer_ids)} answer tokens")
    return ", ".join(faults)


def _misfit_message(
    report: OverlongReport, max_prompt_tokens: int | None, answer_budget: int | None, can_drop: bool
) -> str:
    limits = [f"{max_prompt_tokens} prompt tokens"] if max_prompt_tokens is not None else []
    limits += [f"{answer_budget} answer tokens"] if answer_budget is not None else []
    more = ", …" if report.count > len(report.first) else ""
    cure = "leave them out with --overlong-prompts drop, or allow for more" if can_drop else "allow for more"
    exceeded = " and ".join(limits)
    return f"{report.count} of {report.total} examples exceed {exceeded}: {', '.join(report.first)}{more}; {cure}"
