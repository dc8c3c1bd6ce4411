"""Parts b, c, e, f: runs of the real program, `megatron-jq train` and then `evaluate`, as jobs of the pool."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import megatron_jq.train.trainer  # noqa: F401  (before any job is forked, so that none pays for it)
from examples.study.pool import Job
from examples.study.tasks import write_task
from megatron_jq.cli.main import main
from megatron_jq.evaluate.judging import Judge, Metric, judge_prompt, log_p_of_prompts
from megatron_jq.evaluate.run import SAMPLES
from megatron_jq.evaluate.samples import read_samples
from megatron_jq.report import read_run

SETTINGS = Path(__file__).with_name("policy.toml")
SEEDS = (1, 2, 3)
QS = (0.0, 0.25, 0.5, 0.75, 1.0)
#: Curves that are kept of metrics.jsonl, a value a step.
CURVES = ("log_p_mean", "p_mean", "effective_reward_max", "grad_norm")
EVALUATED = ("eval_exact_match", "eval_pass_at_k", "eval_maj_at_k")
HELDOUT_EXAMPLES = 48
NUM_SAMPLES = 16


@dataclass(frozen=True)
class PolicyRun:
    """One training run and the evaluations after it. flags: train's, on top of policy.toml. warm: name of the run of
    this part whose weights it begins from. flipped: evaluate also on the training items whose label is wrong.
    """

    name: str
    task: str
    seed: int
    flags: tuple[str, ...]
    noise: float = 0.0
    warm: str | None = None
    keep_weights: bool = False
    evaluated: bool = True
    flipped: bool = False


def method_flags(method: str) -> tuple[str, ...]:
    """ "garl-0.75" or "grpo" → train's flags."""
    name, _, q = method.partition("-")
    return ("--estimator", name) + (("--q", q) if q else ())


def jobs_of(part: str, runs: Sequence[PolicyRun], out: Path, *, seconds: float) -> list[Job]:
    """A job a run; weights that other runs begin from are kept in out/part/weights."""
    settings = SETTINGS.read_text(encoding="utf-8")
    return [
        Job(
            part,
            run.name,
            lambda work, run=run: train_and_evaluate(run, work, out / part / "weights"),
            {**asdict(run), "settings": settings},
            after=() if run.warm is None else (run.warm,),
            seconds=seconds,
        )
        for run in runs
    ]


def train_and_evaluate(run: PolicyRun, work: Path, weights: Path) -> dict[str, Any]:
    """Curves of the training run, and the figures of each evaluation prompt by prompt. RuntimeError where one stops."""
    data = work / "data"
    write_task(data, run.task, noise=run.noise, seed=run.seed)
    argv = ["train", "--config", str(SETTINGS), "--seed", str(run.seed), "--run-dir", str(work / "run")]
    argv += ["--train-data", str(data / "train.jsonl"), "--eval-data", str(data / "heldout.jsonl")]
    argv += ["--tokenizer-model", str(data / "tokenizer.model"), *run.flags]
    if run.warm is not None:
        argv += ["--load", str(weights / run.warm), "--finetune"]
    _command(argv)
    rows = read_run(work / "run").rows
    value: dict[str, Any] = {key: [_short(row[key]) for row in rows] for key in CURVES}
    evaluated = [row for row in rows if row[EVALUATED[0]] is not None]
    value["eval_step"] = [row["step"] + 1 for row in evaluated]
    value |= {key: [_short(row[key]) for row in evaluated] for key in EVALUATED}
    if run.evaluated:
        value["heldout"] = evaluate(work, "heldout")
    if run.flipped:
        value["flipped"] = evaluate(work, "flipped")
    if run.keep_weights:
        shutil.rmtree(weights / run.name, ignore_errors=True)
        weights.mkdir(exist_ok=True)
        shutil.move(work / "run" / "checkpoints", weights / run.name)
    return value


