"""F5: `megatron-jq preflight`: every node of a job checks itself and meets the others, before any rank starts."""

import argparse
import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from pathlib import Path

from megatron_jq.cli.parser import CommandParser, as_path
from megatron_jq.errors import RunFailure, UserError
from megatron_jq.preflight.facts import Facts, find_facts
from megatron_jq.preflight.meeting import Host, report
from megatron_jq.preflight.verdict import CHECKS, Fault, Limits, faults, unseen_marks

#: Longer than any wait after --timeout (meeting.report).
_HUNG_SECONDS = 15.0
#: In the run directory: a line per job that started although a waived check found something.
WAIVED = "preflight-waived.jsonl"


def parser() -> argparse.ArgumentParser:
    flags = CommandParser(
        prog="megatron-jq preflight",
        description="Start it on every node of a job. The nodes meet where the ranks will meet and compare themselves: "
        "versions, source commit, GPUs, free disk and shared memory, clocks, a run directory that all can write. "
        "Exit code 3, with a line for every fault that names its node, where one cannot do its part.",
        epilog="Environment: MASTER_ADDR, MASTER_PORT; SLURMD_NODENAME and SLURM_JOB_ID where they are set.",
        allow_abbrev=False,
    )
    flags.add_argument("--nodes", metavar="LIST", help="all nodes' names, by commas, the first one is the host")
    flags.add_argument("--node", metavar="NAME", help="this one (default: SLURMD_NODENAME, or the host name)")
    flags.add_argument("--run-dir", required=True, type=as_path, metavar="DIR", help="that all nodes will write to")
    flags.add_argument("--gpus-per-node", type=_count, default=0, metavar="N", help="at least; 0: not checked (0)")
    flags.add_argument("--min-free-disk", type=_amount, default=10.0, metavar="GIB", help="for the run directory (10)")
    flags.add_argument("--min-shared-memory", type=_amount, default=1.0, metavar="GIB", help="in /dev/shm (1)")
    flags.add_argument("--max-clock-skew", type=_amount, default=2.0, metavar="S", help="from the median node (2)")
    flags.add_argument("--timeout", type=_amount, default=30.0, metavar="S", help="for all nodes to report (30)")
    flags.add_argument(
        "--waive", action="append", default=[], choices=CHECKS, metavar="CHECK",
        help="start although this check finds something, which is logged and recorded in the run directory's "
        f"{WAIVED}; may be repeated: {', '.join(CHECKS)}",
    )  # fmt: skip
    return flags


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")
    return int(text)


def _amount(text: str) -> float:
    """Parse a number of at least 0. Not a number and infinity are refused: such a wait would not end."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def run_preflight(argv: list[str]) -> int:
    """Return 0, or 3 where a node is unfit. The first node prints why, others only what keeps them from it."""
    args = parser().parse_args(argv)
    node = args.node or os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    nodes = args.nodes.split(",") if args.nodes else [node]
    if node not in nodes:
        raise UserError(f"preflight: --nodes {args.nodes} does not name this node, {node}")
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not address or not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise UserError("preflight: set MASTER_ADDR and MASTER_PORT, the host and the port where the ranks will meet")
    # A restarted job's key is another one: its nodes must not meet those of the attempt before.
    key = f"{os.environ.get('SLURM_JOB_ID', '-')}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    deadline = time.monotonic() + args.timeout
    host = Host(int(port), key, nodes, deadline, time.time) if node == nodes[0] else None
    facts = None
    # No deadline of Python's ends the wait for a file system that does not answer: this one does, with the stacks.
    faulthandler.dump_traceback_later(args.timeout + _HUNG_SECONDS, exit=True, file=sys.__stderr__)
    try:
        facts = find_facts(node, args.run_dir)
        if host is None:
            return 3 if report(address, int(port), key, facts, deadline, time.time) else 0
        return _as_host(host, nodes, args, address, key, facts, deadline)
    finally:
        if facts is not None and facts.mark is not None:
            (args.run_dir / facts.mark).unlink(missing_ok=True)
        faulthandler.cancel_dump_traceback_later()


def _how_to_waive(serious: list[Fault]) -> list[str]:
    checks = dict.fromkeys(fault.check for fault in serious if fault.check is not None)
    flags = " ".join(f"--waive {check}" for check in checks)
    return [f"preflight: to start all the same: {flags} (in a job: PREFLIGHT_FLAGS)"] if checks else []


def _record(waived: list[Fault], run_dir: Path, key: str) -> None:
    """Print and record what was waived."""
    for fault in waived:
        print(f"preflight: waived ({fault.check}): {fault}")
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "start": key, "waived": waived}
    with (run_dir / WAIVED).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _as_host(
    host: Host, nodes: list[str], args: argparse.Namespace, address: str, key: str, own_facts: Facts, deadline: float
) -> int:
    # This node reports as all do: so the address is known to lead here. Without that no other one will come.
    failure: list[RunFailure] = []

    def report_own() -> None:
        try:
            report(address, host.port, key, own_facts, deadline, time.time)
        except RunFailure as error:
            failure.append(error)
            host.stop_waiting()

    thread = threading.Thread(target=report_own, daemon=True)
    thread.start()
    host.wait()
    limits = Limits(args.gpus_per_node, args.min_free_disk, args.min_shared_memory, args.max_clock_skew)
    lines = faults(nodes, host.facts, host.clocks, limits) + unseen_marks(host.facts, args.run_dir)
    waived = [fault for fault in lines if fault.check in args.waive]
    serious = [fault for fault in lines if fault.check not in args.waive]
    host.reply(serious)
    thread.join(1)
    if failure:
        raise failure[0]
    if serious:
        raise RunFailure("\n".join([*(f"preflight: {fault}" for fault in serious), *_how_to_waive(serious)]))
    if waived:
        _record(waived, args.run_dir, key)
    print(f"preflight: {len(nodes)} node(s) fit; commit {own_facts.commit}, sources {own_facts.sources}")
    return 0
