#!/usr/bin/env python3
"""Tokenise and check data once, write it as a folder that `--train-data` takes, and say what is in it.

    python tools/prepare_data.py --train-data train.json --eval-data dev.json --test-data test.json \\
        --output data/finqa --split-sizes paper --prompt-style warm \\
        --tokenizer-type huggingface --tokenizer-model Qwen3-0.6B \\
        --bad-records drop --overlong-prompts drop --max-prompt-tokens 4096

Beside the flags below, every setting of `megatron-jq train` is taken, `--config FILE` included; those of data,
tokenizer, budgets, seed and model are read, and flags of others refused. docs/data.md says what the folder holds.

Exit codes: 0; 2 on bad input.
"""

import argparse
import sys

from megatron_jq.cli.parser import as_path, run_tool, tool_parser
from megatron_jq.config import Config, ModelConfig, explicit_settings, parse_args
from megatron_jq.config_estimators import unread_problems
from megatron_jq.config_reads import refuse_unread
from megatron_jq.config_validate import resolve_architecture
from megatron_jq.data.prepare import prepare
from megatron_jq.errors import UserError


def parse(argv: list[str]) -> tuple[argparse.Namespace, Config]:
    """Own flags, and the settings. UserError on bad input."""
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("--output", type=as_path, required=True, metavar="DIR", help="to write; must not exist")
    parser.add_argument(
        "--test-data", metavar="SOURCE", help="of the test split; --eval-data is the validation split's"
    )
    parser.add_argument(
        "--split-sizes",
        metavar="SIZES",
        help="paper, or train=N,validation=N,test=N (rest for one N); a split without a source of its own is cut from "
        "the one before it (default: each source whole)",
    )
    args, rest = parser.parse_known_args(argv)
    config = parse_args(rest, prog="prepare_data")
    refuse_unread("tools/prepare_data.py", config, resolve_architecture(config), explicit_settings(rest))
    return args, config


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    return run_tool(__file__, lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> int:
    args, config = parse(argv)
    # Of what an estimator does not read, this alone would change the set; the rest may be the run's for another one.
    if problems := unread_problems(config, ("rationale_field",)):
        raise UserError("\n".join(problems))
    # The default model is nobody's choice: its context would say nothing.
    chosen = config.model != ModelConfig()
    context = resolve_architecture(config).max_position_embeddings if chosen else None
    done = prepare(config, args.output, test_data=args.test_data, split_sizes=args.split_sizes, context=context)
    print(done.report)
    print(done.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