def evaluate(work: Path, split: str) -> dict[str, list]:
    """`megatron-jq evaluate` on one file of the run's data: a value a prompt, from 16 samples at temperature 1.

    right, other: share of samples that are the gold answer, or the sampled answer's most frequent rival.
    """
    output = work / f"evaluation-{split}"
    _command(
        ["evaluate", "--load", str(work / "run" / "checkpoints"), "--output", str(output)]
        + ["--eval-data", str(work / "data" / f"{split}.jsonl"), "--eval-examples", str(HELDOUT_EXAMPLES)]
        + ["--eval-samples", str(NUM_SAMPLES), "--eval-temperature", "1", "--device", "cpu"]
    )
    _, prompts = read_samples(output / SAMPLES)
    judged = [judge_prompt([sample.drawn for sample in samples], samples[0].golds, Judge()) for samples in prompts]
    return {
        "answers": [[sample.answer for sample in samples] for samples in prompts],
        "golds": [samples[0].golds[0] for samples in prompts],
        "pass_at_1": [prompt.value(Metric("pass", 1)) for prompt in judged],
        "pass_at_16": [prompt.value(Metric("pass", NUM_SAMPLES)) for prompt in judged],
        "maj_at_16": [prompt.value(Metric("maj", NUM_SAMPLES)) for prompt in judged],
        "log_p": log_p_of_prompts([[sample.log_w for sample in samples] for samples in prompts]),
    }


def _command(argv: list[str]) -> None:
    code = main(argv)
    if code:
        raise RuntimeError(f"megatron-jq ended with {code}: {' '.join(argv)}")


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


# --- which runs -------------------------------------------------------------------------------------------------------

METHODS = (*(f"garl-{q:g}" for q in QS), "grpo")
OPTIMIZERS = {
    "adam-1e-8": (),
    "adam-1e-15": ("--adam-eps", "1e-15"),
    "adam-1e-30": ("--adam-eps", "1e-30"),
    "adam-1e-30-slow": ("--adam-eps", "1e-30", "--lr", "1e-3"),
    "sgd": ("--optimizer", "sgd", "--lr", "0.5"),
}


def cold_start_runs() -> list[PolicyRun]:
    """Part b: the task `paint` from random weights, ln P near -26, Adam with its default epsilon."""
    return [
        PolicyRun(f"{method}-seed{seed}", "paint", seed, method_flags(method)) for seed in SEEDS for method in METHODS
    ]


#: Part g: what a start below float32's reach is trained with, Adam each time.
BELOW_FLOAT32 = {
    "epsilon 1e-8": (),
    "epsilon 1e-15": ("--adam-eps", "1e-15"),
    "epsilon 1e-20": ("--adam-eps", "1e-20"),
    "epsilon 1e-8, loss scale": ("--loss-scale", "auto"),
}
BELOW_ITERS = 120


def loss_scale_runs() -> list[PolicyRun]:
    """Part g: the grid of b with --loss-scale auto, and a start at three times its ln P, one seed."""
    near = [
        PolicyRun(f"near-{m}-seed{seed}", "paint", seed, (*method_flags(m), "--loss-scale", "auto"), evaluated=False)
        for seed in SEEDS
        for m in METHODS
        if m != "grpo"
    ]
    slow = ("--lr", "1e-3", "--train-iters", str(BELOW_ITERS), "--eval-interval", "0")
    far = [
        PolicyRun(f"far-{name}-{m}-seed1", "repaint", 1, (*method_flags(m), *slow, *flags), evaluated=False)
        for m in METHODS
        if m != "grpo"
        for name, flags in BELOW_FLOAT32.items()
    ]
    return [*far, *near]


def optimizer_runs() -> list[PolicyRun]:
    """Part f: the grid of b with other optimizers (its first column is b itself)."""
    return [
        PolicyRun(f"{name}-{method}-seed{seed}", "paint", seed, (*method_flags(method), *flags), evaluated=False)
        for seed in SEEDS
        for name, flags in OPTIMIZERS.items()
        if name != "adam-1e-8"
        for method in METHODS
    ]
