"""A two-node Slurm on this machine, in namespaces that go away with their first process (cluster.sh)."""

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_TOOLS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "ip", "unshare", "nsenter")
_NAMESPACES = ("--net", "--mount", "--uts", "--pid")
_PR_SET_PDEATHSIG = 1
HERE = Path(__file__).resolve().parent
LAUNCH = HERE.parents[1] / "launch"
#: What of the tester's own environment must not reach a job.
_FOREIGN = re.compile("SLURM_|SBATCH_|MASTER_|(LOCAL_)?RANK$|WORLD_SIZE$|NEMORUN_")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def why_not() -> str | None:
    """Why no cluster can be made here; None where it can."""
    if os.geteuid() != 0:
        return "a Slurm of two nodes needs root"
    path = _environment()["PATH"]
    missing = [tool for tool in _TOOLS if shutil.which(tool, path=path) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: slurmctld slurmd slurm-client munge iproute2)"
    flags = [*_NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
    command = ["unshare", *flags, "ip", "link", "add", "bridge0", "type", "bridge"]
    tried = subprocess.run(command, capture_output=True, env=_environment())
    return "namespaces with a network of their own are not allowed here" if tried.returncode else None


def slurm_version() -> str:
    """Return "slurm-wlm 24.11.5"; empty where there is no Slurm."""
    program = shutil.which("slurmctld", path=_environment()["PATH"])
    return subprocess.run([program, "-V"], capture_output=True, text=True).stdout.strip() if program else ""


@dataclass(frozen=True)
class Job:
    """What `scontrol show job` says of a job."""

    number: str
    state: str
    code: int  # exit code of the batch script
    restarts: int
    fields: dict[str, str]

    @property
    def ended(self) -> bool:
        return self.state in ENDED


class Cluster:
    """Up while entered. Commands run inside its namespaces, on the controller's host `ctl`."""

    def __init__(self, folder: Path, *, nodes: int = 2, cpus: int = 16, gpus: int = 8):
        self.folder, self.nodes = folder, nodes
        self._sizes = [str(nodes), str(cpus), str(gpus)]

    def __enter__(self) -> "Cluster":
        self.folder.mkdir(parents=True)
        command = ["unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc", str(HERE / "cluster.sh")]
        with (self.folder / "cluster.out").open("wb") as out:
            self._outer = subprocess.Popen(
                [*command, str(self.folder), *self._sizes],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=_environment(),
                preexec_fn=_die_with_parent,
            )
        try:
            self.until(lambda: (self.folder / "ready").exists(), 60, "the cluster")
            (self._first,) = psutil.Process(self._outer.pid).children()
            self.until(lambda: self.idle_nodes() == self.nodes, 60, "idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        """End everything, and wait until nothing is left."""
        inside = psutil.Process(self._outer.pid).children(recursive=True) if self._outer.poll() is None else []
        self._outer.kill()  # its child goes with it (--kill-child), and with that, the first one, the whole tree
        self._outer.wait()
        _, alive = psutil.wait_procs(inside, timeout=30)
        assert not alive, alive

    def run(
        self, *command: str | Path, timeout: float = 60, check: bool = True, cwd: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """A command inside, with these variables."""
        inside = ["nsenter", f"--target={self._first.pid}", *_NAMESPACES, f"--wdns={cwd or '/'}", "--", *command]
        environment = {**_environment(), "SLURM_CONF": str(self.folder / "slurm.conf"), **variables}
        done = subprocess.run(inside, capture_output=True, text=True, timeout=timeout, env=environment)
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def sbatch(self, script: str, *arguments: str, flags: tuple[str, ...] = (), cwd: Path, **variables: str) -> str:
        """Submit launch/slurm/SCRIPT as it is. Returns the job's number."""
        path = LAUNCH / "slurm" / script
        done = self.run("sbatch", "--parsable", *flags, str(path), *arguments, cwd=cwd, **variables)
        return done.stdout.strip()

    def job(self, number: str) -> Job:
        text = self.run("scontrol", "show", "job", number).stdout
        fields = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", text))
        code, _, number_of_signal = fields["ExitCode"].partition(":")
        return Job(
            number,
            fields["JobState"],
            int(code) or (128 + int(number_of_signal) if int(number_of_signal) else 0),
            int(fields["Restarts"]),
            fields,
        )

    def wait(self, number: str, seconds: float = 240) -> Job:
        """Until a job has ended for good."""
        jobs: list[Job] = []

        def ended() -> bool:
            jobs[:] = [self.job(number)]
            return jobs[0].ended

        self.until(ended, seconds, f"the end of job {number}", every=0.5)
        return jobs[0]

    def clear(self) -> None:
        """End all jobs, whatever became of their processes."""
        left = self.run("squeue", "--noheader", "--format=%A").stdout.split()
        if left:
            self.run("scancel", *left)
            self.until(lambda: not self.run("squeue", "--noheader").stdout.strip(), 60, "an empty queue", every=0.2)

    def idle_nodes(self) -> int:
        done = self.run("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N", check=False)
        return len(set(done.stdout.split()))

    def kill_node(self, name: str) -> None:
        """As if its power had failed."""
        (child,) = self._node(name).children()
        child.kill()

    def start_node(self, name: str) -> None:
        (self.folder / f"start-{name}").touch()

    def in_node(self, name: str, *command: str) -> None:
        """A command in a node's own namespaces."""
        (child,) = self._node(name).children()
        subprocess.run(["nsenter", f"--target={child.pid}", *_NAMESPACES, "--", *command], check=True, timeout=30)

    def _node(self, name: str) -> psutil.Process:
        """The `unshare` that holds a node, by its number in the cluster's own process namespace."""
        inner = int((self.folder / f"{name}.pid").read_text())
        for process in self._first.children():
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except FileNotFoundError:  # another child, which just ended
                continue
            numbers = re.search(r"^NSpid:(.*)$", status, re.MULTILINE)[1].split()
            if int(numbers[-1]) == inner:
                return process
        raise AssertionError(f"no process holds {name}")

    def ranks(self) -> dict[int, tuple[psutil.Process, str]]:
        """{rank: (its process, its node's name)} of the running job."""
        processes = {}
        for process in self._first.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if "RANK" in environment and is_rank(process):
                    processes.setdefault(int(environment["RANK"]), (process, environment["SLURMD_NODENAME"]))
        return processes

    def until(self, true: Callable[[], bool], seconds: float, what: str, every: float = 0.05) -> None:
        """Wait for a condition; a deadline fails the test with what the cluster's logs say."""
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end or self._outer.poll() is not None:
                raise AssertionError(f"{what} did not come within {seconds} s\n{self.words()}")
            time.sleep(every)

    def words(self) -> str:
        """The ends of all logs."""
        files = [self.folder / "cluster.out", *sorted(self.folder.glob("log/*"))]
        return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-3000:]}" for path in files if path.exists())


