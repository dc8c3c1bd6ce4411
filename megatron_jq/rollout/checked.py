"""F3: an engine as the trainer sees it: called as its row declares, alike on all ranks, and checked."""

import contextlib
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_jq.errors import RunFailure, UserError
from megatron_jq.parallel.runtime import on_all_ranks
from megatron_jq.records import Rollout
from megatron_jq.rollout.contract import broken_promise
from megatron_jq.rollout.engine import EngineSetup, NamedWeights, RolloutEngine, RolloutRequest, SamplingOptions
from megatron_jq.rollout.engines import EngineRow

T = TypeVar("T")

#: Of the collectives' deadline: a call that takes longer is given up, while the other ranks still wait for its result.
_SHARE_OF_DEADLINE = 0.9
#: How long `close` of an engine that was given up may take: it may wait for the very call that did not return.
_LAST_SECONDS = 10.0


class CheckedEngine:
    """One engine of a run. Every method is called on all ranks at the same time; a failure is raised on all of them.

    RunFailure names the engine, and the slot where a rollout breaks the contract (contract.py) or ranks differ. An
    engine without every_rank exists on the first rank of each model-parallel group alone; the others are sent what it
    returns. A call of it that exceeds 90 % of --distributed-timeout-minutes is given up.
    """

    def __init__(self, row: EngineRow, setup: EngineSetup):
        self.row, self.setup, self.version = row, setup, None
        self._runtime, self._capabilities = setup.runtime, row.capabilities
        self._group = self._runtime.groups.collection.mp  # the ranks that hold one replica of the policy between them
        self._calls = self._capabilities.every_rank or self._group.rank() == 0
        layout = setup.config.parallel
        self._deadline = _SHARE_OF_DEADLINE * timedelta(minutes=layout.distributed_timeout_minutes).total_seconds()
        self._step, self._is_given_up = "set-up", False
        self.engine: RolloutEngine | None = None
        try:
            on_all_ranks(self._runtime, self._build)
        except BaseException:
            self.close()  # one that this rank has built, where another rank could not
            raise

    def _build(self) -> None:
        if self._calls:
            self.engine = self._call(lambda: self.row.load(self.setup), "building it")

    def update_weights(self, version: int, named_weights: NamedWeights) -> None:
        """Hand over the weights of `version`. named_weights: iterated on every rank, since ranks gather each tensor
        together; not called for an engine that shares them. RunFailure where an engine leaves some untaken.
        """
        self.version, self._step = version, f"step {version}"
        if self._capabilities.shares_weights:
            self._present.update_weights(version, named_weights)
            return
        handover = Handover(named_weights())
        update = lambda: self._present.update_weights(version, handover.once)  # noqa: E731
        failure = None
        if self._calls:
            try:
                self._call(update, "update_weights")
            except (UserError, RunFailure) as error:
                failure = error
        taken = handover.finish(needed=self._calls and failure is None)
        on_all_ranks(self._runtime, lambda: self._raise(failure, taken))

    def generate(self, requests: list[RolloutRequest], options: SamplingOptions) -> list[Rollout]:
        """Return the engine's rollouts of this replica, alike on all ranks of its model-parallel group, checked.

        One gather of an error and a hash over all ranks; without every_rank, a broadcast of the rollouts besides.
        """
        self._step = f"step {options.step}"
        rollouts, failure, digest = [], None, None
        try:
            if self._calls:
                rollouts = self._call(lambda: self._present.generate(requests, options), "generate")
                digest = self._digest_of_checked(rollouts, requests, options)
        except (UserError, RunFailure) as error:
            rollouts, failure = [], error
        self._compare(digest, failure)
        if not self._capabilities.every_rank and self._group.size() > 1:
            message = [rollouts]
            dist.broadcast_object_list(message, src=dist.get_global_rank(self._group, 0), group=self._group)
            [rollouts] = message
        return rollouts

    def close(self) -> None:
        """Close the engine, once. What it meets is not worth a run that is over."""
        engine, self.engine = self.engine, None
        if engine is not None:
            with contextlib.suppress(Exception):
                self._call(engine.close, "close")

    @property
    def _present(self) -> RolloutEngine:
        """The engine, on a rank that has one."""
        assert self.engine is not None
        return self.engine

    @property
    def _label(self) -> str:
        return f"{self._step}: rollout engine {self.row.name}"

    def _call(self, work: Callable[[], T], what: str) -> T:
        """work(), for an engine of one rank in a thread with a deadline, and with its own failures as RunFailure.

        What an engine of every rank raises passes as it is: a collective that failed has an error of its own.
        """
        if self._capabilities.every_rank:
            return work()
        outcome: list[tuple[T | None, BaseException | None]] = []

        def run() -> None:
            try:
                if self._runtime.device.type == "cuda":
                    torch.cuda.set_device(self._runtime.device)
                outcome.append((work(), None))
            except BaseException as error:
                outcome.append((None, error))

        thread = threading.Thread(target=run, name=f"rollout engine {self.row.name}", daemon=True)
        thread.start()
        thread.join(min(self._deadline, _LAST_SECONDS) if self._is_given_up else self._deadline)
        if not outcome:
            self._is_given_up = True
            raise RunFailure(
                f"{self._label}: {what} did not return within {self._deadline:g} s (90 % of "
                "--distributed-timeout-minutes)"
            )
        [(result, error)] = outcome
        if error is None:
            return cast(T, result)
        if isinstance(error, UserError | RunFailure):
            raise error
        raise RunFailure(f"{self._label}: {what} failed: {_last_line(error)}") from error

    def _digest_of_checked(
        self, rollouts: list[Rollout], requests: list[RolloutRequest], options: SamplingOptions
    ) -> int:
        """A hash of what was drawn, the same on every rank of a replica. RunFailure where it breaks the contract, also
        by values that are of no kind that could be checked.
        """
        version = self._present.version
        if self._capabilities.draws and (self.version is None or version != self.version):
            raise RunFailure(
                f"{self._label} draws with weights of version {version}, and the trainer's are of version "
                f"{self.version}: update_weights must note the version whose weights it has taken"
            )
        try:
            problem = broken_promise(rollouts, requests, options, self.setup.vocab_size, self._capabilities)
            # One that failed is held to its slot alone: what else it carries need not even have a hash.
            ids = [(r.rationale_ids, r.answer_ids) if r.valid else None for r in rollouts if problem is None]
            digest = hash(tuple(ids))
        except Exception as error:
            raise RunFailure(f"{self._label}: what generate returned cannot be checked: {_last_line(error)}") from error
        if problem is not None:
            raise RunFailure(f"{self._label}: {problem}")
        return digest

    def _compare(self, digest: int | None, failure: UserError | RunFailure | None) -> None:
        """Raise on all ranks what one of them met, or that ranks of one model-parallel group drew other rollouts."""
        # Kind and text: an engine's own class of error may have no pickle, or want other arguments.
        problem = None if failure is None else (isinstance(failure, RunFailure), str(failure))
        outcomes: list[tuple] = [()] * self._runtime.world_size
        dist.all_gather_object(outcomes, (problem, self._runtime.groups.dp.rank(), digest))
        for problem, _, _ in outcomes:
            if problem is not None:
                has_to_stop, text = problem
                raise RunFailure(text) if has_to_stop else UserError(text)
        first: dict[int, tuple[int, int]] = {}
        for rank, (_, replica, digest) in enumerate(outcomes):
            if digest is not None and digest != first.setdefault(replica, (rank, digest))[1]:
                raise RunFailure(
                    f"{self._label}: rank {rank} and rank {first[replica][0]} hold one replica and drew different "
                    "rollouts; declare every_rank=False in its row, and one rank draws for both"
                )

    def _raise(self, failure: UserError | RunFailure | None, taken: str | None) -> None:
        if failure is not None:
            raise failure
        if taken is not None:
            raise RunFailure(f"{self._label}: update_weights {taken}")


