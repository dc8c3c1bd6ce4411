#!/usr/bin/env python3
"""Draw the way of the data through one step (docs/architecture.md).

    python tools/draw_step.py docs/images/step.png
"""

import sys

import matplotlib

from megatron_jq.cli.parser import run_tool, tool_parser

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import FancyBboxPatch, Rectangle  # noqa: E402

#: As in the picture of a row of trees.
COLOURS = {"prompt": "#4477aa", "rationale": "#ccbb44", "answer": "#ee6677"}
PROMPTS, RATIONALES = 3, 4
#: Title, what happens, who does it.
STAGES = (
    ("1. prompts", "B prompts\nby (seed, step)", "every rank alike"),
    ("2. rollout", "M rationales z per prompt,\nrandom by (seed, step, slot)", "a replica draws its slots"),
    ("3. score", "ln w = ln p(y*|x,z)\nof each slot", "a replica scores its rows,\nthen ranks complete the table"),
    ("4. coefficients", "w / w̄^q and its baseline,\nover B and M", "every rank alike,\nin float64"),
    ("5. train", "Σ coefficient · ∇ ln p,\none optimizer step", "a replica sums its rows,\nthen replicas are summed"),
)
WIDTH, GAP = 2.6, 1.1


def main() -> int:
    """Returns the exit code."""
    return run_tool(__file__, _run)


def _run() -> int:
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("file")
    path = parser.parse_args().file
    figure, axes = plt.subplots(figsize=(16, 5.2), constrained_layout=True)
    last = len(STAGES) - 1
    for number, (title, what, who) in enumerate(STAGES):
        left = number * (WIDTH + GAP)
        axes.add_patch(
            FancyBboxPatch((left, 0), WIDTH, 4, boxstyle="round,pad=0.05", facecolor="#f7f7f7", edgecolor="#999999")
        )
        middle = left + WIDTH / 2
        axes.text(middle, 3.72, title, ha="center", va="center", fontsize=13, weight="bold")
        axes.text(middle, 1.12, what, ha="center", va="center", fontsize=10)
        axes.text(middle, 0.38, who, ha="center", va="center", fontsize=9, color="#666666", style="italic")
        if number < last:
            _arrow(axes, (left + WIDTH + 0.08, 2), (left + WIDTH + GAP - 0.08, 2))
    lefts = [number * (WIDTH + GAP) for number in range(len(STAGES))]
    _rows(axes, lefts[0], rationales=0, answers=False)
    _rows(axes, lefts[1], rationales=RATIONALES, answers=False)
    _rows(axes, lefts[2], rationales=RATIONALES, answers=True)
    _table(axes, lefts[3] + 0.65)
    _rows(axes, lefts[4], rationales=RATIONALES, answers=True)
    notes = ("token ids", "Rollout", "[B, M] table", "two constants\nper slot")
    for left, note in zip(lefts, notes, strict=False):
        axes.text(left + WIDTH + GAP / 2, 2.12, note, ha="center", va="bottom", fontsize=8.5)
    _arrow(axes, (lefts[4] + WIDTH / 2, -0.15), (lefts[1] + WIDTH / 2, -0.15), bend=-0.12)
    axes.text((lefts[1] + lefts[4] + WIDTH) / 2, -0.72, "the new weights draw the next step's rationales",
              ha="center", va="center", fontsize=10, backgroundcolor="white")  # fmt: skip
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    axes.legend(handles, ["prompt x", "rationale z", "gold answer y*"], loc="lower left", ncols=3, frameon=False,
                bbox_to_anchor=(0, 0.0))  # fmt: skip
    axes.set_xlim(-0.15, lefts[last] + WIDTH + 0.15)
    axes.set_ylim(-1.35, 4.15)
    axes.set_axis_off()
    figure.savefig(path, dpi=110)
    print(path)
    return 0


def _arrow(axes: Axes, begin: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    style = {"arrowstyle": "-|>", "color": "#333333", "lw": 1.6, "connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", xy=end, xytext=begin, arrowprops=style)


def _rows(axes: Axes, left: float, *, rationales: int, answers: bool) -> None:
    """A line per prompt: the prompt once, and after it one short line per rationale, with its answer."""
    for prompt in range(PROMPTS):
        top = 3.35 - prompt * 0.62
        axes.add_patch(Rectangle((left + 0.15, top - 0.46), 0.75, 0.42, color=COLOURS["prompt"]))
        for slot in range(rationales):
            height, length = 0.42 / RATIONALES, 0.55 + 0.12 * ((prompt * 2 + slot * 3) % 4)
            y = top - 0.04 - (slot + 1) * height
            axes.add_patch(Rectangle((left + 0.95, y + 0.01), length, height - 0.03, color=COLOURS["rationale"]))
            if answers:
                x = left + 0.98 + length
                axes.add_patch(Rectangle((x, y + 0.01), 0.4, height - 0.03, color=COLOURS["answer"]))


def _table(axes: Axes, left: float) -> None:
    """[B, M], shaded as if by ln w."""
    for prompt in range(PROMPTS):
        for slot in range(RATIONALES):
            shade = 0.15 + 0.25 * ((prompt * 2 + slot * 3) % 4)
            corner = (left + 0.34 * slot, 2.9 - prompt * 0.46)
            axes.add_patch(Rectangle(corner, 0.32, 0.42, facecolor="#aa3377", alpha=shade))
    axes.text(left - 0.12, 2.66, "B", ha="right", va="center", fontsize=11)
    axes.text(left + 0.34 * RATIONALES / 2, 1.72, "M", ha="center", va="center", fontsize=11)


if __name__ == "__main__":
    sys.exit(main())
