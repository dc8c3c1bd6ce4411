"""F5: `megatron-jq COMMAND …`: parse, check, call, exit code.

Exit codes: 0 done; 2 bad input, 3 a run that had to stop, both with `megatron-jq: error: …` on standard error; anything
else is an error of ours, with its traceback. SIGINT, SIGTERM and SIGHUP end a command with one line, by that signal (a
shell shows 130, 143, 129); a run that is in a step saves and ends with 0 (train/stopping.py).
"""

import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import NoReturn

from megatron_jq import __version__, streams
from megatron_jq.cli.convert import run_convert
from megatron_jq.cli.evaluate import run_evaluate
from megatron_jq.cli.generate import run_generate
from megatron_jq.cli.grid import run_grid
from megatron_jq.cli.parser import exit_code, print_old_name_notes
from megatron_jq.cli.preflight import run_preflight
from megatron_jq.config import explicit_settings, parse_args
from megatron_jq.config_reads import refuse_unread
from megatron_jq.config_validate import resolve_architecture, validate_training
from megatron_jq.errors import UserError
from megatron_jq.interrupts import ending_at_once
from megatron_jq.parallel.megatron import versions
from megatron_jq.toml_files import did_you_mean

COMMANDS = ("train", "evaluate", "generate", "convert", "preflight", "grid")
USAGE = """\
usage: megatron-jq train [--config FILE] [--name value ...]
       megatron-jq evaluate --load DIR | --hf DIR | --rescore FILE [--name value ...]
       megatron-jq generate --load DIR | --hf DIR [--prompt TEXT | --prompts FILE] [--name value ...]
       megatron-jq convert hf-to-megatron | megatron-to-hf | reshard | inspect [--name value ...]
       megatron-jq preflight --run-dir DIR [--nodes LIST] [--name value ...]
       megatron-jq grid FILE [--point I]
       megatron-jq --version

commands:
  train    train a policy with GARL, PAFT or a baseline; `megatron-jq train --help` lists the settings
  evaluate pass@k, maj@k and ln P̂ of a checkpoint on held-out prompts; `evaluate --help`
  generate what a policy writes for a prompt, and ln p(y*|x,z) of a gold answer; `generate --help`
  convert  checkpoints from and to Hugging Face folders, cut for another layout, or described; `convert --help`
  preflight  on every node of a job: can it do its part, and do the nodes agree; `preflight --help`
  grid     the runs that a sweep's TOML file describes
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code; argv without the program's name."""
    argv = sys.argv[1:] if argv is None else argv
    # These write their results to files: what they print is a view of them.
    prints_its_result = argv[:1] not in (["train"], ["evaluate"])
    with exit_code("megatron-jq", prints_its_result=prints_its_result) as end:
        end.code = _command(argv)()
    return end.code


def program() -> NoReturn:
    """`main` as a process of its own.

    One that stopped on an error leaves without the interpreter's end: process groups that nobody closed wait there for
    their pending work, with a peer that went away for another deadline or for ever, and their threads can turn the
    exit code into an abort's. An abort itself (NCCL's watchdog ends a process so) leaves all Python stacks on standard
    error, and SIGUSR2 asks for them at any time.
    """
    streams.protect()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2)
    with ending_at_once("megatron-jq"):
        code = main()
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _command(argv: list[str]) -> Callable[[], int]:
    """The command's work, once its flags are read and checked. UserError for bad input."""
    if not argv:
        raise UserError(f"a command must follow: {', '.join(COMMANDS)} (megatron-jq --help)")
    command, *rest = argv
    if command in ("-h", "--help"):
        return partial(_show, USAGE.removesuffix("\n"))
    if command == "--version":
        return partial(_show, f"megatron-jq {__version__} ({', '.join(versions.versions_of_engine())})")
    others = {
        "convert": partial(run_convert, rest, versions.prepare_import),
        "evaluate": partial(run_evaluate, rest, versions.prepare_import),
        "generate": partial(run_generate, rest, versions.prepare_import),
        "preflight": partial(run_preflight, rest),
        "grid": partial(run_grid, rest),
    }
    if command in others:
        return others[command]
    if command != "train":
        hint = did_you_mean(command, COMMANDS, f"there are: {', '.join(COMMANDS)}")
        raise UserError(f"unknown command {command}; {hint}")
    return _train(rest)


def _show(text: str) -> int:
    print(text)
    return 0


def _train(argv: list[str]) -> Callable[[], int]:
    """train's work. What follows the checks imports for many seconds."""
    config = parse_args(argv)
    # The trainer checks again once it knows the number of processes.
    world_size = os.environ.get("WORLD_SIZE")
    validate_training(config, None if world_size is None else int(world_size))
    refuse_unread("train", config, resolve_architecture(config), explicit_settings(argv))
    print_old_name_notes(argv)
    versions.prepare_import()
    if config.data.show_example is not None:
        from megatron_jq.train.setup import show_example

        return partial(show_example, config)
    from megatron_jq.train.run import run_training

    return partial(run_training, config)
