"""F4: the stages of a step: what this process does now, for how long, and what a value that is not finite ends."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from megatron_jq.parallel.runtime import Runtime
from megatron_jq.records import Example
from megatron_jq.train.failures import NonFinite, Phase, non_finite

#: Enter around the work of a stage, given its name: a benchmark's instruments.
Instrument = Callable[[str], contextlib.AbstractContextManager]


class Stages:
    """`with stages(step, "rollout", prompts):` around each stage of a step, on every rank alike.

    phase is told. seconds: of each stage of this step so far, or of the step before. instrument: entered too.
    """

    def __init__(self, phase: Phase, runtime: Runtime, run_dir: Path):
        self.phase, self._runtime, self._run_dir = phase, runtime, run_dir
        self.seconds: dict[str, float] = {}
        self.instrument: Instrument = lambda name: contextlib.nullcontext()

    @contextlib.contextmanager
    def __call__(self, step: int, name: str, prompts: Iterable[Example]) -> Iterator[None]:
        """RunFailure on every rank for a NonFinite of the work, once rank 0 has written the step's batch."""
        self.phase.enter_phase(step, name)
        began = time.monotonic()
        try:
            with self.instrument(name):
                yield
        except NonFinite as error:
            raise non_finite(error.what, step, prompts, error.sequences, self._runtime, self._run_dir) from None
        self.seconds[name] = time.monotonic() - began
