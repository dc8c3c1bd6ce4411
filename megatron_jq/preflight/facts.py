"""F4: the facts that a node collects about itself."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_jq.parallel.megatron.versions import find_version, installed_version

#: Distributions whose versions must agree over nodes, where they are installed.
PACKAGES = (
    "megatron-core", "torch", "numpy", "tyro", "sentencepiece", "transformers", "transformer-engine", "triton",
    "nvidia-nccl-cu12", "nvidia-nccl-cu13",
)  # fmt: skip
SHARED_MEMORY = Path("/dev/shm")
_SOURCES = Path(__file__).resolve().parents[1]
_GIB = 2**30


@dataclass(frozen=True)
class Facts:
    """One node's own account. Sizes in GiB; None: could not be read, and the reason is in `troubles`."""

    node: str
    versions: tuple[tuple[str, str], ...]  # (name, version): Python, the driver and PACKAGES
    commit: str  # "-" where the sources are no git checkout, or there is no git
    sources: str  # digest of this package's Python files: what runs, whatever the commit is
    gpus: int
    free_disk: float | None  # of the run directory's file system
    shared_memory: float | None  # free
    mark: str | None  # a file that this node wrote into the run directory
    troubles: tuple[str, ...]
    mig: int = 0  # GPUs that are split into MIG slices, which `gpus` does not count

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Facts":
        raw = json.loads(text)
        versions = tuple((name, version) for name, version in raw.pop("versions"))
        return cls(**{**raw, "versions": versions, "troubles": tuple(raw["troubles"])})


def find_facts(node: str, run_dir: Path) -> Facts:
    """Collect this node's facts. Leaves a file in run_dir (`mark`), which the caller removes."""
    troubles: list[str] = []
    mark = free_disk = shared_memory = None
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        free_disk = shutil.disk_usage(run_dir).free / _GIB
        # A name that nobody looked up before: a network file system may remember for a while that one was not there.
        path = run_dir / f".preflight-{node}-{uuid.uuid4().hex}"
        path.write_text(node, encoding="utf-8")
        mark = path.name
    except OSError as error:
        troubles.append(f"run directory {run_dir} cannot be written: {error.strerror}")
    try:
        shared_memory = shutil.disk_usage(SHARED_MEMORY).free / _GIB
    except OSError as error:
        troubles.append(f"{SHARED_MEMORY}: {error.strerror}")
    gpus, mig, driver = _gpus()
    versions = (("Python", sys.version.split()[0]), ("NVIDIA driver", driver), *_package_versions())
    return Facts(
        node, versions, _commit(), source_digest(_SOURCES), gpus, free_disk, shared_memory, mark, tuple(troubles), mig
    )


def _package_versions() -> list[tuple[str, str]]:
    versions = {name: installed_version(name) for name in PACKAGES}
    versions["megatron-core"] = find_version()
    return [(name, text or "-") for name, text in versions.items()]


def _gpus() -> tuple[int, int, str]:
    """Return (GPUs for this process, those of them that are split into MIG slices, driver version or "-").

    By nvidia-smi: CUDA would take seconds.
    """
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    driver = lines[0].strip() if lines else "-"
    # An old driver does not know the last field: then none of its GPUs is split.
    table = _output("nvidia-smi", "--query-gpu=index,uuid,mig.mode.current", "--format=csv,noheader")
    gpus, mig = count_gpus(table or "?, ?, -\n" * len(lines), os.environ.get("CUDA_VISIBLE_DEVICES"))
    return gpus, mig, driver


def count_gpus(table: str, visible: str | None) -> tuple[int, int]:
    """Return (GPUs that ranks may use, GPUs in MIG mode). table: a line "index, UUID, MIG mode" per GPU.

    Of slices CUDA shows one to a process, whatever there is: where no GPU is whole, they count as one.
    """
    rows = [tuple(field.strip() for field in line.split(",")) for line in table.splitlines() if line.strip()]
    split = [row for row in rows if row[2] == "Enabled"]
    unsplit = len(rows) - len(split)
    if visible is None:
        return unsplit or min(len(split), 1), len(split)
    names = [name.strip() for name in visible.split(",") if name.strip()]
    slices = [name for name in names if name.startswith("MIG-") or any(name in (i, uuid) for i, uuid, _ in split)]
    return min(unsplit, len(names) - len(slices)) or min(len(slices), 1), len(split)


def _commit() -> str:
    """Return HEAD of the checkout that this package lies in, "+" after it where the package was changed since."""
    head = _output("git", "-C", str(_SOURCES), "rev-parse", "--short=12", "HEAD").strip()
    if not head:
        return "-"
    changed = _output("git", "-C", str(_SOURCES), "status", "--porcelain", "--untracked-files=no", "--", ".").strip()
    return f"{head}+" if changed else head


def _output(*command: str) -> str:
    """Return a command's output; empty where it fails, or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def source_digest(folder: Path) -> str:
    """Return 12 digits that stand for the names and contents of a folder's Python files."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:12]
