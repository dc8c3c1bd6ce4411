#!/usr/bin/env python3
"""Draw one row of trees: which token attends to which, and at which position each one stands (docs/shared-prompts.md).

    python tools/draw_tree_row.py docs/images/tree_row.png

The picture is measured, not drawn by hand: keys that move a query's output are those that it attends to.
"""

import sys

import matplotlib
import torch

from megatron_jq.cli.parser import run_tool, tool_parser
from megatron_jq.model.rows import pack_sequences
from megatron_jq.records import TrainingSequence

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.colors import ListedColormap  # noqa: E402

#: Two prompts of 5 and 4 tokens; rationales and answers of the first, then of the second.
SEQUENCES = [
    TrainingSequence(0, 0, (1,) * 5, (2,) * 3, 3, (3,) * 2),
    TrainingSequence(0, 1, (1,) * 5, (2,) * 2, 2, (3,) * 2),
    TrainingSequence(0, 2, (1,) * 5, (2,) * 4, 4, (3,) * 2),
    TrainingSequence(1, 0, (1,) * 4, (2,) * 3, 3, (3,) * 1),
    TrainingSequence(1, 1, (1,) * 4, (2,) * 2, 2, (3,) * 1),
]
COLOURS = {"prompt": "#4477aa", "rationale": "#ccbb44", "answer": "#ee6677"}


def attended(plan, tokens: int) -> torch.Tensor:
    """[T, T] bool: whether query i's output depends on value j."""
    torch.manual_seed(0)
    q, k = torch.randn(2, tokens, 1, tokens)
    units = torch.eye(tokens)[:, None]  # as values they make outputs of the weights
    weight = plan.attend(1, q, k, units, tokens**-0.5)
    return weight[:, 0] > 0


def main() -> int:
    """Returns the exit code."""
    return run_tool(__file__, _run)


def _run() -> int:
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("file")
    path = parser.parse_args().file
    rows = pack_sequences(SEQUENCES, device=torch.device("cpu"), with_rationale=True, share_prompts=True)
    tokens, positions = rows.token_T.tolist(), rows.position_T.tolist()
    kinds = ["", "prompt", "rationale", "answer"]
    mask = attended(rows.attention, len(tokens))

    figure, axes = plt.subplots(figsize=(8.2, 7.4), constrained_layout=True)
    shown = mask.long() * rows.token_T[None]  # coloured by what the key is
    axes.imshow(shown, cmap=ListedColormap(["#f4f4f4", *COLOURS.values()]), vmin=0, vmax=3)
    axes.set_xticks(range(len(tokens)), positions, fontsize=7)
    axes.set_yticks(range(len(tokens)), positions, fontsize=7)
    for tick, token in zip([*axes.get_xticklabels(), *axes.get_yticklabels()], tokens * 2, strict=True):
        tick.set_color(COLOURS[kinds[token]])
    for edge in range(len(tokens) + 1):
        axes.axhline(edge - 0.5, color="white", linewidth=0.6)
        axes.axvline(edge - 0.5, color="white", linewidth=0.6)
    for edge in (5, 9, 14, 18, 24, 28):
        axes.axhline(edge - 0.5, color="#555555", linewidth=0.8)
        axes.axvline(edge - 0.5, color="#555555", linewidth=0.8)
    axes.set_xlabel("key: its position (colour: what it is)")
    axes.set_ylabel("query: its position")
    axes.set_title("prompt 1 · prompt 2 · three branches of prompt 1 · two of prompt 2", fontsize=10)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    axes.legend(handles, [f"key of a {kind}" if kind != "answer" else "key of an answer" for kind in COLOURS], loc=1)
    figure.savefig(path, dpi=110)
    plain = sum(len(s) for s in SEQUENCES)
    print(f"{path}: {len(tokens)} tokens in place of {plain}, {int(mask.sum())} pairs attended to")
    return 0


if __name__ == "__main__":
    sys.exit(main())
