#!/usr/bin/env python3
"""Draw several runs in one picture, and print their table.

python tools/plot_run.py runs/garl runs/grpo --output escape.png
"""

import sys

from megatron_jq.cli.parser import run_tool, tool_parser
from megatron_jq.report import plot_runs, read_runs, summary_table


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    return run_tool(__file__, lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> int:
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders: each holds a metrics.jsonl")
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="names in the legend (default: the folders')")
    parser.add_argument("--output", default="run.png", help="the picture; .png, .pdf or .svg (default: %(default)s)")
    parser.add_argument("--title", help="a line above the picture")
    args = parser.parse_args(argv)
    runs = read_runs(args.runs, args.labels)
    output = plot_runs(runs, args.output, args.title)
    for run in runs:
        if run.truncated:
            print(f"plot_run: {run.label}: metrics.jsonl ends in a cut line, which was left out", file=sys.stderr)
    print(summary_table(runs))
    print(f"\n{output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
