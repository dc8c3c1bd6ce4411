"""F5: how the commands with flags of their own read them."""

import argparse
from typing import NoReturn

from megatron_jq.errors import UserError


class CommandParser(argparse.ArgumentParser):
    """argparse with its faults as UserError, in one line that names the command."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.removeprefix('megatron-jq ')}: {message}; see {self.prog} --help")
