#!/usr/bin/env python3
"""Measure a step: seconds, tokens, memory, messages and arithmetic of rollout, score and train.

    python tools/bench_step.py --model small --prompts-per-step 2 --num-rationales 16 --prompt-tokens 64 \\
        --rationale-tokens 64 --answer-tokens 8 --steps 3 --warmup 1

The same line after `torchrun --nproc-per-node N` measures a layout of N processes. docs/benchmarks.md explains the
figures. Beside the flags below, every setting of `megatron-jq train` is taken, `--config FILE` included; flags of data,
evaluation and run directory are refused.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from megatron_jq.cli.parser import as_path, json_output_problems, run_tool, tool_parser
from megatron_jq.config import Config, explicit_settings, parse_args
from megatron_jq.config_reads import refuse_unread
from megatron_jq.config_validate import resolve_architecture, validate_training
from megatron_jq.errors import UserError
from megatron_jq.estimators import DEFAULT
from megatron_jq.parallel.megatron.versions import find_version

DEFAULT_VOCABULARY = 1024
DEFAULT_ANSWER = 8


def _length_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    try:
        return int(low), int(high or low)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a whole number or LOW:HIGH, not {text}") from error


def parse(argv: list[str]) -> tuple[argparse.Namespace, Config]:
    """Own flags, and a valid Config whose budgets are the benchmark's lengths. UserError on bad input."""
    parser = tool_parser(__file__, __doc__)
    parser.add_argument(
        "--prompt-tokens", type=_length_range, default=(64, 64), metavar="N|LOW:HIGH",
        help="length of a prompt, or the range it is drawn from (64)",
    )  # fmt: skip
    parser.add_argument("--rationale-tokens", type=int, help="sampled tokens of every rationale (--rationale-budget)")
    parser.add_argument("--answer-tokens", type=int, help=f"(--answer-budget, or {DEFAULT_ANSWER})")
    parser.add_argument("--vocab-size", type=int, help=f"(the model's own, or {DEFAULT_VOCABULARY})")
    parser.add_argument("--steps", type=int, default=3, help="measured steps (3)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them (1)")
    parser.add_argument(
        "--prompt-cache", choices=("shared", "copied"), default="shared",
        help="copied: generation copies a prompt's keys and values to each rationale, for comparison (shared)",
    )  # fmt: skip
    parser.add_argument("--json", type=as_path, metavar="FILE", help="also write the figures to this file")
    args, rest = parser.parse_known_args(argv)
    config = parse_args(rest, prog="bench_step")
    refuse_unread("tools/bench_step.py", config, resolve_architecture(config), explicit_settings(rest))
    if args.rationale_tokens is None:
        args.rationale_tokens = config.rollout.rationale_budget
    if args.answer_tokens is None:
        args.answer_tokens = config.rollout.answer_budget or DEFAULT_ANSWER
    if args.vocab_size is None:
        args.vocab_size = resolve_architecture(config).vocab_size or DEFAULT_VOCABULARY
    low, high = args.prompt_tokens
    least = {"rationale_tokens": 1, "answer_tokens": 1, "steps": 1, "warmup": 0, "vocab_size": 2}
    problems = [
        f"--{name.replace('_', '-')} must be at least {bound}, not {getattr(args, name)}"
        for name, bound in least.items()
        if getattr(args, name) < bound
    ]
    if not 1 <= low <= high:
        problems.append(f"--prompt-tokens {low}:{high}: lengths must be at least 1, and LOW not above HIGH")
    if config.objective.estimator != DEFAULT:
        problems.append(f"--estimator must be {DEFAULT}: its training pass holds every rationale, at any weights")
    problems += json_output_problems(args.json)
    if problems:
        raise UserError("\n".join(problems))
    config = replace(
        config,
        rollout=replace(config.rollout, rationale_budget=args.rationale_tokens, answer_budget=args.answer_tokens),
        data=replace(config.data, max_prompt_tokens=high, tokenizer_vocab_size=None),
    )
    validate_training(config, int(os.environ.get("WORLD_SIZE", "1")))
    return args, config


def provenance(argv: list[str]) -> dict[str, str]:
    """What a figure must be read with: command, commit, machine, versions."""
    size = os.environ.get("WORLD_SIZE")
    launcher = "python" if size is None else f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', size)}"
    threads = os.environ.get("OMP_NUM_THREADS")
    prefix = "" if threads is None else f"OMP_NUM_THREADS={threads} "
    return {
        "command": f"{prefix}{launcher} tools/bench_step.py {shlex.join(argv)}",
        "commit": _commit(),
        "machine": _machine(),
        "versions": f"torch {version('torch')}, megatron-core {find_version()}",
    }


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, encoding="utf-8", check=True
        )
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, encoding="utf-8", check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + (" with changes" if changes.stdout else "")


def _machine() -> str:
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    parts = [f"{os.cpu_count()} x {names[0] if names else platform.processor() or platform.machine()}"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return ", ".join([*parts, f"{platform.system()} {platform.machine()}"])


def measure(args: argparse.Namespace, config: Config, argv: list[str]) -> int:
    """Run the benchmark on this rank; rank 0 prints and writes. Returns the exit code."""

    from megatron_jq.bench.figures import Load, heading, table
    from megatron_jq.bench.step import StepBench
    from megatron_jq.config_validate import derive
    from megatron_jq.parallel import runtime as runtime_module

    derived = derive(config, runtime_module.world_size_from_environment())
    runtime = runtime_module.start_configured(config.parallel, config.training.seed)
    lengths = (*args.prompt_tokens, args.rationale_tokens, args.answer_tokens, args.vocab_size)
    load = Load(*lengths, args.steps, args.warmup, args.prompt_cache == "copied")
    report = StepBench(config, derived, load, runtime).run()
    if report is not None:
        origin = provenance(argv)
        print("\n".join(f"{name}: {value}" for name, value in origin.items()))
        print(f"{heading(report)}\n\n{table(report)}", flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps({**origin, **report.as_json()}, indent=1) + "\n", encoding="utf-8")
    runtime_module.stop()
    return 0


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, as the main command does."""
    argv = sys.argv[1:] if argv is None else argv
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")  # missing kernels, once a rank
    return run_tool(__file__, lambda: measure(*parse(argv), argv))


if __name__ == "__main__":
    sys.exit(main())
