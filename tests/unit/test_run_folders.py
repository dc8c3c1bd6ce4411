"""Two runs, sweeps or resumes in one folder can neither mix nor delete each other's checkpoints.

Real processes do what rank 0 of a run does with its folders (run_folders.py), and are killed as the system kills them.
"""

import itertools
import multiprocessing
import os
import shutil
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_jq.checkpoint import folder as folders
from megatron_jq.checkpoint import ownership, run_files
from megatron_jq.checkpoint.folder import TRACKER, Manifest
from megatron_jq.config import to_toml
from megatron_jq.errors import UserError
from megatron_jq.train.run_directory import RunFolders
from tests.unit.run_folders import WEIGHTS, Command, Run, histories, trained

#: Events of the file system before which a process may be killed.
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "fcntl.lockf")


class Process:
    """A Run in a process of its own. kill_at: the change of the file system, from 0, before which it is killed."""

    def __init__(self, command: Command, *, saves: int = 0, kill_at: int | None = None):
        context = multiprocessing.get_context("fork")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_work, args=(command, saves, kill_at, other), daemon=True)
        self._process.start()
        other.close()
        self.answer = self._receive()

    @property
    def refused(self) -> str | None:
        return self.answer[1] if self.answer[0] == "refused" else None

    @property
    def killed(self) -> bool:
        return self.answer == ("killed",)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def end(self) -> None:
        if self._process.is_alive():
            self._pipe.send("end")
        self._process.join()

    def _receive(self):
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            assert self._process.exitcode == -signal.SIGKILL, self._process.exitcode
            return ("killed",)


def _work(command: Command, saves: int, kill_at: int | None, pipe) -> None:
    left = itertools.count(0)

    def hook(event: str, arguments: tuple) -> None:
        reading = event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if event in CHANGES and not reading and next(left) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    if kill_at is not None:
        sys.addaudithook(hook)
    try:
        run = Run(command)
        origin = run.history
        for _ in range(saves):
            run.save()
        pipe.send(("began", origin, run.history))
    except UserError as error:
        pipe.send(("refused", str(error)))
        os._exit(0)
    pipe.recv()
    run.end()
    os._exit(0)


def contents(save: Path) -> dict[str, bytes]:
    """Every file of a folder's checkpoints, half-written ones included."""
    return {
        str(path.relative_to(save)): path.read_bytes()
        for path in save.rglob("*")
        if path.is_file() and path.name not in (run_files.LOCK, run_files.CLAIM)
    }


# Each run starts, is killed, is resumed, and ends; the two runs' events in every order. A is the one that begins.
EVENTS = ("start", "kill", "resume", "end")
ORDERS = sorted({order for order in itertools.permutations("AAAABBBB") if order[0] == "A"})
KINDS = {
    "plain runs": {"resume": False},
    "points of a sweep, which resume from the first start": {"resume": True},
    "a copy of one command, elsewhere": {"resume": True, "q": 0.75},
}


