"""Which jobs make up which part."""

from pathlib import Path

from examples.study import enumeration, noise, policy_runs, sigmoid, warm
from examples.study.pool import Job

PARTS = {
    "a": "escape time of the sigmoid model",
    "b": "a tiny policy from a cold start",
    "c": "label noise",
    "d": "bias and variance of the estimators, by enumeration",
    "e": "warm start",
    "f": "the optimizer's part in the stall",
    "g": "float32's part in the stall",
}


def jobs_of_part(part: str, out: Path) -> list[Job]:
    """In the order in which they are run. KeyError: no such part."""
    return {
        "a": lambda: [_escape(q) for q in sigmoid.QS],
        "b": lambda: policy_runs.jobs_of("b", policy_runs.cold_start_runs(), out, seconds=19),
        "c": lambda: [_two_labels(), *policy_runs.jobs_of("c", noise.noise_runs(), out, seconds=18)],
        "d": lambda: [*(_bias(q) for q in enumeration.QS), *(_variance(q) for q in enumeration.VARIANCE_QS)],
        "e": lambda: policy_runs.jobs_of("e", warm.warm_start_runs(), out, seconds=20),
        "f": lambda: policy_runs.jobs_of("f", policy_runs.optimizer_runs(), out, seconds=13),
        "g": lambda: policy_runs.jobs_of("g", policy_runs.loss_scale_runs(), out, seconds=11),
    }[part]()


def _escape(q: float) -> Job:
    spec = {"q": q, "far": list(sigmoid.FAR), "near": list(sigmoid.NEAR), "delta": sigmoid.DELTA}
    return Job("a", f"escape-q{q:g}", lambda _: sigmoid.escape_table((q,)), spec, seconds=12)


def _two_labels() -> Job:
    spec = {"qs": list(policy_runs.QS), "epsilons": list(noise.EPSILONS)}
    return Job("c", "two-labels", noise.two_label_table, spec, seconds=2)


def _bias(q: float) -> Job:
    spec = {"q": q, "powers": list(enumeration.POWERS), "successes": enumeration.SUCCESSES}
    return Job("d", f"bias-q{q:g}", lambda _: enumeration.bias_table((q,)), spec, seconds=8)


def _variance(q: float) -> Job:
    spec = {"q": q, "successes": list(enumeration.VARIANCE_SUCCESSES)}
    return Job("d", f"variance-q{q:g}", lambda _: enumeration.variance_table((q,)), spec, seconds=1)