class Handover:
    """The policy's tensors on their way to an engine: given out once, counted, and gathered to the end in any case.

    An engine that was given up may still stand in its thread, in the middle of a tensor: one thread at a time gathers,
    and after `finish` begins the engine gets no more.
    """

    def __init__(self, weights: Iterator[tuple[str, Tensor]]):
        self._weights, self._calls, self._taken = weights, 0, 0
        self._lock, self._is_over = threading.Lock(), False

    def _next(self) -> tuple[str, Tensor] | None:
        with self._lock:
            return next(self._weights, None)

    def once(self) -> Iterator[tuple[str, Tensor]]:
        self._calls += 1
        while not self._is_over and (item := self._next()) is not None:
            self._taken += 1
            yield item

    def finish(self, *, needed: bool) -> str | None:
        """Gather what is left; every rank does, so that none waits. needed: say what the engine left untaken."""
        self._is_over, left = True, 0
        while self._next() is not None:
            left += 1
        if not needed or (self._calls == 1 and not left):
            return None
        if self._calls > 1:
            return "called named_weights twice; the tensors are handed over once"
        total = self._taken + left
        return f"took {self._taken} of the policy's {total} tensors; it must read named_weights() to its end"


def _last_line(error: BaseException) -> str:
    """ "ValueError: no (my_engine.py:12)"."""
    line = traceback.format_exception_only(error)[-1].strip()
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    return f"{line} ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else line
