"""F4: what is wrong with a job's nodes, from what they say of themselves. Pure, but for a look at the marks."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from megatron_jq.errors import RunFailure
from megatron_jq.files import inside
from megatron_jq.preflight.facts import SHARED_MEMORY, Facts


@dataclass(frozen=True)
class Limits:
    """What every node must have."""

    gpus: int  # at least; 0: not checked
    free_disk: float  # GiB
    shared_memory: float  # GiB
    clock_skew: float  # seconds from the median node


@dataclass(frozen=True)
class Reading:
    """A node's clock minus the meeting point's, in seconds, and how far off that may be (half a round trip)."""

    skew: float
    error: float


def faults(nodes: Sequence[str], facts: dict[str, Facts], clocks: dict[str, Reading], limits: Limits) -> list[str]:
    """One line a fault, each begins with the node's name. facts, clocks: of the nodes that reported."""
    found = [f"{node}: did not report" for node in nodes if node not in facts]
    present = [facts[node] for node in nodes if node in facts]
    for node in present:
        found += [f"{node.node}: {trouble}" for trouble in node.troubles]
        found += _too_little(node, limits)
    found += _odd_ones(present, "source commit", {node.node: node.commit for node in present})
    found += _odd_ones(present, "source digest", {node.node: node.sources for node in present})
    names = [name for name, _ in present[0].versions] if present else []
    for name in names:
        found += _odd_ones(present, name, {node.node: dict(node.versions).get(name, "-") for node in present})
    return found + _wrong_clocks(clocks, limits.clock_skew)


def unseen_marks(facts: dict[str, Facts], run_dir: Path) -> list[str]:
    """Nodes whose file in the run directory this node does not see: they write to another file system."""
    marks = {name: node.mark for name, node in facts.items() if node.mark is not None}
    return [
        f"{name}: run directory {run_dir} is not shared: what it writes there is not seen on the first node"
        for name, mark in marks.items()
        if not inside(run_dir, mark, name, RunFailure).exists()
    ]


def _too_little(node: Facts, limits: Limits) -> list[str]:
    found = []
    if node.gpus < limits.gpus:
        found.append(f"{node.node}: {node.gpus} of {limits.gpus} GPUs (nvidia-smi, CUDA_VISIBLE_DEVICES)")
    for what, there, wanted in (
        ("free disk for the run directory", node.free_disk, limits.free_disk),
        (f"free shared memory in {SHARED_MEMORY}", node.shared_memory, limits.shared_memory),
    ):
        if there is not None and there < wanted:
            found.append(f"{node.node}: {there:.2f} GiB of {what}, {wanted:g} wanted")
    return found


def _odd_ones(present: Sequence[Facts], what: str, values: dict[str, str]) -> list[str]:
    """Nodes whose value is not the commonest. Of equally common ones the first node's counts as right."""
    if len(set(values.values())) < 2:
        return []
    counts = Counter(values[node.node] for node in present)
    usual, number = counts.most_common(1)[0]
    return [
        f"{name}: {what} {value}, but {usual} on {number} node(s)" for name, value in values.items() if value != usual
    ]


def _wrong_clocks(clocks: dict[str, Reading], allowed: float) -> list[str]:
    if not clocks:
        return []
    middle = median(reading.skew for reading in clocks.values())
    off = {name: (reading.skew - middle, reading.error) for name, reading in clocks.items()}
    return [
        f"{name}: clock {skew:+.1f} s from the other nodes', {allowed:g} allowed"
        for name, (skew, error) in off.items()
        if abs(skew) - error > allowed
    ]
