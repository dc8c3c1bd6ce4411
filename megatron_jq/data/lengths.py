"""F2: how long prompts and answers are: figures, how many fit a budget, and a histogram."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which stay apart for colour-blind readers.
_COLOURS = ("#0072B2", "#D55E00", "#009E73")
_GREY = "0.65"


@dataclass(frozen=True)
class Budgets:
    """Tokens. None: no limit. context: of the model; the others as the flags of the same names."""

    max_prompt_tokens: int | None
    rationale_budget: int
    answer_budget: int | None
    context: int | None


@dataclass(frozen=True)
class Lengths:
    """Tokens of each example of a source or split: prompts up to the rationale, answers with the end of text.
    bridge: tokens that the template puts between the rationale's closing token and an answer.
    """

    name: str
    prompts: tuple[int, ...]
    answers: tuple[int, ...]
    bridge: int = 0

    def within(self, budgets: Budgets) -> tuple[int, int, int]:
        """How many prompts fit, how many answers, and how many whole rows fit the context."""
        prompts = sum(budgets.max_prompt_tokens is None or n <= budgets.max_prompt_tokens for n in self.prompts)
        answers = sum(budgets.answer_budget is None or n <= budgets.answer_budget for n in self.answers)
        rows = (
            prompt + budgets.rationale_budget + 1 + self.bridge + (budgets.answer_budget or answer)
            for prompt, answer in zip(self.prompts, self.answers, strict=True)
        )
        return prompts, answers, sum(budgets.context is None or n <= budgets.context for n in rows)


def quantiles(lengths: Sequence[int]) -> tuple[int, int, int, int]:
    """Smallest, median, 95th percentile, largest: each a length that occurs. Zeros where there are none."""
    if not lengths:
        return 0, 0, 0, 0
    ordered = sorted(lengths)
    at_95 = ordered[-(-95 * len(ordered) // 100) - 1]
    return ordered[0], statistics.median_low(ordered), at_95, ordered[-1]


def plot_lengths(splits: Sequence[Lengths], left_out: Lengths, budgets: Budgets, output: Path) -> None:
    """Histograms of prompt and answer tokens, a colour a split, grey for what was too long. The same input gives the
    same file.
    """
    figure = Figure(figsize=(10, 3.8), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = [*splits, left_out] if left_out.prompts else list(splits)
    colours = [*_COLOURS[: len(splits)], _GREY][: len(shown)]
    _histogram(left, [split.prompts for split in shown], colours, budgets.max_prompt_tokens, "--max-prompt-tokens")
    _histogram(right, [split.answers for split in shown], colours, budgets.answer_budget, "--answer-budget")
    left.set_title("Prompts, up to the rationale", fontsize=11, loc="left")
    right.set_title("Gold answers, with the end of text", fontsize=11, loc="left")
    names = [f"{split.name} ({len(split.prompts)})" for split in shown]
    figure.legend(left.containers, names, loc="outside lower center", ncols=len(shown), frameon=False)
    figure.savefig(output, metadata={"Software": None})


def _histogram(axes: Axes, lengths: list[tuple[int, ...]], colours: list[str], limit: int | None, flag: str) -> None:
    longest = max(n for group in lengths for n in group)
    width = max(1, -(-longest // 40))
    edges = [0.5 + width * i for i in range(-(-longest // width) + 1)]
    axes.hist(lengths, bins=edges, stacked=True, color=colours)
    axes.set_ylim(top=axes.get_ylim()[1] * 1.12)  # room for the line below
    if limit is not None and limit <= 1.2 * longest:
        axes.axvline(limit + 0.5, color="0.2", linewidth=1, linestyle="--")
        beyond = sum(n > limit for group in lengths for n in group)
        note = f"{flag} {limit}: {beyond} beyond"
    else:
        note = f"longest {longest}" if limit is None else f"longest {longest}, {flag} {limit}"
    beneath = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # the line may run behind the words
    axes.annotate(note, (0.99, 0.98), xycoords="axes fraction", ha="right", va="top", fontsize=8, bbox=beneath)
    axes.set_xlabel("tokens")
    axes.set_ylabel("examples")
    axes.grid(axis="y", color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
