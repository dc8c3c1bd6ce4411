"""F4: a thread beside the run that shows signs of life to the other ranks and ends a phase that takes too long.

A collective's own deadline ends a wait for peers; what it cannot end is a rank that waits for something else (a file
system, a kernel), and what it cannot say is which peer is missing.
"""

import contextlib
import importlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_jq.parallel.runtime import Runtime
from megatron_jq.train.failures import Phase, show_stacks


class Watch:
    """Enter around a run's work. The thread sleeps but for one small message to rank 0's store every two seconds.

    limit: of one phase; at its end the process writes all Python stacks to standard error and leaves with code 3.
    """

    INTERVAL_SECONDS = 2.0

    def __init__(self, phase: Phase, runtime: Runtime, limit: timedelta, *, leave: Callable[[int], None] = os._exit):
        self._phase, self._runtime, self._limit, self._leave = phase, runtime, limit.total_seconds(), leave
        self._store: Any = None
        if runtime.world_size > 1:
            # A connection of its own: on the main thread's a set would wait for a get that blocks.
            store: Any = dist.distributed_c10d._get_default_store()
            self._store = dist.distributed_c10d.PrefixStore("watch", store.clone())
        self._monitor = _rank_monitor()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join(timeout=self.INTERVAL_SECONDS)

    def missing_peers(self) -> str:
        """Which ranks gave no sign of life for two intervals, on which nodes and in which phases they were last seen.

        For a run that ends: takes five seconds. Empty where all gave one.
        """
        if self._runtime.world_size == 1:
            return ""
        try:
            before = self._signs()
            time.sleep(2.5 * self.INTERVAL_SECONDS)
            silent = [rank for rank, (old, new) in enumerate(zip(before, self._signs(), strict=True)) if old == new]
        except RuntimeError:  # DistError and its kin: the store's host is the one that is missing
            return "no sign of life from the store on rank 0's node"
        seen = [f"rank {rank} on {_without_count(before[rank])}" for rank in silent if rank != self._runtime.rank]
        return f"no sign of life from {'; '.join(seen)}" if seen else ""

    def _signs(self) -> list[str]:
        keys = [str(rank) for rank in range(self._runtime.world_size)]
        present = [key if self._store.check([key]) else None for key in keys]
        answers = iter(self._store.multi_get([key for key in present if key is not None]))
        return ["" if key is None else next(answers).decode() for key in present]

    def _run(self) -> None:
        count, entered = 0, None
        while not self._over.is_set():
            count += 1
            if self._store is not None:
                with contextlib.suppress(RuntimeError):  # rank 0's node is gone: the next collective says so
                    self._store.set(str(self._runtime.rank), f"{count} {socket.gethostname()} ({self._phase.now})")
            if self._monitor is not None and self._phase.since != entered:  # a thread's beat alone is no progress
                self._monitor.send_heartbeat()
                entered = self._phase.since
            if time.monotonic() - self._phase.since > self._limit:
                self._end()
            self._over.wait(self.INTERVAL_SECONDS)

    def _end(self) -> None:
        show_stacks()
        prefix = f"[rank {self._runtime.rank}] " if self._runtime.world_size > 1 else ""
        sys.stderr.write(
            f"{prefix}megatron-jq: error: {self._phase.now}: not done within {self._limit:g} s "
            f"(--phase-timeout-minutes) on {socket.gethostname()}; the stacks above say where each thread stood\n"
        )
        sys.stderr.flush()
        self._leave(3)


def _without_count(sign: str) -> str:
    return sign.partition(" ")[2] or "an unknown node (never seen)"


def _rank_monitor():
    """nvidia-resiliency-ext's monitor of this rank, where its ft_launcher started this process; else None."""
    if "FT_RANK_MONITOR_IPC_SOCKET" not in os.environ:
        return None
    client = importlib.import_module("nvidia_resiliency_ext.fault_tolerance").RankMonitorClient()
    client.init_workload_monitoring()
    return client
