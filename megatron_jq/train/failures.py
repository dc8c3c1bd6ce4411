"""F4: how a run that cannot continue stops: on every rank, naming step and phase, with the batch kept on disk."""

import contextlib
import faulthandler
import json
import re
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_jq.errors import PeerFailure, RunFailure
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.records import Example, TrainingSequence


@dataclass
class Phase:
    """What this process is doing, in the words of an error message: "set-up", "step 3, phase score"."""

    now: str = "set-up"
    since: float = field(default_factory=time.monotonic)

    def enter(self, what: str) -> None:
        """Of a command without steps. What it says is an error message's; nobody asks since when."""
        self.now = what

    def enter_phase(self, step: int, name: str) -> None:
        self.now, self.since = f"step {step}, phase {name}", time.monotonic()


@contextlib.contextmanager
def peers_must_answer(phase: Phase, deadline: timedelta, missing_peers: Callable[[], str] = str) -> Iterator[None]:
    """Turn a collective that failed into PeerFailure with the phase; every other fault passes as it is.

    missing_peers: which they are, as far as somebody knows (Watch). One that does not answer in time may stand where
    this rank does: then all Python stacks go to standard error first.

    For gloo, and for the rendezvous of any backend. NCCL's own watchdog ends the process at the deadline, naming rank
    and collective: no exception comes up here.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        # gloo raises a plain RuntimeError; the path of its source in the text is all that tells it from a fault of ours
        if isinstance(error, RunFailure) or not (isinstance(error, dist.DistError) or re.search(r"\bgloo\b", text)):
            raise
        cause = re.sub(r"^\[\S+\] ", "", text.splitlines()[0]).partition(". This is typically")[0].rstrip(".")
        late = re.search(r"time(d )?[- ]?out", text, re.IGNORECASE)
        within = f"{deadline.total_seconds():g} s (--distributed-timeout-minutes)"
        fault = f"a peer did not answer within {within}" if late else "a peer ended or was cut off"
        if late:
            show_stacks()
        advice = missing_peers() or "look at the rank that gives another reason, or none"
        raise PeerFailure(f"{phase.now}: {fault}: {cause}; this is {socket.gethostname()}; {advice}") from error


def show_stacks() -> None:
    """Every thread's Python stack to standard error."""
    sys.stderr.flush()
    if sys.__stderr__ is not None:
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)


@dataclass
class NonFinite(Exception):
    """A quantity of a step is not finite, on every rank. sequences: this replica's, of which it was computed."""

    what: str
    sequences: list[TrainingSequence]


def check_finite(what: str, values: torch.Tensor, sequences: list[TrainingSequence]) -> None:
    """Raise NonFinite unless all of `values`, which are alike on all ranks, are finite."""
    if not torch.isfinite(values).all():
        raise NonFinite(what, sequences)


def non_finite(
    what: str, step: int, prompts: Iterable[Example], sequences: list[TrainingSequence], runtime: Runtime, run_dir: Path
) -> RunFailure:
    """The failure to raise for a quantity that is not finite, on every rank, once rank 0 has written the batch.

    sequences: this replica's. The batch goes to run_dir/nonfinite_step_NNNNNNN.json.
    """
    sequences_of_ranks: list[list[TrainingSequence]] = [[]] * runtime.world_size
    dist.all_gather_object(sequences_of_ranks, sequences)
    path = run_dir / f"nonfinite_step_{step:07d}.json"
    place = f"the batch is in {path}"
    if runtime.is_main:
        unique = {(s.prompt_slot, s.rationale_slot): s for replica in sequences_of_ranks for s in replica}
        batch = {
            "step": step,
            "quantity": what,
            "prompts": [{"index": p.index, "prompt": p.prompt_text, "answer": p.answer_text} for p in prompts],
            "sequences": [vars(unique[slot]) for slot in sorted(unique)],
        }
        try:
            path.write_text(json.dumps(batch), encoding="utf-8")
        except OSError as fault:  # the run's own fault is the one to tell, and the others wait below
            place = f"the batch could not be kept in {path}: {fault.strerror}"
    dist.barrier()  # a launcher ends all ranks once the first has left: none leaves before the batch is on disk
    ids = [p.index for p in prompts]
    return RunFailure(f"step {step}: {what} is not finite; prompts {ids}; {place}")
