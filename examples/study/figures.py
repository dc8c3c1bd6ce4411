"""From results to figures: steps until a level, intervals, means over seeds. No plots, no text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

LOG_HALF = math.log(0.5)
#: Steps over which a curve is averaged before it is compared with a level.
WINDOW = 5


@dataclass(frozen=True)
class Mean:
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float


def running_mean(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Of the last `window` values, or of as many as there are."""
    return [sum(values[max(0, i + 1 - window) : i + 1]) / len(values[max(0, i + 1 - window) : i + 1])
            for i in range(len(values))]  # fmt: skip


def first_step_at(values: Sequence[float], level: float) -> int | None:
    """Number of steps until the running mean is at the level or above; None: never."""
    return next((step for step, value in enumerate(running_mean(values)) if value >= level), None)


def escape_step(log_p: Sequence[float]) -> int | None:
    """Steps until mean ln P̂ has come half of its way from the start to 0."""
    return first_step_at(log_p, 0.5 * log_p[0])


def half_step(log_p: Sequence[float]) -> int | None:
    """Steps until the geometric mean of P̂ over a step's prompts is 1/2."""
    return first_step_at(log_p, LOG_HALF)


def interval_over_seeds(values: Sequence[Sequence[float]], *, resamples: int = 2000, seed: int = 0) -> Mean:
    """Mean over seeds and their prompts; bootstrap of seeds, and of prompts within each drawn seed.

    values: one list of per-prompt values a seed, equally long.
    """
    table = numpy.array(values, dtype=float)
    draw = numpy.random.default_rng(seed)
    seeds, prompts = table.shape
    rows = draw.integers(seeds, size=(resamples, seeds))
    columns = draw.integers(prompts, size=(resamples, seeds, prompts))
    means = table[rows[:, :, None], columns].mean(axis=(1, 2))
    low, high = numpy.quantile(means, (0.025, 0.975))
    return Mean(float(table.mean()), float(low), float(high))


def share_of_answer(answers: Sequence[Sequence[str]], wanted: Sequence[str]) -> list[float]:
    """Per prompt, the share of its samples that are the wanted text."""
    return [sum(a.strip() == w for a in samples) / len(samples) for samples, w in zip(answers, wanted, strict=True)]


def median_step(steps: Sequence[int | None]) -> float:
    """Median over seeds; infinite where at least half of them never get there."""
    return float(numpy.median([math.inf if step is None else step for step in steps]))
