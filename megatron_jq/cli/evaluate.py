"""F5: `megatron-jq evaluate`: its own flags; the others are train's, on top of the checkpoint's settings."""

import argparse
import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

from megatron_jq.cli.parser import CommandParser, as_path
from megatron_jq.config import Config, TrainingConfig, explicit_settings, parse_args
from megatron_jq.config_reads import READS, refuse_unread, unread_note
from megatron_jq.config_validate import resolve_architecture
from megatron_jq.errors import UserError

PROG = "megatron-jq evaluate"


def parser() -> argparse.ArgumentParser:
    flags = CommandParser(
        prog=PROG,
        usage=f"{PROG} (--load DIR | --hf DIR | --rescore FILE) [--name value ...]",
        description="Sample answers to held-out prompts and report pass@k, maj@k and ln P̂ with intervals. A killed "
        "evaluation goes on with the same command.",
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
    """Parse, evaluate, return the exit code. before_imports: called before Megatron-core is imported."""
    own, rest = parser().parse_known_args(argv)
    given = [name for name in ("load", "hf", "rescore") if getattr(own, name) is not None]
    if len(given) != 1:
        raise UserError(f"evaluate: give one of --load, --hf and --rescore, not {' and '.join(given) or 'none'}")
    if own.rescore is not None:
        return _rescore(own, rest, before_imports)
    flags, shape = explicit_settings(rest), resolve_architecture(Config())
    # Whatever the checkpoint's settings are: said before Megatron-core is imported.
    refuse_unread("evaluate", Config(), shape, flags - READS["evaluate"])
    config = parse_args(rest, PROG)
    before_imports()
    from megatron_jq.evaluate.run import Order, evaluate_policy
    from megatron_jq.train.failures import Phase, peers_must_answer

    phase, deadline = Phase(), timedelta(minutes=config.parallel.distributed_timeout_minutes)

    def enter(what: str) -> None:
        phase.now = what

    output = own.output or Path("runs/evaluation")
    order = Order(own.load, own.hf, output, own.metrics, own.bootstrap_resamples, own.confidence, flags)
    with peers_must_answer(phase, deadline):
        evaluate_policy(order, partial(parse_args, rest, PROG), enter)
    return 0


def _rescore(own: argparse.Namespace, rest: list[str], before_imports: Callable[[], None]) -> int:
    """Judge a file of samples by the judge that wrote it, but for what flags say."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("evaluate --rescore: runs in one process; start it without torchrun")
    command, flags, shape = "evaluate --rescore", explicit_settings(rest), resolve_architecture(Config())
    refuse_unread(command, Config(), shape, flags)
    parse_args(rest, PROG)
    before_imports()
    from megatron_jq.evaluate.judging import Interval, judge_of
    from megatron_jq.evaluate.math_judge import check_installed
    from megatron_jq.evaluate.report import conclude
    from megatron_jq.evaluate.samples import read_samples

    header, prompts = read_samples(own.rescore)
    was = TrainingConfig(
        match=header.match, normalise=header.rule, answer_extract=header.answer_extract, seed=header.seed
    )
    config = parse_args(rest, PROG, Config(training=was))
    refuse_unread(command, config, shape, flags)
    if (note := unread_note(command, config, shape, flags, Config(training=was))) is not None:
        print(note)
    t = config.training
    if t.match == "math":
        check_installed()
    judge = judge_of(t, header.data_format)
    interval = Interval(own.bootstrap_resamples, own.confidence, t.seed)
    conclude(header, prompts, judge, own.metrics, interval, own.output)
    return 0
