"""What the first and the second signal do to a process, whatever its main thread is at. Real processes, no Megatron."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from megatron_jq.interrupts import SIGNALS
from tests.e2e.documents import make_place

DEADLINE_SECONDS = 60
#: The main thread in C code that no signal interrupts, as in a collective: a mutex that it holds already.
BLOCKED = """
import ctypes
lock, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
libc.pthread_mutex_lock(lock)
print("ready", flush=True)
libc.pthread_mutex_lock(lock)
"""
AWAKE = """
print("ready", flush=True)
for _ in range(3000):
    time.sleep(0.01)
    if notes and time.monotonic() - notes[0] > 2:
        print("notes", len(notes), flush=True)
        break
"""
FRAMES = {
    "run": "notes = []\nwith listening(lambda number: notes.append(time.monotonic())):",
    "command": "notes = []\nwith ending_at_once('convert'):\n    try:",
}
AFTER = {"run": "", "command": "\n    finally:\n        print('tidied', flush=True)"}


def start(frame: str, body: str, before: str = "") -> subprocess.Popen:
    """A Python process that is ready inside the frame; its output is read from there on."""
    indent = "    " if frame == "run" else "        "
    head = f"import os, signal, time\nfrom megatron_jq.interrupts import ending_at_once, listening\n{before}\n"
    code = f"{head}{FRAMES[frame]}\n{textwrap.indent(body, indent)}{AFTER[frame]}"
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True)
    assert process.stdout.readline() == "ready\n", process.communicate()
    return process


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code and what is left of both outputs. Not by communicate: it does not know what readline has read ahead."""
    limit = threading.Timer(DEADLINE_SECONDS, process.kill)
    limit.start()
    out, err = process.stdout.read(), process.stderr.read()
    code = process.wait()
    limit.cancel()
    return code, out, err


@pytest.mark.parametrize("number", SIGNALS)
def test_a_run_notes_the_first_and_what_follows_within_a_second_is_the_same_one(number):
    process = start("run", AWAKE)
    for _ in range(4):  # a launcher's, the scheduler's, the terminal's
        process.send_signal(number)
        time.sleep(0.05)
    assert ended(process) == (0, "notes 1\n", "")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_one_ends_a_run_by_that_signal(number):
    process = start("run", "print('ready', flush=True)\nwhile True:\n    time.sleep(0.1)")
    process.send_signal(signal.SIGINT)
    time.sleep(1.3)
    process.send_signal(number)
    assert ended(process) == (-number, "", "")


def test_a_second_one_ends_a_run_that_waits_for_its_peers():
    process = start("run", BLOCKED)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)
    assert code == -signal.SIGINT and err == "megatron-jq: ended by SIGINT before it was done\n"


def test_sigusr1_is_not_handled_before_there_is_a_step_to_save():
    """launch/slurm/node.py sends it to ranks that handle it."""
    process = start("command", "print('ready', flush=True)\nprint(signal.getsignal(signal.SIGUSR1).name, flush=True)")
    assert ended(process) == (0, "SIG_DFL\ntidied\n", "")


@pytest.mark.parametrize("number", [n for n in SIGNALS if n != signal.SIGUSR1])
def test_a_command_ends_with_one_line_by_that_signal_and_tidies_up(number):
    process = start("command", AWAKE)
    process.send_signal(number)
    process.send_signal(number)
    name = signal.Signals(number).name
    assert ended(process) == (-number, "tidied\n", f"convert: ended by {name} before it was done\n")


#: What others do with an exception that is none of theirs: in an import it dies there, elsewhere it ends as it can.
SWALLOWED = {
    "by an import": ("import swallowing\nprint('ran on', flush=True)", ""),
    "by a block": ("try:\n    wait()\nexcept BaseException:\n    pass", "tidied\n"),
    "for another error": ("try:\n    wait()\nexcept BaseException:\n    1 / 0", "tidied\n"),
}


@pytest.mark.parametrize("way", SWALLOWED)
def test_a_command_whose_interrupt_is_swallowed_ends_by_its_signal(way, tmp_path):
    """numpy and torch catch what is raised in the imports that they make in C."""
    body, out = SWALLOWED[way]
    wait = "import time\ndef wait():\n    print('ready', flush=True)\n    time.sleep(30)\n"
    (tmp_path / "waiting.py").write_text(wait)
    (tmp_path / "slow.py").write_text("from waiting import wait\nwait()")
    (tmp_path / "swallowing.py").write_text("try:\n    import slow\nexcept BaseException:\n    pass\n")
    before = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nfrom waiting import wait"
    process = start("command", body, before)
    process.send_signal(signal.SIGHUP)
    assert ended(process) == (-signal.SIGHUP, out, "convert: ended by SIGHUP before it was done\n")


def test_a_command_that_waits_for_its_peers_ends_too():
    process = start("command", BLOCKED)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)
    assert code == -signal.SIGINT and "ended by SIGINT" in err and time.monotonic() - began < 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("frame", FRAMES)
def test_a_signal_that_was_ignored_stays_ignored(frame, number):
    """nohup, and a background job of a script."""
    body = "print('ready', flush=True)\ntime.sleep(0.5)\nprint('done', flush=True)"
    process = start(frame, body, before=f"signal.signal({int(number)}, signal.SIG_IGN)")
    process.send_signal(number)
    code, out, err = ended(process)
    assert code == 0 and out.startswith("done\n") and err == ""


def test_a_signal_to_a_forked_child_is_the_childs_alone():
    body = """
child = os.fork()
if child == 0:
    time.sleep(60)
time.sleep(0.3)
os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(notes), flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(2)
print(len(notes), flush=True)
"""
    process = start("run", "print('ready', flush=True)\n" + body)
    assert ended(process) == (0, f"{-signal.SIGTERM} 0\n1\n", "")


@pytest.mark.parametrize("script", ["examples/quickstart.sh", "examples/stages/run.sh"])
def test_ctrl_c_ends_a_script_of_several_runs(script, tmp_path):
    """The run that it meets saves and ends with 0: the script must not begin the next one."""
    make_place(tmp_path / "place")
    program = tmp_path / "place" / "bin" / "python"
    program.write_text("#!/bin/bash\ntrap 'exit 0' INT\necho started\nfor i in {1..600}; do /bin/sleep 0.1; done\n")
    program.chmod(0o755)
    process = subprocess.Popen(
        ["/bin/bash", script, "runs"], cwd=tmp_path / "place", env={"PATH": str(program.parent)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    lines = []
    while "started\n" not in lines:
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 130 and "started" not in out
