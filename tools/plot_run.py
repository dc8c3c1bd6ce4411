#!/usr/bin/env python3
"""Draw several runs in one picture, and print their table.

python tools/plot_run.py runs/garl runs/grpo --output escape.png
"""

import argparse
import sys

from megatron_jq.errors import UserError
from megatron_jq.report import plot_runs, read_runs, summary_table


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 2 on bad input, as the main command does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders: each holds a metrics.jsonl")
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="names in the legend (default: the folders')")
    parser.add_argument("--output", default="run.png", help="the picture; .png, .pdf or .svg (default: %(default)s)")
    parser.add_argument("--title", help="a line above the picture")
    args = parser.parse_args(argv)
    try:
        runs = read_runs(args.runs, args.labels)
        output = plot_runs(runs, args.output, args.title)
    except UserError as error:
        print(f"plot_run: error: {error}", file=sys.stderr)
        return 2
    for run in runs:
        if run.truncated:
            print(f"plot_run: {run.label}: metrics.jsonl ends in a cut line, which was left out", file=sys.stderr)
    print(summary_table(runs))
    print(f"\n{output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
