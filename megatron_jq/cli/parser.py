"""F5: how commands and tools parse their flags, and how they report errors."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from megatron_jq import streams
from megatron_jq.config import Config, explicit_settings, old_name_notes, parse_args
from megatron_jq.config_reads import READS, refuse_unread
from megatron_jq.config_validate import resolve_architecture
from megatron_jq.errors import RunFailure, UserError
from megatron_jq.interrupts import ending_at_once

_COMMAND = "megatron-jq "


class CommandParser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors of one line, which begins with the command where megatron-jq has it."""

    def error(self, message: str) -> NoReturn:
        command = f"{self.prog.removeprefix(_COMMAND)}: " if self.prog.startswith(_COMMAND) else ""
        raise UserError(f"{command}{message}; see {self.prog} --help")


def tool_parser(file: str, description: str) -> CommandParser:
    """Return the parser of tools/NAME.py from its `__file__` and its docstring, which is shown as it is written."""
    return CommandParser(
        prog=f"tools/{Path(file).name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def as_path(text: str) -> Path:
    """Return a user's path: a leading ~ is the home directory, also in --name=~/x, which no shell replaces."""
    return Path(os.path.expanduser(text))


def run_tool(file: str, work: Callable[[], int]) -> int:
    """Return the exit code of tools/NAME.py, by its name. A signal ends it with one line."""
    streams.protect()
    with ending_at_once(Path(file).stem), exit_code(Path(file).stem) as end:
        end.code = work()
    return end.code


@dataclass
class End:
    """How a command ended."""

    code: int = 0


@contextlib.contextmanager
def exit_code(name: str, *, prints_its_result: bool = True) -> Iterator[End]:
    """Enter around a command's work, which sets `code`; it becomes 2 for bad input, 3 for a run that had to stop.

    Both are printed on standard error as `NAME: error: …`, one line per error, with the rank where there are several.
    prints_its_result: output that a full disk refused is a failure, not just a warning.
    """
    end = End()
    try:
        yield end
        if end.code == 0 and (reason := streams.loss()) is not None:
            sys.stderr.write(f"{name}: {'error' if prints_its_result else 'warning'}: standard output: {reason}\n")
            end.code = 3 if prints_its_result else 0
    except (UserError, RunFailure) as error:
        ranked = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
        prefix = f"[rank {os.environ['RANK']}] " if ranked else ""
        # One write: several ranks share the terminal, and lines of several writes would mix.
        sys.stderr.write("".join(f"{prefix}{name}: error: {line}\n" for line in str(error).splitlines()))
        end.code = 3 if isinstance(error, RunFailure) else 2


def print_old_name_notes(argv: list[str]) -> None:
    """Print, on the main rank, which settings a command line or its `--config` file gives by names of before."""
    if os.environ.get("RANK", "0") == "0":
        for note in old_name_notes(argv):
            print(note, flush=True)


def check_settings(command: str, argv: list[str]) -> tuple[frozenset[str], timedelta]:
    """Return the settings that a command line of evaluate or generate names, and its --distributed-timeout-minutes.

    UserError for what the command does not read, whatever the checkpoint's settings are: before Megatron-core is
    imported.
    """
    flags = explicit_settings(argv)
    refuse_unread(command, Config(), resolve_architecture(Config()), flags - READS[command])
    config = parse_args(argv, f"megatron-jq {command}")
    print_old_name_notes(argv)
    return flags, timedelta(minutes=config.parallel.distributed_timeout_minutes)


def json_output_problems(path: Path | None) -> list[str]:
    """Return what keeps --json from being written, as a list of at most one line; empty without the flag."""
    if path is None:
        return []
    if path.is_dir():
        return [f"--json {path} is a folder; name a file"]
    if not os.access(path.parent, os.W_OK):
        return [f"--json {path}: the folder does not exist or cannot be written"]
    return []
