"""The report's parts: each function draws its pictures into `folder` and returns its tables, from the results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.study import noise, plots
from examples.study.figures import (
    Mean,
    escape_step,
    half_step,
    interval_over_seeds,
    median_step,
    share_of_answer,
)
from examples.study.policy_runs import BELOW_FLOAT32, BELOW_ITERS, METHODS, OPTIMIZERS, QS, SEEDS
from examples.study.tasks import items
from examples.study.warm import METHODS as WARM_METHODS
from examples.study.warm import RATES, has_collapsed

#: Job name → what it returned.
Values = Mapping[str, dict[str, Any]]
#: Evaluations at the end of a noisy run over which its accuracy is averaged, since it moves around its equilibrium.
LATE = 6


def escape(values: Values, folder: Path) -> list[str]:
    rows = [value["rows"][0] for value in values.values()]
    plots.plot_escape(rows, folder / "escape.png")
    table = []
    for row in rows:
        q, far, near = row["q"], row["slope_far"], row["slope_near"]
        error = f"{row['worst_relative_error']:.0e}"
        table.append((f"{q:g}", f"{1 - q:g}", f"{far:.4f}", f"{abs(far - 1 + q):.4f}", f"{near:.4f}", error))
    return [
        *_table(
            ("q", "1 - q", "slope, p0 1e-60 to 1e-30", "off by", "slope, p0 1e-12 to 1e-4", "flow / integral - 1"),
            table,
        ),
        "",
        "![Escape times and their slopes](escape.png)",
    ]


def cold_start(values: Values, folder: Path) -> list[str]:
    runs = _by_method(values, METHODS)
    plots.plot_cold_start(runs, folder / "cold_start.png")
    table = [(plots.label_of(method), *_training_cells(seeds), *_final_cells(seeds)) for method, seeds in runs.items()]
    return [
        *_table(
            ("method", "steps to half of ln P̂", "steps to P̂ = 1/2", "ln P̂ at the end", "p@1", "pass@16", "maj@16"),
            table,
        ),
        "",
        _STEPS,
        "",
        "![ln P against the step](cold_start.png)",
    ]


_FINAL = (
    "Final figures are of 48 held-out prompts with 16 samples each at temperature 1, exact match; [95 % interval]: "
    "bootstrap over seeds, and over prompts within seeds."
)
_STEPS = (
    "Steps are given seed by seed (-: not within the run), by the running mean of 5 steps over the mean of ln P̂ of a "
    f"step's prompts. {_FINAL}"
)


def label_noise(values: Values, folder: Path) -> list[str]:
    panels, table, dots = {}, [], {}
    for eps in noise.NOISE:
        runs = {f"garl-{q:g}": {s: values[f"noise{eps:g}-q{q:g}-seed{s}"] for s in noise.SEEDS} for q in QS}
        panels[f"{100 * eps:g} % of labels flipped"] = runs
        for q, seeds in zip(QS, runs.values(), strict=True):
            late = [sum(value["eval_exact_match"][-LATE:]) / LATE for value in seeds.values()]
            wrong = _cell(interval_over_seeds([_wrong_shares(value) for value in seeds.values()]))
            memorised = _interval([value["flipped"]["pass_at_1"] for value in seeds.values()]) if eps else "-"
            row = (f"{100 * eps:g} %", f"{q:g}", f"{sum(late) / len(late):.3f}", f"{1 - noise.escort(eps, q):.3f}")
            table.append((*row, _final_cells(seeds)[1], wrong, f"{noise.escort(eps, q):.3f}", memorised))
            if eps > 0:
                dots.setdefault(eps, {})[q] = [1.0 - accuracy for accuracy in late]
    plots.plot_accuracy(panels, "eval_exact_match", "clean accuracy, held out", folder / "noise_accuracy.png")
    plots.plot_wrong_labels(dots, folder / "noise_equilibrium.png")
    return [
        "From a policy trained on clean labels, then on noisy ones:",
        "",
        *_table(
            (
                "flipped",
                "q",
                f"clean accuracy, last {LATE} evaluations",
                "theory",
                "clean p@1 at the end",
                "wrong label at the end",
                "theory",
                "wrong label, flipped training items",
            ),
            table,
        ),
        "",
        "![Clean accuracy against the step](noise_accuracy.png)",
        "",
        "![Share of wrong labels against q](noise_equilibrium.png)",
        "",
        *_from_scratch(values),
        "",
        *_two_labels(values["two-labels"]),
    ]


def _wrong_shares(value: dict[str, Any]) -> list[float]:
    """Per held-out prompt, the share of samples with the label that flipped items carry."""
    other = {item.answer: item.other for item in items("colour")[1]}
    held = value["heldout"]
    return share_of_answer(held["answers"], [other[gold] for gold in held["golds"]])


def _from_scratch(values: Values) -> list[str]:
    eps, table = noise.NOISE[-1], []
    for q in QS:
        seeds = {seed: values[f"scratch-noise{eps:g}-q{q:g}-seed{seed}"] for seed in noise.SEEDS}
        wrong = interval_over_seeds([_wrong_shares(value) for value in seeds.values()])
        table.append((f"{q:g}", *_training_cells(seeds)[:1], _final_cells(seeds)[1], _cell(wrong)))
    return [
        f"From random weights, {100 * eps:g} % of labels flipped from the first step on:",
        "",
        *_table(("q", "steps to half of ln P̂", "clean p@1", "wrong label, held out"), table),
    ]


def _two_labels(value: dict[str, Any]) -> list[str]:
    eps = sorted({row["eps"] for row in value["rows"]}, reverse=True)
    table = []
    for q in QS[1:]:
        rows = {row["eps"]: row for row in value["rows"] if row["q"] == q}
        table.append((f"{q:g}", *(f"{rows[e]['minimum']:.3g} / {rows[e]['limit']:.3g}" for e in eps)))
    return [
        "The two-label model: P(wrong label) at the minimum of the package's loss / (eps/(1-eps))^(1/q), eq. (17). The "
        f"minimum is the escort distribution to a relative {value['worst_log_error']:.0e}.",
        "",
        *_table(("q", *(f"eps = {e:g}" for e in eps)), table),
    ]


def estimators(values: Values, folder: Path) -> list[str]:
    bias = [value for name, value in values.items() if name.startswith("bias")]
    exponents = [row for value in bias for row in value["exponents"]]
    scaling = [row for value in bias for row in value["scaling"]]
    variance = [row for name, value in values.items() if name.startswith("variance") for row in value["rows"]]
    num = values["variance-q0"]["num_rationales"]
    plots.plot_bias(exponents, scaling, folder / "bias.png")
    plots.plot_variance(variance, num, folder / "variance.png")
    in_m = {(row["family"], row["q"]): row["exponent"] for row in scaling}
    table = [
        (f"{row['q']:g}", row["family"], f"{row['exponent']:.3f}", f"{-row['q'] - 1:g}", f"{-row['q']:g}",
         f"{1 - row['q']:g}", f"{in_m[row['family'], row['q']]:.3f}")
        for row in exponents
    ]  # fmt: skip
    ratios = [
        (f"{row['q']:g}", row["family"], *(f"{ratio:.2f}" for ratio in row["ratio"]), f"{row['garl_noise'][0]:.2g}",
         f"{row['garl_noise'][-1]:.2g}")
        for row in variance
    ]  # fmt: skip
    successes = [f"P = {p:g}" for p in variance[0]["successes"]]
    return [
        *_table(("q", "family", "exponent of P", "v1: -(q+1)", "v2: -q", "1-q", "exponent of M"), table),
        "",
        "![Bias against P and M](bias.png)",
        "",
        f"Variance of PAFT over GARL's, M = K = {num}; and GARL's standard deviation over the gradient's length at the "
        "largest and the smallest P:",
        "",
        *_table(("q", "family", *successes, "noise, first P", "noise, last P"), ratios),
        "",
        "![Variance ratio against P](variance.png)",
    ]


def warm_start(values: Values, folder: Path) -> list[str]:
    warm = {seed: values[f"sft-seed{seed}"] for seed in SEEDS}
    table, panels = [("the SFT policy", "", "", "", *_final_cells(warm))], {}
    for suffix, rate in RATES.items():
        runs = {
            m: {seed: _behind(warm[seed], values[f"{m}{suffix}-seed{seed}"]) for seed in SEEDS} for m in WARM_METHODS
        }
        for name in ("garl", "paft", "grpo"):
            panels[f"{name.upper()}, rate {rate:g}"] = {m: runs[m] for m in WARM_METHODS if m.startswith(name)}
        for method, seeds in runs.items():
            curves = [value["eval_maj_at_k"] for value in seeds.values()]
            peaks = ", ".join(f"{max(curve):.2f}" for curve in curves)
            collapsed = f"{sum(map(has_collapsed, curves))} of {len(curves)}"
            table.append((plots.label_of(method), f"{rate:g}", peaks, collapsed, *_final_cells(seeds)))
    plots.plot_accuracy(panels, "eval_maj_at_k", "maj@16, held out", folder / "warm_start.png")
    return [
        *_table(("method", "rate", "peak maj@16", "collapsed", "ln P̂ at the end", "p@1", "pass@16", "maj@16"), table),
        "",
        "Collapsed: the last validation maj@16 is below a tenth of a peak of at least 0.1, the SFT policy's own "
        f"included. Peaks are seed by seed. {_FINAL}",
        "",
        "![Validation against the step](warm_start.png)",
    ]


def _behind(warm: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    """A run's result with its warm policy's maj@16 as the point at step 0."""
    begin = warm["heldout"]["maj_at_16"]
    curve = [sum(begin) / len(begin), *value["eval_maj_at_k"]]
    return {**value, "eval_step": [0, *value["eval_step"]], "eval_maj_at_k": curve}


def optimizers(values: Values, folder: Path) -> list[str]:
    grids = {}
    for name in OPTIMIZERS:
        prefix = "" if name == "adam-1e-8" else f"{name}-"
        grids[name] = {m: {s: values[f"{prefix}{m}-seed{s}"] for s in SEEDS} for m in METHODS}
    titles = {"sgd": "SGD with momentum 0.9, rate 0.5", "adam-1e-30-slow": "Adam, epsilon 1e-30, rate 1e-3"}
    by_title = {titles.get(name, f"Adam, epsilon {name.removeprefix('adam-')}"): runs for name, runs in grids.items()}
    plots.plot_optimizers(by_title, folder / "optimizers.png")
    table = []
    for method in METHODS:
        cells = [plots.label_of(method)]
        for runs in grids.values():
            seeds = runs[method].values()
            half = median_step([escape_step(value["log_p_mean"]) for value in seeds])
            right = [value["eval_exact_match"][-1] for value in seeds]
            cells.append(f"{half:.0f} / {sum(right) / len(right):.2f}".replace("inf", "-"))
        table.append(tuple(cells))
    return [
        *_table(("method", *by_title), table),
        "",
        "Median over seeds of the steps to half of ln P̂ (-: most seeds never) / mean exact match at the end, on 16 "
        "held-out prompts x 16 samples.",
        "",
        "![ln P against the step under five optimizers](optimizers.png)",
    ]


def loss_scale(values: Values, folder: Path) -> list[str]:
    """The start of b with a loss scale, and the far one by epsilon, without and with it."""
    methods = [method for method in METHODS if method != "grpo"]
    near = {m: {s: values[f"near-{m}-seed{s}"] for s in SEEDS} for m in methods}
    far = {name: {m: {1: values[f"far-{name}-{m}-seed1"]} for m in methods} for name in BELOW_FLOAT32}
    panels = {f"Adam, {name}": runs for name, runs in far.items()}
    plots.plot_optimizers(panels, folder / "loss_scale.png", floor=-82.0, columns=2)
    first = sum(runs["garl-1"][1]["log_p_mean"][0] for runs in far.values()) / len(far)
    near_rows, far_rows = [], []
    for method in methods:
        seeds = near[method].values()
        half = median_step([escape_step(value["log_p_mean"]) for value in seeds])
        right = [value["eval_exact_match"][-1] for value in seeds]
        cell = f"{half:.0f} / {sum(right) / len(right):.2f}".replace("inf", "-")
        norm = near[method][SEEDS[0]]["grad_norm"][0]
        near_rows.append((plots.label_of(method), f"{norm:.1e}", cell))
        lasts = [runs[method][1]["log_p_mean"][-5:] for runs in far.values()]
        norm = far["epsilon 1e-8"][method][1]["grad_norm"][0]
        far_rows.append((plots.label_of(method), f"{norm:.1e}", *(f"{sum(last) / len(last):.1f}" for last in lasts)))
    return [
        "The start of b, ln P = -27, Adam with its default epsilon and `--loss-scale auto`:",
        "",
        *_table(("method", "first gradient", "steps to half of ln P̂ / exact match at the end"), near_rows),
        "",
        f"A start at ln P = {first:.0f} (b's answers three times over), rate 1e-3, one seed: ln P̂ after {BELOW_ITERS} "
        "steps",
        "",
        *_table(("method", "first gradient", *far), far_rows),
        "",
        "![ln P against the step from a start below float32](loss_scale.png)",
    ]


def _by_method(values: Values, methods: Sequence[str]) -> dict[str, dict[int, dict[str, Any]]]:
    return {method: {seed: values[f"{method}-seed{seed}"] for seed in SEEDS} for method in methods}


def _training_cells(seeds: Mapping[int, dict[str, Any]]) -> tuple[str, str]:
    """Steps to half of ln P̂ and to P̂ = 1/2, seed by seed."""
    curves = [value["log_p_mean"] for value in seeds.values()]
    return tuple(
        ", ".join("-" if (reached := step(curve)) is None else str(reached) for curve in curves)
        for step in (escape_step, half_step)
    )


def _final_cells(seeds: Mapping[int, dict[str, Any]]) -> tuple[str, str, str, str]:
    """ln P̂, p@1, pass@16, maj@16 on held-out prompts."""
    held = [value["heldout"] for value in seeds.values()]
    log_p = interval_over_seeds([figures["log_p"] for figures in held])
    return (
        f"{log_p.value:.2f}",
        *(_interval([figures[key] for figures in held]) for key in ("pass_at_1", "pass_at_16", "maj_at_16")),
    )


def _interval(values: Sequence[Sequence[float]]) -> str:
    return _cell(interval_over_seeds(values))


def _cell(mean: Mean) -> str:
    return f"{mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}]"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = "|---" + "|--:" * (len(header) - 1) + "|"
    return [f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]
