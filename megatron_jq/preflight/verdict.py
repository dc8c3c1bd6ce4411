"""F4: what is wrong with a job's nodes, judged by their reports. Pure, but for a look at the marks."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from megatron_jq.errors import RunFailure
from megatron_jq.files import inside
from megatron_jq.preflight.facts import PACKAGES, SHARED_MEMORY, Facts


class Fault(str):
    """A line that begins with the node's name, and the check that may be waived for it (none for a missing node)."""

    check: str | None

    def __new__(cls, check: str | None, text: str) -> "Fault":
        fault = super().__new__(cls, text)
        fault.check = check
        return fault


def _check_of_version(name: str) -> str:
    """Return the name of a version's check: nvidia-driver."""
    return name.lower().replace(" ", "-")


#: All checks, by the names that --waive takes.
CHECKS = (
    "gpus", "disk", "shared-memory", "run-directory", "clock", "commit", "sources", "python", "nvidia-driver",
    *PACKAGES,
)  # fmt: skip


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


def faults(nodes: Sequence[str], facts: dict[str, Facts], clocks: dict[str, Reading], limits: Limits) -> list[Fault]:
    """Return one line per fault, which begins with the node's name. facts, clocks: of the nodes that reported."""
    lines = [Fault(None, f"{node}: did not report") for node in nodes if node not in facts]
    present = [facts[node] for node in nodes if node in facts]
    for node in present:
        for trouble in node.troubles:
            check = "shared-memory" if trouble.startswith(str(SHARED_MEMORY)) else "run-directory"
            lines.append(Fault(check, f"{node.node}: {trouble}"))
        lines += _too_little(node, limits)
    commits = {node.node: node.commit for node in present}
    if len({node.sources for node in present}) == 1:
        # The digest shows that the same code runs: a node without git, or a copy without .git, is no difference.
        commits = {name: commit for name, commit in commits.items() if commit != "-"}
    lines += _odd_ones("commit", "source commit", commits)
    lines += _odd_ones("sources", "source digest", {node.node: node.sources for node in present})
    names = [name for name, _ in present[0].versions] if present else []
    for name in names:
        versions = {node.node: dict(node.versions).get(name, "-") for node in present}
        lines += _odd_ones(_check_of_version(name), name, versions)
    return lines + _wrong_clocks(clocks, limits.clock_skew)


def unseen_marks(facts: dict[str, Facts], run_dir: Path) -> list[Fault]:
    """Return the nodes whose file in the run directory this node does not see: they write to another file system."""
    marks = {name: node.mark for name, node in facts.items() if node.mark is not None}
    return [
        Fault(
            "run-directory",
            f"{name}: run directory {run_dir} is not shared: what it writes there is not seen on the first node",
        )
        for name, mark in marks.items()
        if not inside(run_dir, mark, name, RunFailure).exists()
    ]


def _too_little(node: Facts, limits: Limits) -> list[Fault]:
    lines = []
    if node.gpus < limits.gpus:
        slices = f"; {node.mig} GPU(s) are split into MIG slices, of which a process sees one: ask for whole GPUs"
        lines.append(
            Fault(
                "gpus",
                f"{node.node}: {node.gpus} of {limits.gpus} GPUs (nvidia-smi, CUDA_VISIBLE_DEVICES; --gpus-per-node is "
                f"{limits.gpus}){slices if node.mig else ''}",
            )
        )
    for check, resource, free, wanted in (
        ("disk", "free disk for the run directory", node.free_disk, limits.free_disk),
        ("shared-memory", f"free shared memory in {SHARED_MEMORY}", node.shared_memory, limits.shared_memory),
    ):
        if free is not None and free < wanted:
            lines.append(Fault(check, f"{node.node}: {free:.2f} GiB of {resource}, {wanted:g} wanted"))
    return lines


def _odd_ones(check: str, what: str, values: dict[str, str]) -> list[Fault]:
    """Return the nodes whose value is not the commonest. Of equally common ones the first node's counts as right."""
    if len(set(values.values())) < 2:
        return []
    usual, number = Counter(values.values()).most_common(1)[0]
    return [
        Fault(check, f"{name}: {what} {value}, but {usual} on {number} node(s)")
        for name, value in values.items()
        if value != usual
    ]


def _wrong_clocks(clocks: dict[str, Reading], allowed: float) -> list[Fault]:
    if not clocks:
        return []
    middle = median(reading.skew for reading in clocks.values())
    off = {name: (reading.skew - middle, reading.error) for name, reading in clocks.items()}
    return [
        Fault("clock", f"{name}: clock {skew:+.1f} s from the other nodes', {allowed:g} allowed")
        for name, (skew, error) in off.items()
        if abs(skew) - error > allowed
    ]
