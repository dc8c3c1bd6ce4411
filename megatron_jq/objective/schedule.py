"""q over training: SFT-then-RLVR is a step from q = 1 to q = 0, one member of a family (arXiv:2604.25907)."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_jq.errors import UserError
from megatron_jq.objective.tsallis import check_q

ScheduleKind = Literal["constant", "step", "linear", "cosine"]


@dataclass(frozen=True)
class QSchedule:
    """How q moves from `start` to `end`.

    num_steps: for `step` the first step that uses `end`; for `linear` and `cosine` the first step that has reached it.
    `constant` has no end, and no use for num_steps. Raises UserError on construction for values outside these rules.
    """

    kind: ScheduleKind
    start: float
    end: float | None = None
    num_steps: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScheduleKind):
            raise UserError(f"unknown q schedule {self.kind!r}: choose one of {', '.join(get_args(ScheduleKind))}")
        check_q(self.start)
        if self.kind == "constant":
            if self.end is not None:
                raise UserError("a constant q schedule has no end value: drop it, or choose step, linear or cosine")
            return
        if self.end is None or self.num_steps is None:
            raise UserError(f"a {self.kind} q schedule needs an end value and a number of steps")
        check_q(self.end)
        if self.num_steps < 1:
            raise UserError(f"a {self.kind} q schedule needs a number of steps of at least 1, got {self.num_steps}")


def q_at(step: int, schedule: QSchedule) -> float:
    """q of the 0-based training step: `start` at step 0 (and before), `end` from num_steps on, exactly.

    linear moves by equal amounts a step; cosine is half a period, flat at both ends. A pure function of its arguments,
    so a resumed run continues where it stopped. A run of T steps sees `end` at its last step with num_steps = T - 1.
    """
    start, end = schedule.start, schedule.end
    if schedule.kind == "constant" or step <= 0:
        return start
    if step >= schedule.num_steps:
        return end
    if schedule.kind == "step":
        return start
    progress = step / schedule.num_steps
    if schedule.kind == "cosine":
        progress = (1.0 - math.cos(math.pi * progress)) / 2.0
    value = (1.0 - progress) * start + progress * end
    return min(max(value, min(start, end)), max(start, end))  # rounding must not leave [0, 1]