def commands(tmp_path: Path, kind: str, save: Path | None) -> dict[str, Command]:
    options = {"q": 0.5, **KINDS[kind]}
    return {
        "A": Command("a", tmp_path / "A", save, resume=KINDS[kind]["resume"], keep_last=1),
        "B": Command("b", tmp_path / "B", save, q=options["q"], resume=KINDS[kind]["resume"], keep_last=1),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_in_every_order_of_start_kill_and_resume_the_first_run_keeps_the_folder(kind, tmp_path):
    for number, order in enumerate(ORDERS):
        world = tmp_path / str(number)
        save, both = world / "save", commands(world, kind, world / "save")
        owner, live, done = order[0], {}, {"A": 0, "B": 0}
        for who in order:
            event, command = EVENTS[done[who]], both[who]
            done[who] += 1
            before = contents(save) if save.is_dir() else {}
            if event in ("start", "resume"):
                started_once = event == "resume" and who == owner
                process = Process(replace(command, resume=command.resume or started_once), saves=2)
                if who == owner:
                    assert process.refused is None, (order, process.refused)
                    assert all(f" {who.lower()}" in history for history in process.answer[1:] if history)
                    live[who] = process
                else:
                    assert "--save" in process.refused and str(both[owner].run_dir) in process.refused, (order, event)
                    assert contents(save) == before and not (command.run_dir / "config.toml").exists()
            elif who in live:
                (live[who].kill if event == "kill" else live[who].end)()
                del live[who]
        other = "b" if owner == "A" else "a"
        assert histories(save) and not any(other in history for history in histories(save))
        for process in live.values():
            process.end()


def test_in_every_order_two_processes_of_one_run_do_not_train_at_once(tmp_path):
    for number, order in enumerate(ORDERS):
        world = tmp_path / str(number)
        command = Command("a", world / "run", None, resume=True)
        live, done = {}, {"A": 0, "B": 0}
        for who in order:
            event = EVENTS[done[who]]
            done[who] += 1
            if event in ("start", "resume"):
                before = contents(world / "run")
                process = Process(command, saves=1)
                if live:
                    assert "--run-dir" in process.refused and "is in use by process" in process.refused
                    assert contents(world / "run") == before
                else:
                    assert process.refused is None
                    steps = sorted(folders.saved_steps(world / "run" / "checkpoints"))
                    assert process.answer[2].split() == [f"a{step}" for step in steps]  # one line, nothing lost
                    live[who] = process
            elif who in live:
                (live[who].kill if event == "kill" else live[who].end)()
                del live[who]
        for process in live.values():
            process.end()


def test_runs_with_folders_of_their_own_do_not_meet(tmp_path):
    both = commands(tmp_path, "plain runs", None)
    processes = [Process(command, saves=2) for command in both.values()]
    assert [process.answer for process in processes] == [("began", "", " a5 a10"), ("began", "", " b5 b10")]
    for process in processes:
        process.end()


@pytest.mark.parametrize("neighbour", ["a run with another q", "a run with the same settings"])
def test_killed_before_any_change_a_run_is_resumed_and_its_folder_stays_its_own(neighbour, tmp_path):
    """Before the claim a killed run has nothing there, and another may have the folder; then it is the run's."""
    q = 0.5 if "another" in neighbour else 0.75
    claimed = {True: 0, False: 0}
    for point in itertools.count():
        world = tmp_path / str(point)
        a = Command("a", world / "A", world / "save", resume=True, keep_last=1)
        b = Command("b", world / "B", world / "save", q=q, resume=True, keep_last=1)
        first = Process(a, saves=2, kill_at=point)
        if not first.killed:
            first.end()
            break
        is_claimed = (world / "save" / run_files.CLAIM).exists()
        claimed[is_claimed] += 1
        before = contents(world / "save") if (world / "save").is_dir() else {}
        second = Process(b, saves=1)
        if is_claimed:
            assert "--save" in second.refused and str(a.run_dir) in second.refused
            assert contents(world / "save") == before
            again = Process(a, saves=2)
            assert again.refused is None, (point, again.refused)
            assert " a5 a10 a15 a20".startswith(again.answer[2]) and " a10" in again.answer[2], again.answer
            assert histories(world / "save") == {again.answer[2]} and not folders.leftovers(world / "save")
            again.end()
        else:
            assert second.refused is None and histories(world / "save") == {" b5"}
            third = Process(a, saves=1)
            assert str(b.run_dir) in third.refused and histories(world / "save") == {" b5"}
        second.end()
    assert claimed[True] > 20 and claimed[False] > 3  # the kills fell on both sides of the claim


def test_starts_at_the_same_moment_have_one_winner(tmp_path):
    """Without waiting for each other, ten times; each process would save."""
    for number in range(10):
        world = tmp_path / str(number)
        context = multiprocessing.get_context("fork")
        pipes, processes = [], []
        for name in "abcd":
            pipe, other = context.Pipe()
            command = Command(name, world / name, world / "save", q=0.1 + 0.1 * "abcd".index(name))
            processes.append(context.Process(target=_work, args=(command, 1, None, other), daemon=True))
            pipes.append(pipe)
        for process in processes:
            process.start()
        answers = [pipe.recv() for pipe in pipes]
        for answer, pipe, process in zip(answers, pipes, processes, strict=True):
            if answer[0] == "began":
                pipe.send("end")
            process.join()
        assert [answer[0] for answer in answers].count("began") == 1, answers
        assert len(histories(world / "save")) == 1


def test_without_locks_a_claim_still_has_one_winner(tmp_path, monkeypatch):
    """A file system that cannot lock: said, and the claim alone decides."""

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_files.fcntl, "lockf", refuse)
    both = commands(tmp_path, "plain runs", tmp_path / "save")
    one, other = RunFolders(both["A"].config), RunFolders(both["B"].config)
    for each in (one, other):
        notes = each.open()
        assert len(notes) == 2 and "cannot be locked (Operation not supported)" in notes[0]
    one.claim()
    with pytest.raises(UserError, match=f"--save .*was claimed by run .* in {tmp_path}/A a moment ago"):
        other.claim()
    assert not (tmp_path / "B" / "config.toml").exists()
    for each in (one, other):
        each.close()


