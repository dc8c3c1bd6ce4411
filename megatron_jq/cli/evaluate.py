"""F5: `megatron-jq evaluate`: its flags; those of train count too, on top of the checkpoint's settings."""

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_jq.cli.parser import CommandParser, as_path, check_settings, print_old_name_notes
from megatron_jq.config import Config, TrainingConfig, explicit_settings, parse_args
from megatron_jq.config_reads import READS, refuse_unread, unread_note
from megatron_jq.config_validate import resolve_architecture
from megatron_jq.errors import UserError

PROG = "megatron-jq evaluate"


def parser() -> argparse.ArgumentParser:
    flags = CommandParser(
        prog=PROG,
        usage=f"{PROG} (--load DIR | --hf DIR | --rescore FILE) [--name value ...]",
        description="Sample answers to held-out prompts and report pass@k, maj@k and ln P̂ with intervals. Run a "
        "killed evaluation's command again to continue it.",
        epilog="These flags of train (train --help) are taken too, on top of the checkpoint's own settings: "
        + ", ".join("--" + name.replace("_", "-") for name in sorted(READS["evaluate"]))
        + "; --config FILE.",
        allow_abbrev=False,
    )
    flags.add_argument("--load", type=as_path, metavar="DIR", help="a folder of checkpoints, or one iter_NNNNNNN of it")
    flags.add_argument("--hf", type=as_path, metavar="DIR", help="a Hugging Face folder of safetensors")
    flags.add_argument(
        "--output", type=as_path, metavar="DIR",
        help="folder of samples.jsonl and evaluation.json (default: runs/evaluation; under --rescore: none)",
    )  # fmt: skip
    flags.add_argument(
        "--metrics", metavar="LIST", help="such as pass@1,pass@4,maj@16 (default: pass@1, pass@N, maj@N for N samples)"
    )
    flags.add_argument(
        "--bootstrap-resamples", type=int, default=2000, metavar="N", help="of the intervals (default: 2000)"
    )
    flags.add_argument("--confidence", type=float, default=0.95, metavar="P", help="of the intervals (default: 0.95)")
    flags.add_argument("--rescore", type=as_path, metavar="FILE", help="judge a samples.jsonl again; nothing is drawn")
    return flags


def run_evaluate(argv: list[str], before_imports: Callable[[], None]) -> int:
    """Parse, evaluate and return the exit code. before_imports: called before Megatron-core is imported."""
    args, rest = parser().parse_known_args(argv)
    sources = [name for name in ("load", "hf", "rescore") if getattr(args, name) is not None]
    if len(sources) != 1:
        raise UserError(f"evaluate: give one of --load, --hf and --rescore, not {' and '.join(sources) or 'none'}")
    if args.rescore is not None:
        return _rescore(args, rest, before_imports)
    flags, deadline = check_settings("evaluate", rest)
    before_imports()
    from megatron_jq.evaluate.run import EvaluateArgs, evaluate_policy
    from megatron_jq.train.failures import Phase, peers_must_answer

    phase = Phase()
    output = args.output or Path("runs/evaluation")
    resamples, confidence = args.bootstrap_resamples, args.confidence
    evaluation = EvaluateArgs(args.load, args.hf, output, args.metrics, resamples, confidence, flags)
    with peers_must_answer(phase, deadline):
        evaluate_policy(evaluation, partial(parse_args, rest, PROG), phase.enter)
    return 0


def _rescore(args: argparse.Namespace, rest: list[str], before_imports: Callable[[], None]) -> int:
    """Judge a file of samples by the judge that wrote it, changed by the flags."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("evaluate --rescore: runs in one process; start it without torchrun")
    command, flags, shape = "evaluate --rescore", explicit_settings(rest), resolve_architecture(Config())
    refuse_unread(command, Config(), shape, flags)
    parse_args(rest, PROG)
    print_old_name_notes(rest)
    before_imports()
    from megatron_jq.evaluate.judging import Interval, judge_of
    from megatron_jq.evaluate.math_judge import check_installed
    from megatron_jq.evaluate.report import write_results
    from megatron_jq.evaluate.samples import read_samples

    header, prompts = read_samples(args.rescore)
    written_by = TrainingConfig(
        match=header.match, match_rule=header.rule, answer_extract=header.answer_extract, seed=header.seed
    )
    config = parse_args(rest, PROG, Config(training=written_by))
    refuse_unread(command, config, shape, flags)
    if (note := unread_note(command, config, shape, flags, Config(training=written_by))) is not None:
        print(note)
    t = config.training
    if t.match == "math":
        check_installed()
    judge = judge_of(t, header.data_format)
    interval = Interval(args.bootstrap_resamples, args.confidence, t.seed)
    write_results(header, prompts, judge, args.metrics, interval, args.output)
    return 0
