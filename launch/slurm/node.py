#!/usr/bin/env python3
"""One task of a job's step: the ranks of a node under torchrun, or one rank; Slurm's variables say where it stands.

    node.py --launcher torchrun|tasks --ranks-per-node N --records DIR -- train --q 0.75 …

What follows `--` goes to megatron-jq. SIGUSR1 to this process is passed on to the ranks alone, and to each only once it
handles the signal: torchrun would die of it, and so would a rank that still imports or a helper of a rank. Its number
is in DIR/agents/NODE.TASK, for `kill`: Slurm's own signals go to every process of a step.

SIGTERM, by which Slurm asks for the nodes, is passed on in the same way and leaves a file DIR/told/NODE.TASK. From then
on the ranks have all the time that Slurm gives them: torchrun's own handler would kill them after 30 s. Where no rank
runs yet, this process ends with code 143.

A rank that fails leaves a file DIR/failures/RANK: "class time exit-code rank node". Class 0: it failed by itself.
1: exit code 3, which may be for a peer that went away. 2: it was told to end. The least of them is the job's cause.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

#: megatron-jq's code for a run that had to stop.
_RUN_FAILURE = 3
_PR_SET_PDEATHSIG = 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launcher", choices=("torchrun", "tasks"), required=True)
    parser.add_argument("--ranks-per-node", type=int, required=True, metavar="N")
    parser.add_argument("--records", type=Path, required=True, metavar="DIR")
    parser.add_argument("command", nargs="+", help="megatron-jq's command and flags")
    args = parser.parse_args()
    run = run_torchrun if args.launcher == "torchrun" else run_task
    try:
        failures = run(args)
    except ToldToEnd:
        failures = {first_rank(args): 128 + signal.SIGTERM}
    for rank, code in failures.items():
        record(args.records / "failures", rank, code)
    return min(failures.values(), key=failure_class, default=0)


class ToldToEnd(SystemExit):
    """SIGTERM came while no rank ran."""


def first_rank(args: argparse.Namespace) -> int:
    """The least rank of this process."""
    if args.launcher == "tasks":
        return int(os.environ["SLURM_PROCID"])
    return int(os.environ["SLURM_NODEID"]) * args.ranks_per_node


def run_torchrun(args: argparse.Namespace) -> dict[int, int]:
    """All ranks of this node; {rank: exit code} of those that failed."""
    pass_on(ranks_below_this_process, args.records)
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig
    from torch.distributed.run import main as torchrun

    environ, node_rank = os.environ, int(os.environ["SLURM_NODEID"])
    flags = {
        "nnodes": environ["SLURM_STEP_NUM_NODES"],
        "nproc-per-node": args.ranks_per_node,
        "rdzv-backend": "c10d",
        "rdzv-endpoint": f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}",
        # A restarted job's agents must not meet those of the attempt before.
        "rdzv-id": f"{environ['SLURM_JOB_ID']}.{environ.get('SLURM_RESTART_COUNT', '0')}",
        # Said, not guessed: torchrun compares host names, which fails where a host has several.
        "rdzv-conf": f"is_host={node_rank == 0},join_timeout=300",
        "local-addr": environ["MASTER_ADDR"] if node_rank == 0 else environ["SLURMD_NODENAME"],
        "max-restarts": 0,
    }
    if hasattr(LaunchConfig, "signals_to_handle"):
        flags["signals-to-handle"] = "SIGINT,SIGHUP,SIGQUIT"  # SIGTERM is ours
    else:
        print("warning: this torch kills ranks 30 s after SIGTERM; LAUNCHER=tasks does not", file=sys.stderr)
    try:
        torchrun([*(f"--{name}={value}" for name, value in flags.items()), "-m", "megatron_jq", *args.command])
    except ChildFailedError as error:
        return {rank: as_shell_code(failure.exitcode) for rank, failure in error.failures.items()}
    except SignalException as error:
        return {first_rank(args): 128 + error.sigval}
    except (RendezvousError, DistError) as error:  # the nodes did not meet
        print(f"[{environ['SLURMD_NODENAME']}] torchrun: {type(error).__name__}: {error}", file=sys.stderr)
        return {first_rank(args): 1}
    return {}


def run_task(args: argparse.Namespace) -> dict[int, int]:
    """The one rank that this task is."""
    environ = os.environ
    rank = environ["RANK"] = environ["SLURM_PROCID"]
    environ.update(
        WORLD_SIZE=environ["SLURM_STEP_NUM_TASKS"],
        LOCAL_RANK=environ["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(args.ranks_per_node),
    )
    # In a session of its own: what is meant for this process's group is not meant for the rank's.
    child = subprocess.Popen(
        [sys.executable, "-m", "megatron_jq", *args.command], start_new_session=True, preexec_fn=die_with_parent
    )
    pass_on(lambda: [child.pid], args.records)
    code = as_shell_code(child.wait())
    return {int(rank): code} if code else {}


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, however that comes about."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def ranks_below_this_process() -> list[int]:
    """Process ids of torchrun's workers, which run in this process's children."""
    pids = []
    for child in psutil.Process().children():
        try:
            if "RANK" in child.environ():
                pids.append(child.pid)
        except psutil.Error:
            continue  # it ended meanwhile
    return pids


def pass_on(ranks: Callable[[], list[int]], records: Path) -> None:
    """On SIGUSR1 or SIGTERM: send it once to each of `ranks()`, as soon as it has a handler for it.

    Announces this process.
    """
    task = f"{os.environ['SLURMD_NODENAME']}.{os.environ['SLURM_LOCALID']}"
    (records / "told").mkdir(exist_ok=True)
    asked = {number: threading.Event() for number in (signal.SIGUSR1, signal.SIGTERM)}
    told: dict[int, set[int]] = {number: set() for number in asked}

    def receive(number: int, frame: object) -> None:
        if number == signal.SIGTERM:
            (records / "told" / task).touch()
            if not ranks():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                raise ToldToEnd
            # At once: most get it from Slurm as well, and take it for the same one only if it is not a second later.
            tell(number, ranks(), told[number])
        asked[number].set()

    for number in asked:
        signal.signal(number, receive)
        threading.Thread(target=deliver, args=(number, asked[number], ranks, told[number]), daemon=True).start()
    (records / "agents" / task).write_text(f"{os.getpid()}\n", encoding="utf-8")


def deliver(number: int, asked: threading.Event, ranks: Callable[[], list[int]], told: set[int]) -> None:
    """Once `asked` is set: send a signal to each rank, whenever it gets a handler for it."""
    asked.wait()
    while True:
        tell(number, ranks(), told)
        time.sleep(0.2)


def tell(number: int, ranks: list[int], told: set[int]) -> None:
    """Send a signal to those that handle it and were not told."""
    for pid in ranks:
        if pid not in told and handles(pid, number):
            told.add(pid)
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(pid, number)


def handles(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:  # it has ended
        return False
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def as_shell_code(code: int) -> int:
    """Popen's exit code as a shell gives it: 137 for a process that SIGKILL ended."""
    return 128 - code if code < 0 else code


def failure_class(code: int) -> int:
    """0: failed by itself; 1: perhaps because of a peer; 2: told to end by a launcher."""
    return {128 + signal.SIGTERM: 2, _RUN_FAILURE: 1}.get(code, 0)


def record(folder: Path, rank: int, code: int) -> None:
    line = f"{failure_class(code)} {time.time():.3f} {code} {rank} {os.environ['SLURMD_NODENAME']}\n"
    (folder / str(rank)).write_text(line, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
