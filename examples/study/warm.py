"""Part e: a short supervised fine-tuning on given rationales, then GARL, PAFT and GRPO from its weights."""

from examples.study.policy_runs import SEEDS, PolicyRun, method_flags

METHODS = ("garl-0.25", "garl-0.75", "paft-0.25", "paft-0.75", "grpo")
#: Suffix of a run's name → learning rate: policy.toml's own, and a fifth of it.
RATES = {"": 5e-3, "-slow": 1e-3}
SFT_ITERS, TRAIN_ITERS = 40, 240
#: Validation has collapsed where, after a peak of at least this accuracy, it ends below a tenth of the peak.
LEAST_PEAK = 0.1


def warm_start_runs() -> list[PolicyRun]:
    """The task `paint`: a warm policy a seed, and from it every method, at both rates, with an optimizer of its own."""
    sft = ("--estimator", "sft", "--rationale-field", "rationale", "--train-iters", str(SFT_ITERS))
    runs = [PolicyRun(f"sft-seed{seed}", "paint", seed, sft, keep_weights=True) for seed in SEEDS]
    for seed in SEEDS:
        for suffix, rate in RATES.items():
            for method in METHODS:
                flags = (*method_flags(method), "--train-iters", str(TRAIN_ITERS), "--eval-interval", "20")
                flags += ("--lr", f"{rate:g}") if suffix else ()
                runs.append(PolicyRun(f"{method}{suffix}-seed{seed}", "paint", seed, flags, warm=f"sft-seed{seed}"))
    return runs


def has_collapsed(accuracy: list[float]) -> bool:
    """Of the validation accuracies over training, in order."""
    peak = max(accuracy)
    return peak >= LEAST_PEAK and accuracy[-1] < 0.1 * peak
