"""F4: one sample of `megatron-jq generate` as people and scripts read it."""

import sys
from dataclasses import asdict, dataclass
from typing import Any

from megatron_jq.data.tokenizers import Tokenizer
from megatron_jq.evaluate.drawing import answer_of
from megatron_jq.evaluate.samples import Sample
from megatron_jq.records import Example, Rollout
from megatron_jq.rollout.engine import SamplingOptions
from megatron_jq.rollout.rationale_row import RationaleRow


@dataclass(frozen=True)
class GeneratedSample:
    """One rationale and answer. closed_by: "policy", "end of text" or "budget". log_w: ln p(y*|x,z) in nats, and
    matched: whether the answer is right; None without a gold answer.
    """

    prompt: int
    sample: int
    rationale: str
    rationale_tokens: int
    closed_by: str
    answer: str
    answer_tokens: int
    ended: bool
    log_w: float | None
    matched: bool | None


def generated(
    rollout: Rollout, sample: Sample | None, tokenizer: Tokenizer, options: SamplingOptions
) -> GeneratedSample:
    """sample: the same with its score, where there is a gold answer."""
    sampled, answer = rollout.rationale_ids[: rollout.num_sampled], answer_of(rollout.answer_ids, tokenizer)
    ended_its_text = rollout.forced and bool(sampled) and sampled[-1] == options.eos_id
    return GeneratedSample(
        prompt=rollout.prompt_slot,
        sample=rollout.rationale_slot,
        rationale=tokenizer.decode(list(sampled)),
        rationale_tokens=rollout.num_sampled,
        closed_by="policy" if not rollout.forced else "end of text" if ended_its_text else "budget",
        answer=answer.text,
        answer_tokens=len(rollout.answer_ids),
        ended=answer.ended,
        log_w=None if sample is None else sample.log_w,
        matched=None if sample is None else sample.matched,
    )


def line_of(sample: GeneratedSample, example: Example, log_p: float | None) -> dict[str, Any]:
    """A line of --json. log_p: ln P̂ of the prompt, over its samples."""
    table = {**asdict(sample), "text": example.prompt_text}
    scores = {"gold": example.answer_text, "log_p": log_p}
    return table | scores if log_p is not None else {k: v for k, v in table.items() if k not in ("log_w", "matched")}


def text_of_sample(sample: GeneratedSample) -> str:
    """The lines of one sample."""
    lines = [f"rationale: {sample.rationale}", _closing(sample.closed_by, sample.rationale_tokens)]
    return "\n".join([*lines, f"answer: {sample.answer}", *_ending(sample)])


def _closing(closed_by: str, tokens: int) -> str:
    reason = {
        "policy": "closed by the policy itself",
        "end of text": "closed by force: the policy ended its text",
        "budget": "closed by force: the rationale budget is spent",
    }[closed_by]
    return f"  [{reason}, after {tokens} token(s)]"


def _ending(sample: GeneratedSample) -> list[str]:
    ended = "ended" if sample.ended else "cut off by the answer budget"
    lines = [f"  [{ended}, after {sample.answer_tokens} token(s)]"]
    if sample.log_w is not None:
        lines.append(f"  ln p(y*|x,z) {sample.log_w:.4f}, {'right' if sample.matched else 'wrong'}")
    return lines


class TokenStream:
    """Prints one sample as it is drawn: what MegatronEngine calls with every token."""

    def __init__(self, tokenizer: Tokenizer, options: SamplingOptions):
        self._tokenizer, self._options = tokenizer, options
        self._written = ""

    def begin(self, sample: int | None) -> None:
        """sample: its number, where there are several."""
        self._write(("" if sample is None else f"sample {sample + 1}\n") + "rationale: ")
        self._written = ""

    def __call__(self, row: RationaleRow) -> None:
        if row.answer:
            self._grow(answer_of(row.answer, self._tokenizer).text)
            return
        self._grow(self._tokenizer.decode(row.rationale[: row.num_sampled]))
        if row.in_answer:
            closed = generated(row.rollout(), None, self._tokenizer, self._options)
            self._rest(closed.rationale)
            self._write(f"\n{_closing(closed.closed_by, closed.rationale_tokens)}\nanswer: ")
            self._written = ""

    def end(self, sample: GeneratedSample) -> None:
        self._rest(sample.answer)
        self._write("\n" + "\n".join(_ending(sample)) + "\n")

    def _grow(self, text: str) -> None:
        """Write what is new of a text. The end of a character's bytes may still come: it waits."""
        if not text.endswith("\ufffd"):
            self._rest(text)

    def _rest(self, text: str) -> None:
        if text.startswith(self._written):
            self._write(text[len(self._written) :])
        else:  # a decoder that changes what stands before
            self._write(f"\n  [again] {text}")
        self._written = text

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
