"""F2: pairs to examples. A row of the trainer is prompt, `<think>`, rationale, `</think>`, y*, end of text.

Here are its fixed parts: prompt_ids end with `<think>`, answer_ids end with the end of text. The rationale and its
`</think>`, sampled or forced, come between them later. y* is tokenised on its own and joined on ids, so that its tokens
do not depend on the rationale (PAPER.md, consequence 6).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_jq.data.pair import Pair
from megatron_jq.data.tokenizers import Tokenizer
from megatron_jq.errors import UserError
from megatron_jq.records import Example

OVERLONG_POLICIES = ("error", "drop")
_NAMED_AT_MOST = 3


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


def encode_examples(
    pairs: Sequence[Pair],
    tokenizer: Tokenizer,
    *,
    max_prompt_tokens: int,
    answer_budget: int | None = None,
    overlong: str = "error",
) -> EncodedExamples:
    """Token ids for every pair; those that do not fit stop the run ("error") or are left out ("drop").

    max_prompt_tokens counts `<think>`; answer_budget counts the end of text, None leaves answers unlimited.
    UserError: something does not fit under "error", nothing is left under "drop", an unknown policy, a text that the
    tokenizer cannot read.
    """
    if overlong not in OVERLONG_POLICIES:
        raise UserError(f"--overlong-prompts {overlong} is not known; it is one of {', '.join(OVERLONG_POLICIES)}")
    examples, misfits = [], []
    for index, pair in enumerate(pairs):
        example = _encode(index, pair, tokenizer)
        excess = _excess(example, max_prompt_tokens, answer_budget)
        if excess:
            misfits.append(f"{pair.where} ({excess})")
        else:
            examples.append(example)
    report = OverlongReport(len(misfits), len(pairs), tuple(misfits[:_NAMED_AT_MOST]))
    if misfits and (overlong == "error" or not examples):
        raise UserError(_misfit_message(report, max_prompt_tokens, answer_budget, can_drop=bool(examples)))
    return EncodedExamples(tuple(examples), report)


def _encode(index: int, pair: Pair, tokenizer: Tokenizer) -> Example:
    try:
        prompt_ids = (*tokenizer.encode(pair.prompt), tokenizer.think_open_id)
        answer_ids = (*tokenizer.encode(pair.answer), tokenizer.eos_id)
    except UserError as error:
        raise UserError(f"{pair.where}: {error}") from error
    return Example(index, pair.prompt, pair.answer, prompt_ids, answer_ids)


def _excess(example: Example, max_prompt_tokens: int, answer_budget: int | None) -> str:
    """What is too long about it, or nothing."""
    faults = []
    if len(example.prompt_ids) > max_prompt_tokens:
        faults.append(f"{len(example.prompt_ids)} prompt tokens")
    if answer_budget is not None and len(example.answer_ids) > answer_budget:
        faults.append(f"{len(example.answer_ids)} answer tokens")
    return ", ".join(faults)


def _misfit_message(report: OverlongReport, max_prompt_tokens: int, answer_budget: int | None, can_drop: bool) -> str:
    limits = f"{max_prompt_tokens} prompt tokens"
    if answer_budget is not None:
        limits += f" and {answer_budget} answer tokens"
    more = ", …" if report.count > len(report.first) else ""
    cure = "leave them out with --overlong-prompts drop, or allow for more" if can_drop else "allow for more"
    return f"{report.count} of {report.total} examples exceed {limits}: {', '.join(report.first)}{more}; {cure}"
