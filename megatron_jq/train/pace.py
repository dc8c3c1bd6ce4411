"""F4: how long a phase took on every rank, so that a slow one is named."""

import socket
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_jq.parallel.collectives import all_gather_flat
from megatron_jq.parallel.runtime import Runtime

PHASES = ("rollout", "score", "train")


@dataclass(frozen=True)
class Pace:
    """Seconds by phase (rollout, score, train) over all ranks."""

    median: tuple[float, ...]
    slowest: tuple[float, ...]
    remark: str | None  # names the slow rank, where there is one


class PaceMaker:
    """Compares the ranks' times. Cost: one all-gather of 24 bytes a rank and step."""

    #: A rank is slow that takes this many times the median, and this many seconds more.
    FACTOR, SECONDS = 1.5, 1.0

    def __init__(self, runtime: Runtime):
        self._runtime = runtime
        self._nodes: list[str] = [""] * runtime.world_size
        dist.all_gather_object(self._nodes, socket.gethostname())

    def compare(self, seconds_of: Mapping[str, float]) -> Pace:
        """Alike on every rank. seconds_of: this rank's, by phase; a phase that a step does not have took none.

        A slow rank lets the others wait where they next meet: of several phases with a slow rank, the first has it.
        """
        device, size = self._runtime.device, self._runtime.world_size
        seconds = [seconds_of.get(phase, 0.0) for phase in PHASES]
        table = torch.empty(size * len(PHASES), dtype=torch.float64, device=device)
        all_gather_flat(table, torch.tensor(seconds, dtype=torch.float64, device=device), self._runtime.groups.world)
        columns = list(zip(*table.view(size, len(PHASES)).tolist(), strict=True))
        median = tuple(statistics.median_low(column) for column in columns)
        slowest = tuple(map(max, columns))
        return Pace(median, slowest, self._remark(columns, median, slowest))

    def _remark(self, columns, median, slowest) -> str | None:
        for phase, column, middle, most in zip(PHASES, columns, median, slowest, strict=True):
            if most > self.FACTOR * middle and most > middle + self.SECONDS:
                rank = column.index(most)
                return f"slow: {phase} took {most:.1f} s on rank {rank} ({self._nodes[rank]}), {middle:.1f} s elsewhere"
        return None
