"""F4: says when an update made a policy worse than any difference between prompts explains.

Steps have different prompts, so ln P per answer token is compared, and with many earlier steps: a batch of hard prompts
after an easy one is no fall.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

#: Earlier steps whose spread a step is compared with.
STEPS = 32
#: Nats per answer token, and factor, by which a fallen step lies below all of these. A policy whose logits differ by
#: some tens gives its least likely token -50.
_NATS, _FACTOR = 50.0, 10.0
#: Nats per answer token below which no policy lies that an update has not destroyed.
_DESTROYED = -1000.0


@dataclass(frozen=True)
class Fall:
    """A step whose ln P per answer token (`now`, nats) is far below `before`, the lowest of the earlier `steps`."""

    now: float
    before: float
    steps: int

    @property
    def destroyed(self) -> bool:
        """Whether the weights are no policy any more."""
        return self.now < _DESTROYED

    def __str__(self) -> str:
        earlier = "that of the step before" if self.steps == 1 else f"the lowest of the last {self.steps} steps"
        return f"{self.now:.4g} per answer token, from {self.before or 0.0:.4g}, {earlier}"


class FallWatch:
    """Finds falls. Each is reported once: at its first step, or, where it is no deeper than one that proved to be the
    prompts' (ln P came back), at its second in a row. `recent` is what a resumed run needs of it.
    """

    def __init__(self, recent: Iterable[float] = ()):
        self._recent = deque(recent, maxlen=STEPS)  # nats per answer token, fallen steps not among them
        self._fallen, self._reported, self._deepest = 0, False, 0.0

    @property
    def recent(self) -> list[float]:
        return list(self._recent)

    def judge(self, now: float) -> Fall | None:
        """Return the fall to report. now: ln P per answer token of this step, nats, finite."""
        before = min(self._recent, default=now)
        if now >= min(before - _NATS, before * _FACTOR):
            self._recent.append(now)
            self._fallen, self._reported = 0, False
            return None
        fall = Fall(now, before, len(self._recent))
        self._fallen += 1
        if not fall.destroyed:
            if self._reported or (self._fallen == 1 and now >= self._deepest):
                return None
            self._reported, self._deepest = True, min(self._deepest, now)
        return fall
