"""`python -m megatron_jq` and `megatron-jq`: torchrun and srun start modules, people start programs."""

import signal
from typing import NoReturn


def program() -> NoReturn:
    """The command line. Ctrl-C ends it without a traceback from the first import on."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from megatron_jq.cli import main

    main.program()


if __name__ == "__main__":  # saving a checkpoint spawns a helper process, which imports this module again
    program()
