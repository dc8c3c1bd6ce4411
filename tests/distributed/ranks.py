"""Run a function on N gloo ranks: the parent imports once, the ranks are forked from it."""

import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable

import torch

from megatron_jq.parallel import runtime as runtime_module


# Imported here, before any fork, so that no rank pays for it again.
import megatron_jq.model.build  # noqa: F401
import megatron_jq.train.step  # noqa: F401


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank_main(rank, size, port, tp, pp, function, arguments, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        runtime = runtime_module.start(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            timeout=timedelta(seconds=120),
            seed=1234,
            device="cpu",
        )
        result = function(runtime, *arguments)
        torch.save(result, Path(folder) / f"{rank}.pt")
        runtime_module.stop()
    except BaseException:  # reported to the parent by text and exit code
        traceback.print_exc(file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def run_ranks(function: Callable[..., Any], *arguments: Any, tp: int = 1, pp: int = 1, dp: int = 1) -> list[Any]:
    """function(runtime, *arguments) on tp·pp·dp ranks; their results by rank. Raises when a rank fails or 300 s pass."""
    size, port = tp * pp * dp, _free_port()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank_main, args=(r, size, port, tp, pp, function, arguments, folder), daemon=True)
            for r in range(size)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(timeout=300)
        codes = [rank.exitcode for rank in ranks]
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
        assert codes == [0] * size, f"ranks ended with {codes} (None: still running)"
        return [torch.load(Path(folder) / f"{r}.pt", weights_only=False) for r in range(size)]


