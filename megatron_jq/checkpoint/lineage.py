"""F4: which checkpoints a run's present state descends from. Pure functions of manifests.

A run that is resumed from step 5 although it had saved step 21 leaves a branch: what it saves from then on does not
descend from step 21. A manifest's `branches` are (name, step at which it began), oldest first; a checkpoint lies on the
last one. So it descends from every checkpoint of an earlier branch up to the step where the next one began.
"""

import uuid
from collections.abc import Iterable
from typing import Protocol, TypeVar

#: Branch of checkpoints that were written before there were names.
UNNAMED = ""
Branches = list[list]  # [[name, first step], …]; lists, as JSON has them


class Saved(Protocol):
    """What a manifest says of the run that wrote it."""

    @property
    def step(self) -> int: ...
    @property
    def branches(self) -> Branches | None: ...
    @property
    def run(self) -> dict | None: ...
    @property
    def written(self) -> float | None: ...


S = TypeVar("S", bound=Saved)


def branches_of(saved: Saved) -> Branches:
    return saved.branches or [[UNNAMED, 0]]


def new_branch(step: int) -> list:
    return [uuid.uuid4().hex[:8], step]


def descends(newest: Saved, other: Saved) -> bool:
    """Whether `newest` is `other` or was trained on from it."""
    branches = branches_of(newest)
    ends = [*(first for _, first in branches[1:]), newest.step]
    name = branches_of(other)[-1][0]
    return any(name == branch and other.step <= end for (branch, _), end in zip(branches, ends, strict=True))


def resumed_branches(parent: Saved, others: Iterable[Saved]) -> Branches:
    """Return the branches of what a run saves after `parent`: a new one where its branch has later checkpoints."""
    branches = branches_of(parent)
    name = branches[-1][0]
    left = any(other.step > parent.step and branches_of(other)[-1][0] == name for other in others)
    return [*branches, new_branch(parent.step)] if left else branches


def same_run(saved: Saved, other: Saved) -> bool:
    """Whether one run wrote both. One without an id counts where the other's branches begin without a name: a run that
    is older than ids resumed it.
    """
    ids = [None if manifest.run is None else manifest.run["id"] for manifest in (saved, other)]
    if None not in ids or ids == [None, None]:
        return ids[0] == ids[1]
    return all(branches_of(manifest)[0][0] == UNNAMED for manifest in (saved, other))


def latest(saved: Iterable[S]) -> S:
    """Return the one that was written last; of those that do not say when, the highest step."""
    return max(saved, key=lambda manifest: (manifest.written or 0.0, manifest.step))
