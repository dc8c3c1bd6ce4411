"""F5: `megatron-jq generate`: its flags; those of evaluate count too, on top of the checkpoint's settings."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace

from megatron_jq.cli.parser import CommandParser, as_path, check_settings
from megatron_jq.config import Config, parse_args
from megatron_jq.config_reads import READS
from megatron_jq.errors import UserError

PROG = "megatron-jq generate"


def parser() -> argparse.ArgumentParser:
    flags = CommandParser(
        prog=PROG,
        usage=f"{PROG} (--load DIR | --hf DIR) [--prompt TEXT | --prompts FILE] [--name value ...]",
        description="Show what a policy writes: the rationale, where and why it closed, the answer, and with a gold "
        "answer ln p(y*|x,z) of each sample and ln P̂. Without --prompt and --prompts, standard input holds a prompt "
        "per line.",
        epilog="These flags of train (train --help) are taken too, on top of the checkpoint's own settings: "
        + ", ".join("--" + name.replace("_", "-") for name in sorted(READS["generate"]))
        + "; --config FILE. Greedy: --eval-temperature 0.",
        allow_abbrev=False,
    )
    flags.add_argument("--load", type=as_path, metavar="DIR", help="a folder of checkpoints, or one iter_NNNNNNN of it")
    flags.add_argument("--hf", type=as_path, metavar="DIR", help="a Hugging Face folder of safetensors")
    flags.add_argument("--prompt", metavar="TEXT", help="one prompt; its samples appear token by token")
    flags.add_argument(
        "--prompts", type=as_path, metavar="FILE",
        help="a prompt per line of a .txt file; of any other, records with golds, as of --eval-data",
    )  # fmt: skip
    flags.add_argument("--gold", metavar="TEXT", help="the gold answer of --prompt")
    flags.add_argument("--samples", type=_count, default=1, metavar="N", help="per prompt (default: 1)")
    flags.add_argument("--json", action="store_true", help="a JSON object per sample and line")
    return flags


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def run_generate(argv: list[str], before_imports: Callable[[], None]) -> int:
    """Parse, generate and return the exit code. before_imports: called before Megatron-core is imported."""
    args, rest = parser().parse_known_args(argv)
    _check(args)
    flags, deadline = check_settings("generate", rest)
    before_imports()
    from megatron_jq.evaluate.generate import GenerateArgs, generate
    from megatron_jq.train.failures import Phase, peers_must_answer

    phase = Phase()

    def with_flags(base: Config) -> Config:
        # Files of records count as held-out data for what else a command line may say of them.
        source = None if args.prompts is None or args.prompts.suffix == ".txt" else str(args.prompts)
        training = replace(base.training, eval_samples=args.samples)
        return parse_args(rest, PROG, replace(base, training=training, data=replace(base.data, eval_data=source)))

    generation = GenerateArgs(args.load, args.hf, args.prompt, args.prompts, args.gold, args.json, flags)
    with peers_must_answer(phase, deadline):
        generate(generation, with_flags, phase.enter)
    return 0


def _check(args: argparse.Namespace) -> None:
    """UserError for flags that do not go together."""
    sources = [name for name in ("load", "hf") if getattr(args, name) is not None]
    if len(sources) != 1:
        raise UserError(f"generate: give one of --load and --hf, not {'both' if sources else 'none'}")
    if args.prompt is not None and args.prompts is not None:
        raise UserError("generate: give one of --prompt and --prompts, not both")
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("generate: --prompt is empty; give a text")
    if args.prompt is None and args.prompts is None and sys.stdin.isatty():
        raise UserError("generate: give --prompt TEXT or --prompts FILE, or pipe a prompt per line in")
    if args.gold is not None and args.prompt is None:
        raise UserError(
            "generate: --gold belongs to --prompt, which is missing; records of --prompts bring their own"
        )
    if args.gold is not None and not args.gold.strip():
        raise UserError(
            "generate: --gold is empty: there is nothing to score; give the answer, or leave it out"
        )
