"""F4: finished or running runs, read from their folders: one picture and one table for several of them."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_jq.config import Config, load_toml
from megatron_jq.errors import UserError

matplotlib.use("Agg")  # no display is needed, nor wanted on a cluster


@dataclass(frozen=True)
class RunLog:
    """What one run folder holds. rows: the objects of metrics.jsonl in step order, one per step."""

    label: str
    rows: tuple[dict[str, Any], ...]
    config: Config | None  # None: the folder holds no config.toml
    truncated: bool  # the last line was cut short, by a crash or by a writer at work; it is left out

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one metric. Steps where it is null, absent or not finite are left out."""
        pairs = [(row["step"], row[key]) for row in self.rows if row.get(key) is not None and math.isfinite(row[key])]
        return [step for step, _ in pairs], [value for _, value in pairs]


def read_run(folder: str | Path, label: str | None = None) -> RunLog:
    """Read one run folder. UserError where there are no metrics, or where a line but the last is not a metrics line."""
    folder = Path(folder)
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; is {folder} a run folder?") from error
    last_is_whole = lines[-1] == b""
    rows: dict[int, dict[str, Any]] = {}
    truncated = False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows[row["step"]] = row  # a resumed run repeats steps: the later line counts
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not last_is_whole:
                truncated = True
                continue
            raise UserError(f"{path}:{number}: not a metrics line") from error
    if not rows:
        raise UserError(f"{path} holds no step yet")
    config_path = folder / "config.toml"
    return RunLog(
        label=label or folder.resolve().name,
        rows=tuple(rows[step] for step in sorted(rows)),
        config=load_toml(config_path) if config_path.is_file() else None,
        truncated=truncated,
    )


def read_runs(folders: Sequence[str | Path], labels: Sequence[str] | None = None) -> list[RunLog]:
    """Read several runs; labels default to the folders' names."""
    if labels is not None and len(labels) != len(folders):
        raise UserError(f"--labels: {len(labels)} given for {len(folders)} runs; give one per run")
    return [read_run(folder, label) for folder, label in zip(folders, labels or [None] * len(folders), strict=True)]


def describe_q(config: Config) -> str:
    """'0.75', '1→0.25 (step)'; '-' for the baselines, which have no q."""
    o = config.objective
    if not o.row.uses_q:
        return "-"
    return f"{o.q:g}" if o.q_schedule == "constant" else f"{o.q:g}→{o.q_final:g} ({o.q_schedule})"


def last_accuracy(run: RunLog) -> float | None:
    """The last exact-match rate on held-out items, in [0, 1]."""
    _, values = run.series("eval_exact_match")
    return values[-1] if values else None


def summary_table(runs: Sequence[RunLog]) -> str:
    """A Markdown table, aligned for a terminal too: a line per run."""
    header = ("run", "estimator", "q", "steps", "first ln P̂", "last ln P̂", "exact match")
    table = [header]
    for run in runs:
        _, log_p = run.series("log_p_mean")
        accuracy = last_accuracy(run)
        table.append(
            (
                run.label,
                run.config.objective.estimator if run.config else "-",
                describe_q(run.config) if run.config else "-",
                str(run.rows[-1]["step"] + 1),
                f"{log_p[0]:.2f}" if log_p else "-",
                f"{log_p[-1]:.2f}" if log_p else "-",
                "-" if accuracy is None else f"{100 * accuracy:.1f} %",
            )
        )
    widths = [max(_columns(row[i]) for row in table) for i in range(len(header))]
    numeric = range(3, len(header))

    def line(row: Sequence[str]) -> str:
        cells = []
        for i, cell in enumerate(row):
            pad = " " * (widths[i] - _columns(cell))
            cells.append(pad + cell if i in numeric else cell + pad)
        return "| " + " | ".join(cells) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i in numeric else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in table[1:])])


def _columns(text: str) -> int:
    """Terminal columns: the hat over P is a combining mark, and takes none."""
    return len(text.replace("\u0302", ""))


# Okabe and Ito's colours, which stay apart for colour-blind readers; dashes tell runs apart in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
DASHES = ("-", "--", "-.", (0, (1, 1)))


def plot_runs(runs: Sequence[RunLog], output: str | Path, title: str | None = None) -> Path:
    """Draw ln P̂, the largest effective reward and accuracy against the step. The suffix of output sets the format."""
    figure = Figure(figsize=(13.5, 4.4), dpi=150, layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharex=True)
    for i, run in enumerate(runs):
        style = {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": DASHES[i // len(COLOURS) % len(DASHES)],
            "linewidth": 2.4 - 1.2 * i / max(1, len(runs) - 1),  # the upper the thinner: coinciding runs stay visible
        }
        left.plot(*run.series("log_p_mean"), label=run.label, **style)
        middle.plot(*run.series("effective_reward_max"), **style)
        _draw_accuracy(right, run, style)
    _dress(left, r"$\ln \hat{P}$ of the gold answer", "nats, mean over prompts")
    _dress(middle, "Largest effective reward", r"$\max_m\, c_m / M^q$")
    _dress(right, "Exact match", "rate")
    middle.axhline(0, color="0.6", linewidth=0.8, zorder=1)
    right.set_ylim(-0.03, 1.03)
    if any(run.series("reward_mean")[0] for run in runs):
        right.plot([], [], color="0.3", label="held out", marker="o", markersize=3.5)
        right.plot([], [], color="0.3", linestyle=":", label="training samples")
        right.legend(loc="best", frameon=False, fontsize=8)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(runs), 6), frameon=False)
    if title:
        figure.suptitle(title, fontsize=12)
    output = Path(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error
    except ValueError as error:  # matplotlib's word on an unknown suffix
        raise UserError(f"cannot write {output}: {error}") from error
    return output


def _draw_accuracy(axes: Axes, run: RunLog, style: dict) -> None:
    """Held-out accuracy with markers, since there may be one point only; the training rewards dotted beneath it."""
    axes.plot(*run.series("reward_mean"), alpha=0.8, **{**style, "linestyle": ":"})
    axes.plot(*run.series("eval_exact_match"), marker="o", markersize=2.5 + style["linewidth"], clip_on=False, **style)


def _dress(axes: Axes, title: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
