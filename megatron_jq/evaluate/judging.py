"""F4: from sampled answers to figures: which are right, pass@k, maj@k, ln P̂, and how sure they are. No model."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_jq.config import TrainingConfig
from megatron_jq.data.answers import AcceptedAnswers, rule_of
from megatron_jq.data.extraction import extract
from megatron_jq.errors import UserError
from megatron_jq.evaluate.math_judge import PROCESS, MathAnswers
from megatron_jq.formats.table import format_named
from megatron_jq.objective.metrics import bootstrap_interval, majority_at_k, pass_at_k
from megatron_jq.objective.tsallis import log_mean_weight
from megatron_jq.toml_files import did_you_mean


@dataclass(frozen=True)
class Answer:
    """A sampled answer's text. ended: it came to its end by itself. A control token inside reads as U+FFFD. reward: by
    the user's own function, where there is one.
    """

    text: str
    ended: bool
    reward: float | None = None


@dataclass(frozen=True)
class Vote:
    """What an answer is counted as. counts: it may be right at all."""

    key: str
    counts: bool


@dataclass(frozen=True)
class Judge:
    """How answers are compared, on texts normalised by a rule of data/answers.py.

    match: "exact", "substring", "math" (math_judge.py) or "reward" (the user's function gave 1). extract: which part of
    a sampled text is judged (data/extraction.py).

    Under exact and math match an answer that was cut off is wrong. Under substring match, the paper's, its text counts,
    and of a reward the function knows.
    """

    match: str = "exact"
    rule: str = "none"
    extract: str = "none"
    ratios: bool = False  # the data's golds write a percentage as a fraction (FinQA)

    def accepted(self, golds: Sequence[str]) -> AcceptedAnswers | MathAnswers:
        if self.match == "math":
            return MathAnswers(golds, PROCESS, ratios=self.ratios)
        match = "substring" if self.match == "substring" else "exact"
        return AcceptedAnswers(golds, match, self.rule, ratios=self.ratios)

    def vote(self, answer: Answer, accepted: AcceptedAnswers | MathAnswers) -> Vote:
        key = accepted.key(extract(answer.text, self.extract))
        return Vote(key, answer.ended or self.match in ("substring", "reward"))

    def is_right(self, answer: Answer, golds: Sequence[str]) -> bool:
        return judge_prompt([answer], golds, self).right[0]


def judge_of(settings: TrainingConfig, data_format: str) -> Judge:
    """The judge that the settings name, for data of a format. Under math match numbers are compared by rule number."""
    rule = "number" if settings.match == "math" else rule_of(settings.match_rule, data_format)
    return Judge(settings.match, rule, settings.answer_extract, format_named(data_format).ratios)


@dataclass(frozen=True)
class Metric:
    """ "pass" or "maj" at k samples."""

    kind: str
    k: int

    def __str__(self) -> str:
        return f"{self.kind}@{self.k}"


def read_metrics(names: str | None, num_samples: int) -> tuple[Metric, ...]:
    """ "pass@1,maj@16" → metrics. None: pass@1, and pass@n and maj@n where n > 1. UserError: unknown, or k > n."""
    if names is None:
        many = (Metric("pass", num_samples), Metric("maj", num_samples)) if num_samples > 1 else ()
        return (Metric("pass", 1), *many)
    metrics = []
    for name in names.split(","):
        match = re.fullmatch(r"(pass|maj)@(\d{1,9})", name.strip())
        if match is None:
            known = [f"{kind}@{k}" for kind in ("pass", "maj") for k in sorted({1, num_samples})]
            hint = did_you_mean(name.strip(), known, "there are pass@K and maj@K, with K a number")
            raise UserError(f"--metrics {name.strip()!r} is not known; {hint}")
        metric = Metric(match[1], int(match[2]))
        if not 1 <= metric.k <= num_samples:
            raise UserError(
                f"--metrics {metric}: K must lie between 1 and the {num_samples} sample(s) per prompt (--eval-samples)"
            )
        metrics.append(metric)
    return tuple(dict.fromkeys(metrics))


@dataclass(frozen=True)
class Judged:
    """One prompt's votes in the order they were drawn, and which are right.

    Votes that are equal are right together; only under a reward, which may read more than the answer's text, need they
    not be: there the first of them speaks for all.
    """

    votes: tuple[Vote, ...]
    right: tuple[bool, ...]

    def value(self, metric: Metric) -> float:
        """pass@k over all samples (unbiased), or maj@k of the first k; a tie goes to the answer drawn first."""
        if metric.kind == "pass":
            return pass_at_k(len(self.right), sum(self.right), metric.k)
        right: dict[Vote, bool] = {}
        for vote, is_right in zip(self.votes, self.right, strict=True):
            right.setdefault(vote, is_right)
        return float(majority_at_k(self.votes, right, metric.k, is_correct=lambda vote, right: right[vote]))


def judge_prompt(answers: Sequence[Answer], golds: Sequence[str], judge: Judge) -> Judged:
    """golds: y* first, then aliases."""
    accepted = judge.accepted(golds)
    votes = tuple(judge.vote(answer, accepted) for answer in answers)
    if judge.match == "reward":
        if any(answer.reward is None for answer in answers):
            raise UserError("--match reward: these samples have no rewards; evaluate with --reward MODULE:FUNCTION")
        return Judged(votes, tuple(answer.reward == 1 for answer in answers))
    return Judged(votes, tuple(vote.counts and accepted.accepts(vote.key) for vote in votes))


@dataclass(frozen=True)
class Interval:
    """A percentile bootstrap over prompts, the same for the same seed."""

    resamples: int = 2000
    confidence: float = 0.95
    seed: int = 0

    def check(self) -> None:
        """UserError for values that no interval has."""
        if self.resamples < 1:
            raise UserError(f"--bootstrap-resamples must be at least 1, not {self.resamples}")
        if not 0 < self.confidence < 1:
            raise UserError(f"--confidence must lie between 0 and 1, not {self.confidence}")


@dataclass(frozen=True)
class Figure:
    """A mean over prompts and its interval."""

    value: float
    low: float
    high: float


def mean_over_prompts(values: Sequence[float], interval: Interval) -> Figure:
    values_B = torch.tensor(values, dtype=torch.float64)
    low, high = bootstrap_interval(
        values_B, resamples=interval.resamples, confidence=interval.confidence, seed=interval.seed
    )
    return Figure(values_B.mean().item(), low, high)


def log_p_of_prompts(log_w: Sequence[Sequence[float]]) -> list[float]:
    """ln P̂ = ln w̄ of each prompt, in nats."""
    return log_mean_weight(torch.tensor(log_w, dtype=torch.float64)).tolist()
