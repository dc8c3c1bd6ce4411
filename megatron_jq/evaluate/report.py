"""F4: an evaluation's results, from its samples: computed, shown as a table, written as evaluation.json."""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_jq.data.extraction import extract
from megatron_jq.data.reading import number_of
from megatron_jq.errors import UserError
from megatron_jq.evaluate.judging import (
    Figure,
    Interval,
    Judge,
    Metric,
    judge_prompt,
    log_p_of_prompts,
    mean_over_prompts,
    read_metrics,
)
from megatron_jq.evaluate.math_judge import DEADLINE, PROCESS
from megatron_jq.evaluate.official import scores
from megatron_jq.evaluate.samples import Header, Sample
from megatron_jq.formats.table import format_named

RESULTS = "evaluation.json"


@dataclass(frozen=True)
class Results:
    """Means over prompts with their intervals, and what they were taken from and judged by.

    log_p_mean: mean of ln P̂ = ln w̄ over n rationales, nats. Token counts are means over samples: of tokens sampled for
    the rationale, and of the answer with its terminator. forced_fraction: rationales closed by force.
    cut_off_fraction: answers that did not end within their budget. metrics: pass@k and maj@k; em and f1 of HotPotQA's
    and MuSiQue's own scripts (official.py) and the user's reward, means over samples.
    """

    evaluation: Header
    judge: Judge
    interval: Interval
    metrics: dict[str, Figure]
    log_p_mean: Figure
    rationale_tokens_mean: Figure
    answer_tokens_mean: Figure
    forced_fraction: Figure
    cut_off_fraction: Figure


def results_of(
    header: Header,
    prompts: Sequence[Sequence[Sample]],
    judge: Judge,
    metrics: Sequence[Metric],
    interval: Interval,
) -> Results:
    """The figures of all samples under a judge, which need not be the one that wrote them."""
    judged = [judge_prompt([sample.drawn for sample in samples], samples[0].golds, judge) for samples in prompts]

    def mean(value: Callable[[Sample], float]) -> Figure:
        return mean_over_prompts([sum(map(value, samples)) / len(samples) for samples in prompts], interval)

    figures = {str(m): mean_over_prompts([prompt.value(m) for prompt in judged], interval) for m in metrics}
    published = format_named(header.data_format).published
    if published is not None:
        official = {
            (s.prompt, s.sample): scores(extract(s.answer, judge.extract), s.golds, published)
            for samples in prompts
            for s in samples
        }
        figures["em"] = mean(lambda sample: official[sample.prompt, sample.sample][0])
        figures["f1"] = mean(lambda sample: official[sample.prompt, sample.sample][1])
    if all(sample.reward is not None for samples in prompts for sample in samples):
        figures["reward"] = mean(lambda sample: sample.reward)
    return Results(
        evaluation=header,
        judge=judge,
        interval=interval,
        metrics=figures,
        log_p_mean=mean_over_prompts(log_p_of_prompts([[s.log_w for s in samples] for samples in prompts]), interval),
        rationale_tokens_mean=mean(lambda sample: sample.num_sampled),
        answer_tokens_mean=mean(lambda sample: len(sample.answer_ids)),
        forced_fraction=mean(lambda sample: sample.forced),
        cut_off_fraction=mean(lambda sample: not sample.ended),
    )


def table(results: Results) -> str:
    """For a terminal."""
    header, judge = results.evaluation, results.judge
    prompts = number_of(header.num_prompts, header.num_available or 0)
    rule = "as it is" if judge.rule == "none" else f"normalised by rule {judge.rule}"
    extracted = "" if judge.extract == "none" else f", answer extracted by {judge.extract}"
    rows = [
        *results.metrics.items(),
        ("ln P̂", results.log_p_mean),
        ("rationale tokens", results.rationale_tokens_mean),
        ("answer tokens", results.answer_tokens_mean),
        ("closed by force", results.forced_fraction),
        ("answers cut off", results.cut_off_fraction),
    ]
    percent = f"{100 * results.interval.confidence:g} % interval"
    return "\n".join(
        [
            f"{header.source}, step {header.checkpoint_step}",
            f"{header.data_source}: {prompts} prompts x {header.num_samples} samples, "
            f"temperature {header.temperature:g}" + (f", top-p {header.top_p:g}" if header.top_p < 1 else ""),
            f"{judge.match} match, text {rule}{extracted}",
            f"{'':18} {'mean':>10}   {percent}",
            *(f"{name:18} {_number(f.value):>10}   {_number(f.low)} to {_number(f.high)}" for name, f in rows),
        ]
    )


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"


def write_results(
    header: Header,
    prompts: Sequence[Sequence[Sample]],
    judge: Judge,
    metrics: str | None,
    interval: Interval,
    output: Path | None,
) -> Results:
    """Compute the results, print them, and write them to `output` unless it is None. UserError: metrics, interval, or
    a folder that cannot be written.
    """
    interval.check()
    results = results_of(header, prompts, judge, read_metrics(metrics, header.num_samples), interval)
    print(table(results))
    if PROCESS.unanswered:
        print(
            f"warning: math-verify compared {PROCESS.unanswered} pair(s) for more than {DEADLINE:g} seconds or out of "
            "memory; they count as different"
        )
    if output is not None:
        make_folder(output)
        with _writing(output):  # under its name the file is whole
            text = json.dumps(asdict(results), indent=2, ensure_ascii=False)
            (output / f".{RESULTS}").write_text(text + "\n", encoding="utf-8")
            (output / f".{RESULTS}").replace(output / RESULTS)
    return results


def make_folder(output: Path) -> None:
    """UserError where it cannot be made, or written to."""
    with _writing(output):
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output) as scratch:
            scratch.write(b"x")


@contextlib.contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}; name a folder that can") from error
