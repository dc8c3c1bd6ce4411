#!/usr/bin/env python3
"""Measure what one pass a prompt saves: score + train with --share-prompts off and auto, generation with and without
copies of the prompt's keys and values, over prompt lengths and numbers of rationales.

    OMP_NUM_THREADS=2 python tools/bench_sharing.py --prompt-tokens 16 128 512 2048 --num-rationales 4 16

Each cell is tools/bench_step.py in a process of its own, one mode after the other, so that memory is each mode's own. A
line is printed as soon as it is known: measured ratios beside those that tokens alone predict. Other flags are
bench_step's and the trainer's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_jq.cli.parser import as_path, run_tool, tool_parser

BENCH_STEP = Path(__file__).with_name("bench_step.py")
COLUMNS = (
    "Lp", "M", "tokens off → auto", "fewer", "score + train off → auto, s", "faster", "peak off → auto, MB", "smaller",
    "rollout copied → shared, tokens/s", "faster", "cache copied → shared, MB", "smaller",
)  # fmt: skip


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[16, 128, 512, 2048], metavar="Lp")
    parser.add_argument("--num-rationales", type=int, nargs="+", default=[4, 16], metavar="M")
    parser.add_argument("--model", default="small")
    parser.add_argument("--prompts-per-step", type=int, default=2)
    parser.add_argument("--rationale-tokens", type=int, default=64)
    parser.add_argument("--json", type=as_path, metavar="FILE", help="also write every report to this file")
    return parser.parse_known_args(argv)


def report(flags: list[str]) -> dict:
    """bench_step's figures. Its own words end this program where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        ended = subprocess.run(
            [sys.executable, str(BENCH_STEP), *flags, "--json", str(path)], stdout=subprocess.DEVNULL, check=False
        )
        if ended.returncode:
            sys.exit(ended.returncode)
        return json.loads(path.read_text(encoding="utf-8"))


def line(off: dict, auto: dict, prompt: int, rationales: int) -> list[str]:
    """off also copied prompts in generation, auto did neither."""
    phases = [{phase["phase"]: phase for phase in figures["phases"]} for figures in (off, auto)]
    cells = [f"{prompt}", f"{rationales}"]

    def pair(values: list[float], form: str, *, more_is_better: bool = False) -> None:
        gain = values[1] / values[0] if more_is_better else values[0] / values[1]  # below 1 where sharing loses
        cells.extend([f"{format(values[0], form)} → {format(values[1], form)}", f"{gain:.2f}"])

    def passes(figure: str, combine) -> list[float]:
        return [combine(of["score"][figure], of["train"][figure]) for of in phases]

    pair(passes("tokens_processed", lambda a, b: a + b), ",d")
    pair(passes("seconds", lambda a, b: a + b), ".2f")
    pair([peak / 1e6 for peak in passes("peak_memory_bytes", max)], ",.0f")
    pair([of["rollout"]["tokens_per_second"] for of in phases], ",.0f", more_is_better=True)
    pair([figures["cache_bytes"] / 1e6 for figures in (off, auto)], ",.1f")
    return cells


def main() -> int:
    """Returns the exit code."""
    return run_tool(__file__, _run)


def _run() -> int:
    args, rest = parse(sys.argv[1:])
    common = [
        f"--model={args.model}", f"--prompts-per-step={args.prompts_per_step}",
        f"--rationale-tokens={args.rationale_tokens}", *rest,
    ]  # fmt: skip
    print(f"| {' | '.join(COLUMNS)} |\n|{'--:|' * len(COLUMNS)}", flush=True)
    reports = []
    for prompt in args.prompt_tokens:
        for rationales in args.num_rationales:
            flags = [*common, f"--prompt-tokens={prompt}", f"--num-rationales={rationales}"]
            off = report([*flags, "--share-prompts=off", "--prompt-cache=copied"])
            auto = report([*flags, "--share-prompts=auto", "--prompt-cache=shared"])
            reports += [off, auto]
            print(f"| {' | '.join(line(off, auto, prompt, rationales))} |", flush=True)
    print(f"\ncommit {auto['commit']}; {auto['machine']}; {auto['versions']}")
    if args.json is not None:
        args.json.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
