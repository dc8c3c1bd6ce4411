"""Work that ranks do together: what one of them meets ends all of them, with its words, and none waits."""

import pytest

from megatron_jq.errors import RunFailure, UserError
from megatron_jq.parallel.runtime import on_all_ranks
from tests.distributed.ranks import run_ranks

FAULTS = {
    "bad input": (UserError("--flag: bad"), UserError, "--flag: bad"),
    "a run that stops": (RunFailure("step 3: full"), RunFailure, "step 3: full"),
    "the system's own": (OSError(28, "No space left on device", "some/file"), UserError, "some/file: No space left on"),
    "a library's words": (OSError("64 requested and 0 written"), UserError, "a file: 64 requested and 0 written"),
}


def _meet(runtime, faulty: int, main_only: bool):
    """The errors of all faults by name, and what good work gives after them."""
    found = []
    for fault, _, _ in FAULTS.values():

        def work(fault=fault):
            if runtime.rank == faulty:
                raise fault
            return runtime.rank

        try:
            found.append(on_all_ranks(runtime, work, main_only=main_only))
        except (UserError, RunFailure) as error:
            found.append((type(error), str(error)))
    return found, on_all_ranks(runtime, lambda: runtime.rank + 10, main_only=main_only)


@pytest.mark.parametrize(("faulty", "main_only"), [(0, True), (0, False), (1, False)])
def test_a_fault_of_one_rank_is_raised_on_all_with_its_kind_and_words(faulty, main_only):
    for rank, (found, after) in enumerate(run_ranks(_meet, faulty, main_only, dp=2)):
        for (_, kind, words), (found_kind, message) in zip(FAULTS.values(), found, strict=True):
            assert found_kind is kind and message.startswith(words)
        assert after == (rank + 10 if rank == 0 or not main_only else None)


def test_what_rank_0_does_alone_is_asked_of_no_other():
    first, second = run_ranks(_meet, 1, True, dp=2)
    assert first == ([0] * len(FAULTS), 10) and second == ([None] * len(FAULTS), None)
