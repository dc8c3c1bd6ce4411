"""`megatron-jq preflight`: unfit nodes are named, whatever is wrong with them, and no wait is without an end."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib.metadata import version

import pytest

from megatron_jq.cli.main import main
from megatron_jq.errors import RunFailure
from megatron_jq.preflight import meeting
from megatron_jq.preflight.facts import Facts, count_gpus, find_facts, source_digest
from megatron_jq.preflight.meeting import Host, report
from megatron_jq.preflight.verdict import CHECKS, Limits, Reading, faults, unseen_marks
from tests.ports import free_port

NODES = ("a", "b", "c")
FIT = Facts(
    node="a",
    versions=(("Python", "3.11"), ("torch", "2.13")),
    commit="c0ffee",
    sources="123",
    gpus=8,
    free_disk=100.0,
    shared_memory=10.0,
    mark=None,
    troubles=(),
)
LIMITS = Limits(gpus=8, free_disk=10.0, shared_memory=1.0, clock_skew=2.0)


def verdict(**changes: dict) -> list[str]:
    """Of three nodes, fit but for `changes`: {node: {field: value}}."""
    facts = {node: replace(FIT, node=node, **changes.get(node, {})) for node in NODES}
    return faults(NODES, facts, {}, LIMITS)


def test_fit_nodes_have_no_faults():
    assert verdict() == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"gpus": 7}, "b: 7 of 8 GPUs (nvidia-smi, CUDA_VISIBLE_DEVICES; --gpus-per-node is 8)"),
        ({"free_disk": 9.5}, "b: 9.50 GiB of free disk for the run directory, 10 wanted"),
        ({"shared_memory": 0.25}, "b: 0.25 GiB of free shared memory in /dev/shm, 1 wanted"),
        ({"commit": "bad"}, "b: source commit bad, but c0ffee on 2 node(s)"),
        ({"sources": "9"}, "b: source digest 9, but 123 on 2 node(s)"),
        ({"versions": (("Python", "3.11"), ("torch", "2.9"))}, "b: torch 2.9, but 2.13 on 2 node(s)"),
        ({"versions": (("Python", "3.11"),)}, "b: torch -, but 2.13 on 2 node(s)"),
        ({"troubles": ("run directory /r cannot be written: Permission denied",)}, "b: run directory /r cannot"),
    ],
)
def test_each_fault_names_its_node(change, fault):
    (line,) = verdict(b=change)
    assert line.startswith(fault)


def test_the_odd_one_is_the_one_that_differs_from_most_even_if_it_is_the_first():
    assert verdict(a={"commit": "old"}) == ["a: source commit old, but c0ffee on 2 node(s)"]


def test_a_node_without_git_is_no_difference_where_the_sources_agree():
    assert verdict(b={"commit": "-"}, c={"commit": "-"}) == []
    # The sources differ: then everything that is known is said.
    said = verdict(b={"commit": "-", "sources": "9"})
    assert said == ["b: source commit -, but c0ffee on 2 node(s)", "b: source digest 9, but 123 on 2 node(s)"]
    # Two commits remain two commits.
    assert verdict(a={"commit": "-"}, c={"commit": "old"}) == ["c: source commit old, but c0ffee on 1 node(s)"]


EIGHT = "".join(f"{k}, GPU-{k}, Disabled\n" for k in range(8))
SLICED = "".join(f"{k}, GPU-{k}, Enabled\n" for k in range(2))
MIXED = SLICED + "2, GPU-2, Disabled\n3, GPU-3, [N/A]\n"


@pytest.mark.parametrize(
    ("table", "visible", "expected"),
    [
        ("", None, (0, 0)),
        (EIGHT, None, (8, 0)),
        (EIGHT, "0,1,2", (3, 0)),
        (EIGHT, "", (0, 0)),
        (EIGHT, "GPU-3,GPU-5", (2, 0)),
        (SLICED, None, (1, 2)),  # 14 slices, of which CUDA shows one
        (SLICED, "MIG-a,MIG-b,MIG-c", (1, 2)),
        (SLICED, "0,1", (1, 2)),
        (SLICED, "", (0, 2)),
        (MIXED, None, (2, 2)),
        (MIXED, "0,1,2,3", (2, 2)),
        (MIXED, "GPU-0", (1, 2)),
    ],
)
def test_slices_of_a_gpu_are_not_counted_as_gpus(table, visible, expected):
    assert count_gpus(table, visible) == expected


def test_a_node_of_slices_is_told_from_one_with_too_few_gpus():
    (line,) = verdict(b={"gpus": 1, "mig": 8})
    assert line.startswith("b: 1 of 8 GPUs (") and "8 GPU(s) are split into MIG slices" in line


def test_a_node_that_did_not_report_is_named():
    assert faults(NODES, {"a": FIT}, {}, LIMITS) == ["b: did not report", "c: did not report"]


def test_a_clock_is_judged_by_the_median_and_a_slow_answer_is_no_skew():
    facts = {node: replace(FIT, node=node) for node in NODES}
    clocks = {"a": Reading(-60.0, 0.0), "b": Reading(0.0, 0.0), "c": Reading(0.1, 0.0)}
    assert faults(NODES, facts, clocks, LIMITS) == ["a: clock -60.0 s from the other nodes', 2 allowed"]
    clocks = {"a": Reading(-6.0, 5.0), "b": Reading(0.0, 0.0), "c": Reading(0.0, 0.0)}
    assert faults(NODES, facts, clocks, LIMITS) == []


def test_a_file_that_the_first_node_does_not_see_is_on_another_file_system(tmp_path):
    (tmp_path / "here").touch()
    facts = {"a": replace(FIT, mark="here"), "b": replace(FIT, node="b", mark="elsewhere"), "c": FIT}
    (fault,) = unseen_marks(facts, tmp_path)
    assert fault.startswith(f"b: run directory {tmp_path} is not shared")


def test_a_nodes_facts_survive_the_wire_and_leave_one_mark(tmp_path):
    facts = find_facts("n", tmp_path / "new" / "run")
    assert Facts.from_json(facts.to_json()) == facts
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == [facts.mark]
    assert facts.troubles == () and facts.free_disk > 0 and dict(facts.versions)["torch"] != "-"


def test_a_run_directory_that_cannot_be_made_is_a_trouble_of_the_node(tmp_path):
    (tmp_path / "file").touch()
    facts = find_facts("n", tmp_path / "file" / "run")
    assert facts.mark is None and "cannot be written" in facts.troubles[0]


def test_the_digest_changes_with_a_files_name_and_content(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    digests = [source_digest(tmp_path)]
    (tmp_path / "a.py").write_text("x = 2\n")
    digests.append(source_digest(tmp_path))
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    digests.append(source_digest(tmp_path))
    (tmp_path / "notes.txt").write_text("not Python")
    assert len(set(digests)) == 3 and source_digest(tmp_path) == digests[-1]


def test_nodes_meet_and_a_wrong_clock_is_measured():
    port, deadline = free_port(), time.monotonic() + 60
    host = Host(port, "job.0", NODES, deadline, time.time)
    heard: dict[str, list[str]] = {}

    def node(name: str, offset: float) -> None:
        facts = replace(FIT, node=name)
        heard[name] = report("127.0.0.1", port, "job.0", facts, deadline, lambda: time.time() + offset)

    threads = [threading.Thread(target=node, args=(name, 30.0 * (name == "c"))) for name in NODES]
    for thread in threads:
        thread.start()
    host.wait()
    lines = faults(NODES, host.facts, host.clocks, LIMITS)
    host.reply(lines)
    for thread in threads:
        thread.join(10)
    assert len(lines) == 1 and lines[0].startswith("c: clock +") and heard == dict.fromkeys(NODES, lines)
    assert 30 - host.clocks["c"].error <= host.clocks["c"].skew <= 30 + host.clocks["c"].error


def test_a_stranger_at_the_port_is_not_taken_for_a_node_and_waiting_ends_at_the_deadline():
    port = free_port()
    host = Host(port, "job.1", ("a",), time.monotonic() + 1.0, time.time)
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\n")
        with pytest.raises(RunFailure, match=f"a: 127.0.0.1:{port} is answered by something else"):
            report("127.0.0.1", port, "job.2", FIT, time.monotonic() + 1.0, time.time)
        host.wait()
    assert host.facts == {}
    host.reply([])


def test_nobody_at_the_port_and_a_taken_port_are_told_apart():
    port = free_port()
    with pytest.raises(RunFailure, match=f"a: 127.0.0.1:{port} does not answer within"):
        report("127.0.0.1", port, "k", FIT, time.monotonic() + 0.3, time.time)
    with socket.create_server(("", port)):
        with pytest.raises(RunFailure, match=f"a: port {port} cannot be opened: .*; set MASTER_PORT"):
            Host(port, "k", ("a",), time.monotonic() + 1, time.time)


def test_a_first_node_that_is_held_up_is_told_from_a_stranger(monkeypatch):
    monkeypatch.setattr(meeting, "_VERDICT_SECONDS", 0.2)
    port, deadline = free_port(), time.monotonic() + 0.1
    host = Host(port, "k", ("a", "b"), deadline, time.time)
    with pytest.raises(RunFailure, match=f"b: 127.0.0.1:{port} was reached, but gave no verdict in time"):
        report("127.0.0.1", port, "k", replace(FIT, node="b"), deadline, time.time)
    host.reply([])


@pytest.fixture
def meeting_point(monkeypatch):
    port = str(free_port())
    for name in ("SLURM_JOB_ID", "SLURMD_NODENAME", "SLURM_RESTART_COUNT", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    return port


LITTLE = ["--min-free-disk", "0", "--min-shared-memory", "0"]


def test_the_command_passes_a_fit_node_and_cleans_up(meeting_point, tmp_path, capsys):
    assert main(["preflight", "--node", "n", "--run-dir", str(tmp_path / "run"), *LITTLE]) == 0
    assert capsys.readouterr().out.startswith("preflight: 1 node(s) fit; commit ")
    assert list((tmp_path / "run").iterdir()) == []


def test_the_command_names_an_unfit_node_and_a_missing_one(meeting_point, tmp_path, capsys):
    began = time.monotonic()
    flags = ["--nodes", "n,m", "--node", "n", "--min-free-disk", "1e9", "--timeout", "1"]
    assert main(["preflight", "--run-dir", str(tmp_path), *flags]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "megatron-jq: error: preflight: m: did not report"
    assert lines[1].startswith("megatron-jq: error: preflight: n: ") and "1e+09 wanted" in lines[1]
    assert time.monotonic() - began < 10 and list(tmp_path.iterdir()) == []


def test_a_waived_check_is_said_and_recorded_and_the_others_still_count(meeting_point, tmp_path, capsys, monkeypatch):
    flags = ["preflight", "--node", "n", "--run-dir", str(tmp_path), "--min-free-disk", "1e9", "--gpus-per-node", "99"]
    assert main([*flags, "--waive", "disk"]) == 3
    captured = capsys.readouterr()
    assert "of 99 GPUs" in captured.err and "of free disk" not in captured.err
    assert captured.err.splitlines()[-1].endswith("to start all the same: --waive gpus (in a job: PREFLIGHT_FLAGS)")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    assert main([*flags, "--waive", "disk", "--waive=gpus"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("preflight: waived (gpus): n: ") and said[1].startswith("preflight: waived (disk): n: ")
    (line,) = (tmp_path / "preflight-waived.jsonl").read_text().splitlines()
    gpus, disk = json.loads(line)["waived"]
    assert "of 99 GPUs" in gpus and "of free disk for the run directory, 1e+09 wanted" in disk


def test_every_fault_but_a_missing_node_names_a_check_that_may_be_waived(tmp_path):
    odd = {
        "gpus": 0, "free_disk": 0.0, "shared_memory": 0.0, "commit": "x", "sources": "y", "mark": "none",
        "versions": tuple((name, "9") for name, _ in find_facts("n", tmp_path).versions),
        "troubles": ("/dev/shm: gone", "run directory cannot be written"),
    }  # fmt: skip
    usual = tuple((name, "1") for name, _ in odd["versions"])
    facts = {node: replace(FIT, node=node, versions=usual) for node in "ac"} | {"b": replace(FIT, node="b", **odd)}
    clocks = {"a": Reading(0.0, 0.0), "b": Reading(60.0, 0.0), "c": Reading(0.0, 0.0)}
    lines = faults((*NODES, "d"), facts, clocks, LIMITS) + unseen_marks(facts, tmp_path)
    assert {fault.check for fault in lines} == {None, *CHECKS}
    assert [str(fault) for fault in lines if fault.check is None] == ["d: did not report"]


def test_a_master_address_that_does_not_resolve_is_told_at_once(meeting_point, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    began = time.monotonic()
    assert main(["preflight", "--nodes", "n,m", "--node", "n", "--run-dir", str(tmp_path), "--timeout", "60"]) == 3
    assert time.monotonic() - began < 10
    assert "preflight: n: MASTER_ADDR=no-such-host.invalid does not resolve" in capsys.readouterr().err


def test_a_file_system_that_does_not_answer_does_not_hold_up_the_job(meeting_point, tmp_path):
    code = (
        "import sys, time; import megatron_jq.cli.preflight as preflight; preflight._HUNG_SECONDS = 0.2\n"
        "def find_facts(node, run_dir):\n    time.sleep(60)\n"
        "preflight.find_facts = find_facts; preflight.run_preflight(sys.argv[1:])"
    )
    flags = ["--nodes", "n,m", "--node", "m", "--run-dir", str(tmp_path), "--timeout", "0.1"]
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "in find_facts" in done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--node", "x", "--nodes", "a,b"], "--nodes a,b does not name this node, x"),
        (["--gpus", "8"], "unrecognized arguments"),
        (["--timeout", "nan"], "--timeout: nan is not a number of at least 0"),
        (["--max-clock-skew", "inf"], "--max-clock-skew: inf is not a number of at least 0"),
        (["--min-free-disk", "much"], "--min-free-disk: much is not a number of at least 0"),
        (["--gpus-per-node", "-1"], "--gpus-per-node: -1 is not a whole number of at least 0"),
        (["--waive", "everything"], "--waive: invalid choice: 'everything'"),
        ([], "set MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_bad_flags_are_refused(flags, words, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert main(["preflight", "--run-dir", str(tmp_path), *flags]) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("port", ["", "ssh", "0", "65536", "²"])
def test_a_port_that_is_none_is_refused(port, meeting_point, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", port)
    assert main(["preflight", "--run-dir", str(tmp_path), *LITTLE]) == 2
    err = capsys.readouterr().err
    assert "set MASTER_ADDR and MASTER_PORT" in err and len(err.splitlines()) == 1


def test_the_megatron_core_that_an_import_would_take_is_compared(tmp_path):
    """A checkout on one node's PYTHONPATH differs from what pip installed on the other: the run would begin, and the
    ranks would not do the same.
    """
    info = tmp_path / "checkout" / "megatron" / "core" / "package_info.py"
    info.parent.mkdir(parents=True)
    info.write_text('MAJOR = 0\nMINOR = 99\nPATCH = 2\nPRE_RELEASE = "rc1"\n')
    code = (
        "import sys; from pathlib import Path; from megatron_jq.preflight.facts import find_facts\n"
        "print(find_facts(sys.argv[1], Path(sys.argv[2])).to_json())"
    )
    facts = {}
    for node, folders in {"a": (), "b": (), "c": (str(info.parents[2]),)}.items():
        path = os.pathsep.join([*folders, *sys.path])
        command = [sys.executable, "-c", code, node, str(tmp_path / "run")]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
        )
        facts[node] = Facts.from_json(done.stdout)
    limits = Limits(gpus=0, free_disk=0.0, shared_memory=0.0, clock_skew=2.0)
    (line,) = faults(NODES, facts, {}, limits)
    assert line == f"c: megatron-core 0.99.2rc1, but {version('megatron-core')} on 2 node(s)"
    assert line.check == "megatron-core"


def test_preflight_imports_no_torch():
    code = (
        "import sys, json, megatron_jq.cli.main; "
        "print(json.dumps([name for name in ('torch', 'megatron') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
