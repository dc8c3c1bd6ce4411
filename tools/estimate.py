#!/usr/bin/env python3
"""Estimate what a step takes before it is queued: memory of every stage, FLOPs, messages, tokens.

    python tools/estimate.py --model qwen3-0.6b --bf16 --device cuda --tensor-model-parallel-size 2 \\
        --use-distributed-optimizer --prompt-tokens 512 --answer-tokens 16 --rationale-budget 1024 \\
        --sweep 8 16 32 64 128 256 512 1024 --memory-limit 80

Beside the flags below, every setting of `megatron-jq train` is taken, `--config FILE` included; those of data and run
directory are not read. It is arithmetic in one process: no GPU, no process group, nothing built. docs/estimate.md has
the formulas, and the memory it predicted beside what was measured.

Exit codes: 0; 1 where --memory-limit is not kept (by any size of a sweep); 2 on bad input.
"""

import argparse
import json
import sys
from dataclasses import replace

from megatron_jq.cli.parser import as_path, json_output_problems, run_tool, tool_parser
from megatron_jq.config import Config, parse_args
from megatron_jq.config_validate import resolve_architecture
from megatron_jq.errors import UserError
from megatron_jq.estimate.figures import Estimate, estimate
from megatron_jq.estimate.plan import Lengths, make_plan, smallest_world_size
from megatron_jq.estimate.report import GIB, sweep_table, text, verdict

DEFAULT_VOCABULARY = 1024


def parse(argv: list[str]) -> tuple[argparse.Namespace, Config]:
    """Return the tool's flags, and a Config whose budgets are the lengths. UserError on bad input."""
    parser = tool_parser(__file__, __doc__)
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--world-size", "--gpus", type=int, metavar="N", help="processes (one replica's)")
    sizes.add_argument("--sweep", type=int, nargs="+", metavar="N", help="several sizes, one per line")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="of the longest prompt (--max-prompt-tokens)")
    parser.add_argument("--rationale-tokens", type=int, metavar="N", help="sampled or given ones (--rationale-budget)")
    parser.add_argument("--joint-tokens", type=int, default=0, metavar="N", help="of a template, before the answer (0)")
    parser.add_argument("--answer-tokens", type=int, metavar="N", help="of the longest answer (--answer-budget)")
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help=f"(the model's or tokenizer's own, or {DEFAULT_VOCABULARY})"
    )
    parser.add_argument("--memory-limit", type=float, metavar="GIB", help="a process may take; exit code 1 if not kept")
    parser.add_argument("--json", type=as_path, metavar="FILE", help="also write the figures to this file")
    args, rest = parser.parse_known_args(argv)
    config = parse_args(rest, prog="estimate")
    r, d = config.rollout, config.data
    default_vocabulary = resolve_architecture(config).vocab_size or d.tokenizer_vocab_size or DEFAULT_VOCABULARY
    args.vocab_size = default_vocabulary if args.vocab_size is None else args.vocab_size
    if args.world_size is None:
        args.world_size = smallest_world_size(config)
    data = replace(d, tokenizer_vocab_size=None)
    if config.objective.row.pretrains:
        _take_rows(args, config)
        _check(args, [])
        return args, replace(config, data=data)
    args.prompt_tokens = d.max_prompt_tokens if args.prompt_tokens is None else args.prompt_tokens
    args.rationale_tokens = r.rationale_budget if args.rationale_tokens is None else args.rationale_tokens
    args.answer_tokens = r.answer_budget if args.answer_tokens is None else args.answer_tokens
    _check(args, _length_problems(args))
    lengths = {"rationale_budget": args.rationale_tokens, "answer_budget": args.answer_tokens}
    data = replace(data, max_prompt_tokens=args.prompt_tokens)
    return args, replace(config, rollout=replace(r, **lengths), data=data)


def _take_rows(args: argparse.Namespace, config: Config) -> None:
    """Set the lengths of pretraining: a row is a first token, and those that it predicts."""
    names = ("prompt_tokens", "rationale_tokens", "joint_tokens", "answer_tokens")
    flags = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]
    if flags:
        raise UserError(f"{', '.join(flags)}: rows of --estimator pretrain are as long as --seq-length says; leave out")
    args.prompt_tokens, args.rationale_tokens = 1, 0
    args.answer_tokens = config.data.seq_length or resolve_architecture(config).max_position_embeddings


def _length_problems(args: argparse.Namespace) -> list[str]:
    problems = []
    for name, setting in (("prompt_tokens", "--max-prompt-tokens"), ("answer_tokens", "--answer-budget")):
        if getattr(args, name) is None:
            problems.append(f"--{name.replace('_', '-')} is needed (or {setting}): memory follows the longest one")
    least = {"prompt_tokens": 1, "rationale_tokens": 1, "joint_tokens": 0, "answer_tokens": 1}
    return problems + _too_small(args, least)


def _too_small(args: argparse.Namespace, least: dict[str, int]) -> list[str]:
    values = {name: getattr(args, name) for name in least}
    return [
        f"--{name.replace('_', '-')} must be at least {least[name]}, not {value}"
        for name, value in values.items()
        if value is not None and value < least[name]
    ]


def _check(args: argparse.Namespace, problems: list[str]) -> None:
    """UserError with the problems and those of all other flags."""
    problems = problems + _too_small(args, {"world_size": 1, "vocab_size": 2})
    if args.sweep is not None and min(args.sweep) < 1:
        problems.append(f"--sweep: sizes must be at least 1, not {min(args.sweep)}")
    if args.memory_limit is not None and not args.memory_limit > 0:
        problems.append(f"--memory-limit must be above 0, not {args.memory_limit}")
    problems += json_output_problems(args.json)
    if problems:
        raise UserError("\n".join(problems))


def estimates(args: argparse.Namespace, config: Config) -> list[Estimate]:
    """Return an estimate for each size asked for. UserError, as training raises it, where a layout is not possible."""
    lengths = Lengths(args.prompt_tokens, args.rationale_tokens, args.answer_tokens, args.joint_tokens)
    sizes = args.sweep or [args.world_size]
    return [estimate(make_plan(config, size, lengths, args.vocab_size)) for size in sizes]


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return the exit code."""
    return run_tool(__file__, lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> int:
    args, config = parse(argv)
    figures = estimates(args, config)
    limit = None if args.memory_limit is None else args.memory_limit * GIB
    print(sweep_table(figures, limit) if args.sweep else text(figures[0]))
    verdicts = [] if limit is None else [verdict(figure, limit) for figure in figures]
    if verdicts and not args.sweep:
        print(f"\n{verdicts[0][1]}")
    if args.json is not None:
        args.json.write_text(json.dumps([figure.as_json() for figure in figures], indent=1) + "\n", encoding="utf-8")
    return 0 if not verdicts or any(fits for fits, _ in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