def test_a_run_that_moved_goes_on_and_a_copy_of_it_does_not_share_its_folder(tmp_path):
    save = tmp_path / "save"
    a = Command("a", tmp_path / "A", save, resume=True)
    trained(a)
    shutil.copytree(a.run_dir, tmp_path / "copy")
    copy = replace(a, run_dir=tmp_path / "copy")
    before = contents(save)
    with pytest.raises(UserError, match="--run-dir .*copy is a copy of that: two runs would mix"):
        Run(copy)
    assert contents(save) == before
    shutil.copytree(save, tmp_path / "save of the copy")
    assert trained(replace(copy, save=tmp_path / "save of the copy")) == " a5 a10"
    a.run_dir.rename(tmp_path / "moved")
    moved = replace(a, run_dir=tmp_path / "moved")
    assert trained(moved) == " a5 a10"
    save.rename(tmp_path / "moved save")
    assert trained(replace(moved, save=tmp_path / "moved save")) == " a5 a10 a15"


def test_a_copied_run_directory_with_its_checkpoints_goes_on_by_itself(tmp_path):
    a = Command("a", tmp_path / "A", None, resume=True)
    trained(a)
    shutil.copytree(a.run_dir, tmp_path / "copy")
    assert trained(replace(a, run_dir=tmp_path / "copy", name="c")) == " a5 c10"
    assert trained(a, 2) == " a5 a10 a15" and histories(tmp_path / "copy" / "checkpoints") == {" a5", " a5 c10"}


def test_another_save_than_before_is_refused_while_the_checkpoints_are_in_the_old_one(tmp_path):
    a = Command("a", tmp_path / "A", tmp_path / "old", resume=True)
    trained(a)
    with pytest.raises(UserError, match=r"checkpoints are in .*old \(newest: step 5\), and --save .*new has none"):
        Run(replace(a, save=tmp_path / "new"))
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
    (tmp_path / "old").rename(tmp_path / "new")
    assert trained(replace(a, save=tmp_path / "new")) == " a5 a10"


def test_a_claim_without_a_run_and_without_checkpoints_is_nobodys(tmp_path):
    a, b = commands(tmp_path, "plain runs", tmp_path / "save").values()
    trained(a, saves=0)
    with pytest.raises(UserError, match=f"belongs to run .* in {a.run_dir}"):
        Run(b)
    shutil.rmtree(a.run_dir)
    assert trained(b) == " b5"


def make_older(save: Path, **changes) -> None:
    """As a version without ids left it."""
    for path in [*folders.saved_steps(save).values()]:
        manifest = replace(folders.read_manifest(path), run=None, branches=None, written=None, **changes)
        shutil.rmtree(path)
        partial = folders.begin(save, manifest.step)
        (partial / WEIGHTS).write_text(f" a{manifest.step}")
        folders.commit(partial, replace(manifest, files={}))
    (save / run_files.CLAIM).unlink()


