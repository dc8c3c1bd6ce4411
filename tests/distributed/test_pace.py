"""Ranks' times are compared alike everywhere, and a slow rank is named."""

import socket

from megatron_jq.train.pace import PHASES, PaceMaker
from tests.distributed.ranks import run_ranks

EVEN, UNEVEN = [(1.0, 2.0, 3.0), (1.1, 2.2, 3.1), (0.9, 2.1, 3.2)], [(4.0, 1.0, 9.0), (9.5, 1.4, 9.1), (4.2, 0.1, 9.2)]


def _compare(runtime, tables):
    pace = PaceMaker(runtime)
    return [pace.compare(dict(zip(PHASES, table[runtime.rank], strict=True))) for table in tables]


def test_a_rank_far_behind_the_median_is_named_and_even_ranks_are_not():
    ranks = run_ranks(_compare, [EVEN, UNEVEN], dp=3)
    assert ranks[0] == ranks[1] == ranks[2]
    even, uneven = ranks[0]
    assert even.median == (1.0, 2.1, 3.1) and even.slowest == (1.1, 2.2, 3.2) and even.remark is None
    assert uneven.median == (4.2, 1.0, 9.1) and uneven.slowest == (9.5, 1.4, 9.2)
    assert uneven.remark == f"slow: rollout took 9.5 s on rank 1 ({socket.gethostname()}), 4.2 s elsewhere"