def is_rank(process: psutil.Process) -> bool:
    """Whether a process is a rank itself, and none of a rank's helpers or launchers."""
    return process.cmdline()[1:3] == ["-m", "megatron_jq"] or process.cmdline()[1:4] == ["-u", "-m", "megatron_jq"]


def _environment() -> dict[str, str]:
    """The tester's own, with the folders of daemons, which not every root has on the path."""
    environment = {name: value for name, value in os.environ.items() if not _FOREIGN.match(name)}
    return {**environment, "PATH": f"{environment.get('PATH', os.defpath)}:/usr/sbin:/sbin"}


def _die_with_parent() -> None:
    """The kernel kills this process when the tests' ends, even if that is killed itself."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def leaves_nothing_behind(folder: Path) -> Iterator[None]:
    """Assert that a cluster in `folder` leaves no process, mount, network device, namespace or line in /etc/hosts."""
    before = left_by(folder)
    yield
    after = left_by(folder)
    assert after == before, {name: after[name] ^ was for name, was in before.items()}


def left_by(folder: Path) -> dict[str, set[str]]:
    """What is on this machine of a cluster in `folder`, and what of it cannot be told from others'."""
    netns = Path("/run/netns")
    return {
        "processes": set(_processes(str(folder / "slurm.conf"))),
        "mounts": {line for line in Path("/proc/self/mounts").read_text().splitlines() if str(folder) in line},
        "devices": set(os.listdir("/sys/class/net")),
        "namespaces": set(os.listdir(netns)) if netns.exists() else set(),
        "hosts": set(Path("/etc/hosts").read_text().splitlines()),
    }


def _processes(slurm_conf: str) -> Iterator[str]:
    """The cluster's daemons, its jobs, and all that they started: Slurm's configuration is in their environment."""
    for process in psutil.process_iter(["name"]):
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SLURM_CONF") == slurm_conf:
                yield f"{process.info['name']} {process.pid}"
