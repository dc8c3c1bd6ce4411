"""The study's pictures, in the house's colours. Each function draws one file."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from examples.study.figures import running_mean
from examples.study.noise import escort
from megatron_jq.report import COLOURS

#: One colour a method, the same in every picture.
METHOD_COLOURS = {
    "garl-0": COLOURS[1],
    "garl-0.25": COLOURS[4],
    "garl-0.5": COLOURS[2],
    "garl-0.75": COLOURS[0],
    "garl-1": COLOURS[3],
    "grpo": COLOURS[6],
    "paft-0.25": COLOURS[4],
    "paft-0.75": COLOURS[0],
}
#: method → seed → result of policy_runs.
Runs = Mapping[str, Mapping[int, dict[str, Any]]]


def q_colour(q: float) -> str:
    return METHOD_COLOURS[f"garl-{q:g}"]


def label_of(method: str) -> str:
    name, _, q = method.partition("-")
    return f"{name.upper()} q={q}" if q else name.upper()


def plot_escape(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """ln T of flow (markers) and integral (lines) against p0."""
    figure, (left, right) = _figure(2)
    for row in rows:
        start = [-power for power in row["powers"]]
        left.plot(start, numpy.log10(row["integral"]), color=q_colour(row["q"]), label=f"q = {row['q']:g}")
        left.plot(start, numpy.log10(row["flow"]), "o", color=q_colour(row["q"]), markersize=3.5)
        right.plot(row["q"], row["slope_far"], "o", color=q_colour(row["q"]), markersize=8)
        right.plot(row["q"], row["slope_near"], "x", color=q_colour(row["q"]), markersize=8)
    right.plot([0, 1], [1, 0], color="0.4", linewidth=1, zorder=0)
    right.plot([], [], "o", color="0.3", label="p0 from 1e-60 to 1e-30")
    right.plot([], [], "x", color="0.3", label="p0 from 1e-12 to 1e-4")
    right.plot([], [], color="0.4", label="1 - q")
    _dress(left, "Time to P = 1/2: flow (dots), integral (lines)", "log10 of 1/p0", "log10 of T")
    _dress(right, "Slope of ln T against ln 1/p0", "q", "slope")
    left.legend(frameon=False)
    right.legend(frameon=False)
    figure.savefig(path)


def plot_cold_start(runs: Runs, path: Path) -> None:
    """ln P̂ and P̂ against the step."""
    figure, (left, right) = _figure(2)
    _draw_curves(left, runs, "log_p_mean")
    _draw_curves(right, runs, "p_mean")
    _dress(left, r"Mean over prompts of $\ln \hat{P}$", "step", "nats")
    _dress(right, r"Mean over prompts of $\hat{P}$", "step", "probability")
    _method_legend(figure, runs)
    figure.savefig(path)


def plot_optimizers(grids: Mapping[str, Runs], path: Path, *, floor: float = -62.0, columns: int = 3) -> None:
    """ln P̂ against the step, a panel an optimizer."""
    figure, axes = _figure(len(grids), columns=columns)
    for axis in axes[len(grids) :]:
        axis.set_axis_off()
    for axis, (title, runs) in zip(axes, grids.items(), strict=False):
        _draw_curves(axis, runs, "log_p_mean")
        _dress(axis, title, "step", r"mean $\ln \hat{P}$, nats")
        axis.set_ylim(floor, 1)
    _method_legend(figure, next(iter(grids.values())))
    figure.savefig(path)


def _draw_curves(axis: Axes, runs: Runs, key: str) -> None:
    """Each seed thin, their median thick; what lies below is the wider, so that coinciding curves stay visible."""
    for place, (method, seeds) in enumerate(runs.items()):
        curves = numpy.array([running_mean(value[key]) for value in seeds.values()])
        for curve in curves:
            axis.plot(curve, color=METHOD_COLOURS[method], linewidth=0.7, alpha=0.45)
        style = {"linestyle": (0, (4, 4)) if method == "grpo" else "-", "linewidth": 3.6 - 0.4 * place}
        axis.plot(numpy.median(curves, axis=0), color=METHOD_COLOURS[method], **style)


def plot_accuracy(panels: Mapping[str, Runs], key: str, ylabel: str, path: Path) -> None:
    """An evaluation's figure against the step, a panel a group of methods: seeds thin, their mean thick."""
    figure, axes = _figure(len(panels), columns=3)
    for axis, (title, runs) in zip(axes, panels.items(), strict=True):
        for method, seeds in runs.items():
            steps = next(iter(seeds.values()))["eval_step"]
            curves = numpy.array([value[key] for value in seeds.values()])
            for curve in curves:
                axis.plot(steps, curve, color=METHOD_COLOURS[method], linewidth=0.8, alpha=0.5)
            axis.plot(steps, curves.mean(axis=0), color=METHOD_COLOURS[method], linewidth=2.2, label=label_of(method))
        _dress(axis, title, "step", ylabel)
        axis.set_ylim(-0.03, 1.03)
        axis.legend(frameon=False, fontsize=8, loc="best")
    figure.savefig(path)


