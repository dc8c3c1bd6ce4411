"""Run a function on N gloo ranks: the parent imports once, the ranks are forked from it.

Ranks send their results back over pipes. References are computed in a forked process too (`run_apart`): a parent that
never runs a backward pass can be forked on any machine, one with a GPU included.
"""

import contextlib
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch

# Imported here, before any fork, so that no rank pays for it again.
import megatron_jq.model.build  # noqa: F401
import megatron_jq.train.passes  # noqa: F401
from megatron_jq.parallel import runtime as runtime_module
from tests.ports import free_port

DEADLINE_SECONDS = 200


def run_ranks(
    function: Callable[..., Any],
    *arguments: Any,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    virtual_stages: int = 1,
    device: str = "cpu",
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> list[Any]:
    """function(runtime, *arguments) on tp·pp·dp ranks; their results by rank. A failed rank's traceback is raised.

    ep, etp: expert-parallel size, and how many ranks share an expert (None: tp). virtual_stages: chunks a stage.
    device: cpu or cuda. around: entered by each rank around all it does.
    """
    size, port = tp * pp * dp, free_port()
    layout = dict(  # noqa: C408
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        virtual_stages=virtual_stages,
    )
    # A process that has asked for CUDA devices cannot hand them on by fork.
    method = "spawn" if device == "cuda" and around is contextlib.nullcontext else "fork"
    works = [(_rank_main, rank, size, port, layout, device, around, function, arguments) for rank in range(size)]
    return _fork(works, method)


def run_apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) in one forked process without process groups."""
    return _fork([(_call, function, arguments)])[0]


def _rank_main(rank, size, port, layout, device, around, function, arguments):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with around():
        runtime = runtime_module.start(
            **layout,
            timeout=timedelta(seconds=120),
            seed=1234,
            device=device,
        )
        result = function(runtime, *arguments)
        runtime_module.stop()
        return result


def _call(function, arguments):
    return function(*arguments)


def _child(pipe, work, *arguments):
    torch.set_num_threads(1)
    try:
        answer = (True, work(*arguments))
    except BaseException:  # the parent raises it
        answer = (False, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()
    os._exit(0)  # no interpreter shutdown: the parent's pytest must not run twice


def _fork(works: list[tuple], method: str = "fork") -> list[Any]:
    """Each (function, *arguments) in a process of its own. Stops all at a failure, or after DEADLINE_SECONDS."""
    context = multiprocessing.get_context(method)
    pipes, processes, results = [], [], {}
    for work in works:
        ours, child_end = context.Pipe(duplex=False)
        processes.append(context.Process(target=_child, args=(child_end, *work), daemon=True))
        processes[-1].start()
        child_end.close()  # so that a dead child reads as end of file
        pipes.append(ours)
    end = time.monotonic() + DEADLINE_SECONDS
    try:
        while len(results) < len(works):
            waiting = [pipe for i, pipe in enumerate(pipes) if i not in results]
            ready = wait(waiting, timeout=max(0.0, end - time.monotonic()))
            assert ready, f"{len(waiting)} of {len(works)} ranks still run after {DEADLINE_SECONDS} s"
            for pipe in ready:
                rank = pipes.index(pipe)
                try:
                    succeeded, result = pickle.loads(pipe.recv_bytes())
                except EOFError as error:
                    raise AssertionError(f"rank {rank} died without a word") from error
                assert succeeded, f"rank {rank} failed:\n{result}"
                results[rank] = result
    finally:
        for process in processes:
            if len(results) < len(works):
                process.kill()
            process.join()
    return [results[rank] for rank in range(len(works))]