@pytest.mark.parametrize("keep_last", [None, 1])
def test_checkpoints_older_than_ids_are_settled_by_their_settings(keep_last, tmp_path):
    save = tmp_path / "save"
    a = Command("a", tmp_path / "A", save, resume=True, keep_last=keep_last)
    trained(a)
    make_older(save)
    (a.run_dir / run_files.RUN_ID).unlink()
    before = contents(save)
    for stranger in (replace(a, run_dir=tmp_path / "B", q=0.5), replace(a, run_dir=tmp_path / "B", resume=False)):
        with pytest.raises(UserError, match="--save"):
            Run(stranger)
    assert contents(save) == before
    taken = RunFolders(a.config)
    assert any("iter_0000005" in note and "older than runs' ids" in note for note in taken.open())
    taken.close()
    assert trained(a) == " a5 a10"
    assert histories(save) == ({" a5 a10"} if keep_last else {" a5", " a5 a10"})
    with pytest.raises(UserError, match=f"in {a.run_dir}"):
        Run(replace(a, run_dir=tmp_path / "B"))


def test_what_no_run_wrote_is_not_a_runs(tmp_path):
    """A conversion, or parts of a checkpoint in a folder that nobody has claimed."""
    partial = folders.begin(tmp_path / "converted", 0)
    folders.commit(partial, Manifest(0, {}, 11, False, source={"hf": "x"}))
    folders.begin(tmp_path / "half", 7)
    for name, words in (("converted", "which no run wrote"), ("half", ".iter_0000007.partial, and not whose that is")):
        for resume in (False, True):
            before = contents(tmp_path / name)
            with pytest.raises(UserError, match=words):
                Run(Command("a", tmp_path / "A", tmp_path / name, resume=resume))
            assert contents(tmp_path / name) == before
    assert (tmp_path / "half" / ".iter_0000007.partial").is_dir()


def test_anothers_reference_is_not_overwritten(tmp_path):
    """--grpo-kl-beta's frozen policy lies beside the checkpoints, and may be all that a run has saved."""
    a, b = commands(tmp_path, "plain runs", tmp_path / "save").values()
    run = Run(a)
    partial = folders.begin(tmp_path / "save" / ownership.REFERENCE, 0)
    folders.commit(partial, Manifest(0, {}, 11, False, to_toml(a.config), run=asdict(run_files.own_run(a.run_dir))))
    run.end()
    (tmp_path / "save" / run_files.CLAIM).unlink()
    before = contents(tmp_path / "save")
    with pytest.raises(UserError, match=f"--save .*holds iter_0000000 of run .* in {a.run_dir}"):
        Run(b)
    assert contents(tmp_path / "save") == before


def test_a_folder_that_became_anothers_while_a_run_trained_is_not_written_to(tmp_path):
    a, b = commands(tmp_path, "plain runs", tmp_path / "save").values()
    run = Run(a)
    run.save()
    claim = tmp_path / "save" / run_files.CLAIM
    text = claim.read_text().replace(run_files.own_run(a.run_dir).id, "0" * 32)
    claim.write_text(text)
    before = contents(tmp_path / "save")
    with pytest.raises(OSError, match="the folder belongs to run 00000000"):
        run.save()
    assert {k: v for k, v in contents(tmp_path / "save").items() if ".partial" not in k} == before
    run.end()


@pytest.mark.parametrize("text", ["", "no id", "{}"])
def test_a_damaged_claim_or_id_is_named(text, tmp_path):
    a = Command("a", tmp_path / "A", tmp_path / "save", resume=True)
    trained(a)
    claim = (tmp_path / "save" / run_files.CLAIM).read_text()
    (tmp_path / "save" / run_files.CLAIM).write_text(text)
    with pytest.raises(UserError, match=r"--save .*run.json cannot be read"):
        Run(a)
    (tmp_path / "save" / run_files.CLAIM).write_text(claim)
    (tmp_path / "A" / run_files.RUN_ID).write_text(text)
    with pytest.raises(UserError, match="--run-dir .*run_id does not hold a run's id"):
        Run(a)
    assert (tmp_path / "save" / TRACKER).read_text() == "5\n"


def test_a_run_that_was_refused_leaves_its_directory_free(tmp_path):
    a, b = commands(tmp_path, "plain runs", tmp_path / "save").values()
    trained(a)
    with pytest.raises(UserError, match="--save"):
        Run(b)
    assert trained(replace(b, save=tmp_path / "other")) == " b5"
    with pytest.raises(UserError, match="--run-dir .* holds another run; give --resume"):
        Run(replace(b, save=tmp_path / "other"))