def plot_wrong_labels(shares: Mapping[float, Mapping[float, Sequence[float]]], path: Path) -> None:
    """Share of wrong held-out samples against q (dots: seeds), and the share of the theory's escort (lines)."""
    figure, (axis,) = _figure(1)
    line = numpy.linspace(0.0, 1.0, 201)
    for (eps, by_q), colour in zip(shares.items(), COLOURS, strict=False):
        axis.plot(line, [escort(eps, q) for q in line], color=colour, label=f"theory, {100 * eps:g} % flipped")
        for i, (q, values) in enumerate(by_q.items()):
            label = f"policy, {100 * eps:g} % flipped" if i == 0 else None
            axis.plot([q] * len(values), values, "o", color=colour, markersize=6, label=label, clip_on=False)
    _dress(axis, "Wrong answers on clean held-out items", "q", "share of samples")
    axis.legend(frameon=False)
    figure.savefig(path)


def plot_bias(exponents: Sequence[dict], scaling: Sequence[dict], path: Path) -> None:
    """M · bias against P, a panel a family with the exponents of both versions; relative bias against M."""
    figure, axes = _figure(3)
    for axis, family in zip(axes, ("rare", "hard"), strict=False):
        for row in (row for row in exponents if row["family"] == family):
            q, log_p = row["q"], row["powers"]
            log_bias = numpy.log10(row["scaled"])
            axis.plot(log_p, log_bias, "o-", color=q_colour(q), markersize=3.5, label=f"q = {q:g}")
            for power, dashes in ((-(q + 1.0), ":"), (-q, "--")):
                axis.plot(log_p, log_bias[0] + power * (numpy.array(log_p) - log_p[0]), dashes, color=q_colour(q),
                          linewidth=0.9)  # fmt: skip
        axis.plot([], [], ":", color="0.3", label="v1: P^-(q+1)")
        axis.plot([], [], "--", color="0.3", label="v2: P^-q")
        axis.invert_xaxis()
        _dress(axis, f"M x bias, family {family}", "log10 of P", "log10 of M x bias")
        axis.legend(frameon=False, fontsize=8)
    for row in (row for row in scaling if row["family"] == "rare"):
        axes[2].loglog(row["num_rationales"], row["relative_bias"], "o-", color=q_colour(row["q"]), markersize=3.5)
    axes[2].axvline(1e3, color="0.6", linewidth=0.8)
    axes[2].text(0.58, 0.93, "M P = 1", color="0.4", fontsize=8, transform=axes[2].transAxes)
    _dress(axes[2], "Relative bias against M, rare, P = 0.001", "M", "|bias| / |gradient|")
    figure.savefig(path)


def plot_variance(rows: Sequence[dict], num_rationales: int, path: Path) -> None:
    """Variance of PAFT over GARL's against P, a panel a family."""
    figure, axes = _figure(2)
    for axis, family in zip(axes, ("rare", "hard"), strict=True):
        for row in (row for row in rows if row["family"] == family):
            axis.semilogx(row["successes"], row["ratio"], "o-", color=q_colour(row["q"]), markersize=3.5,
                          label=f"q = {row['q']:g}")  # fmt: skip
        axis.axhline(1, color="0.6", linewidth=0.8)
        axis.invert_xaxis()
        _dress(axis, f"Variance of PAFT / GARL, {family}, M = K = {num_rationales}", "P", "ratio")
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _figure(panels: int, *, columns: int | None = None) -> tuple[Figure, list[Axes]]:
    columns = columns or panels
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(max(6.2, 4.7 * columns), 3.9 * rows), dpi=110, layout="constrained")
    return figure, list(numpy.atleast_1d(figure.subplots(rows, columns)).flat)


def _method_legend(figure: Figure, runs: Runs) -> None:
    handles = [
        Line2D(
            [], [], color=METHOD_COLOURS[m], linestyle="--" if m == "grpo" else "-", linewidth=2.2, label=label_of(m)
        )
        for m in runs
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def _dress(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=10.5, loc="left")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
