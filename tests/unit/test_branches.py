"""Retention and resume follow the run's own branch, whatever was damaged, or whichever step the user went back to."""

import itertools
from dataclasses import replace

import pytest

from megatron_jq.checkpoint import folder as folders
from megatron_jq.checkpoint.folder import TRACKER, Manifest
from megatron_jq.errors import UserError
from tests.unit.run_folders import WEIGHTS, Command, Run, histories, trained


def damage(save, step):
    (save / folders.folder_name(step) / WEIGHTS).write_text("another text")


class World:
    """A run, and what its folder should hold. line: saves that the present state descends from, oldest first."""

    def __init__(self, tmp_path, keep_last):
        self.save, self.keep_last = tmp_path / "save", keep_last
        self.command = Command("a", tmp_path / "run", self.save, resume=True, keep_last=keep_last)
        self.starts, self.line, self.damaged = 0, [], set()

    def steps(self):
        return set(folders.saved_steps(self.save)) if self.save.is_dir() else set()

    def train(self, saves):
        """Resume under a new name, and check from where; then save, and check what stays after each save."""
        self.starts += 1
        tracked = int((self.save / TRACKER).read_text()) if self.line else 0
        self.line = [each for each in self.line if each[0] <= tracked]
        usable = [each for each in self.line if each[0] in self.steps() - self.damaged]
        command = replace(self.command, name="abcdefgh"[self.starts])
        if self.line and not usable:
            with pytest.raises(UserError, match="no whole checkpoint"):
                Run(command)
            return False
        run = Run(command)
        self.line = [each for each in self.line if usable and each[0] <= usable[-1][0]]
        assert run.history == (usable[-1][1] if usable else "")  # the newest whole one of its line, and no other
        for _ in range(saves):
            before = self.steps()
            run.save()
            self.line.append((run.step, run.history))
            self.damaged.discard(run.step)
            there = self.steps()
            own = [step for step, _ in self.line if step in before | {run.step}]
            assert set(own[-(self.keep_last or len(own)) :]) <= there  # never instead of the new ones
            if self.keep_last is not None:
                left = there - set(own)
                assert len(there) <= self.keep_last and not (left and len(own) > self.keep_last)
        run.end()
        return True

    def damage_newest(self):
        step = int((self.save / TRACKER).read_text())
        damage(self.save, step)
        self.damaged.add(step)

    def go_back(self):
        """To the oldest checkpoint of the line that is still there."""
        step = min(step for step, _ in self.line if step in self.steps())
        (self.save / TRACKER).write_text(f"{step}\n")


ACTIONS = {
    "train one save": lambda world: world.train(1),
    "train three saves": lambda world: world.train(3),
    "damage": World.damage_newest,
    "go back": World.go_back,
}


@pytest.mark.parametrize("keep_last", [None, 1, 2])
def test_after_any_damage_and_any_way_back_the_run_goes_on_from_its_own_line(keep_last, tmp_path):
    for number, actions in enumerate(itertools.product(ACTIONS, repeat=3)):
        world = World(tmp_path / str(number), keep_last)
        world.train(3)
        for name in actions:
            if ACTIONS[name](world) is False:
                break


def test_the_example_of_the_report(tmp_path):
    """Damage at 20, resumed from 5 by hand: 10 and 15 stay, and neither 20 nor its line is ever taken again."""
    command = Command("a", tmp_path / "run", tmp_path / "save", resume=True)
    save = tmp_path / "save"
    trained(command, 4)
    damage(save, 20)
    (save / TRACKER).write_text("5\n")
    again = replace(command, name="b", keep_last=2)
    run = Run(again)
    run.save()
    assert set(folders.saved_steps(save)) == {5, 10}  # those that were left went first
    run.save()
    run.end()
    assert histories(save) == {" a5 b10", " a5 b10 b15"}
    assert trained(replace(again, name="c")) == " a5 b10 b15 c20"


def test_without_keep_last_what_was_left_stays_and_can_be_gone_back_to(tmp_path):
    command, save = Command("a", tmp_path / "run", tmp_path / "save", resume=True), tmp_path / "save"
    trained(command, 4)
    (save / TRACKER).write_text("5\n")
    assert trained(replace(command, name="b")) == " a5 b10"
    assert folders.left_aside(save) == [15, 20] and [p.name for p in folders.candidates(save)] == [
        "iter_0000010",
        "iter_0000005",
    ]
    (save / TRACKER).unlink()  # then the one that was written last
    assert folders.candidates(save)[0].name == "iter_0000010"
    (save / TRACKER).write_text("15\n")
    assert trained(replace(command, name="c")) == " a5 a10 a15 c20"


def test_the_best_is_of_the_runs_own_line(tmp_path):
    def put(step, value, branches):
        partial = folders.begin(tmp_path, step)
        run = {"id": "0" * 32, "directory": "/x"}
        return folders.commit(
            partial, Manifest(step, {}, 1, False, run=run, branches=branches, metrics={"p_mean": value})
        )

    old, new = [["o", 0]], [["o", 0], ["n", 10]]
    for step, value, branches in ((5, 0.1, old), (10, 0.4, old), (20, 0.9, old), (15, 0.2, new), (18, 0.3, new)):
        put(step, value, branches)
    removed = folders.prune(tmp_path, keep_last=1, keep_best="p_mean")
    assert [folders.step_of(path) for path in removed] == [5, 15, 20]
    assert set(folders.saved_steps(tmp_path)) == {10, 18}


# What somebody may write into the tracker → what is said (None: it is taken). There are 5, 10 and 15.
TRACKERS = {
    "10": None,
    " 10 \r\n": None,
    "0000010": None,
    "": "is empty, which is no checkpoint's step",
    " \n": "is empty",
    "release": "says 'release'",
    "ten": "says 'ten'",
    "1 0": "says '1 0'",
    "10.0": "says '10.0'",
    "-10": "says '-10'",
    "+10": "says '+10'",
    "1_0": "says '1_0'",
    "iter_0000010": "says 'iter_0000010'",
    "\u0661\u0660": "says",
    "10\n15": "says",
    "a[$(touch pwned)]": "says",
    "12": "names step 12, which is not there",
    "0": "names step 0, which is not there",
    "99999999999999999": "names step 99999999999999999, which is not there",
    "9" * 5000: "says",
    b"\xff\xfe": "says 'bytes that are no text'",
}


@pytest.mark.parametrize("text", TRACKERS, ids=lambda text: ascii(text)[:20])
def test_a_tracker_by_hand_is_followed_or_refused_with_the_steps_that_there_are(text, tmp_path):
    command, save = Command("a", tmp_path / "run", tmp_path / "save", resume=True), tmp_path / "save"
    trained(command, 3)
    (save / TRACKER).write_bytes(text if isinstance(text, bytes) else text.encode())
    if TRACKERS[text] is None:
        assert folders.find(save).name == "iter_0000010" and trained(replace(command, name="b")) == " a5 a10 b15"
        return
    before = histories(save)
    for attempt in (lambda: folders.find(save), lambda: Run(command)):
        with pytest.raises(UserError) as raised:
            attempt()
        message = str(raised.value)
        assert TRACKERS[text] in message and "there are 5, 10, 15" in message and TRACKER in message
        assert "\n" not in message and len(message) < 500
    assert histories(save) == before


def test_a_tracker_that_is_a_folder_or_stands_alone_is_named(tmp_path):
    command, save = Command("a", tmp_path / "run", tmp_path / "save", resume=True), tmp_path / "save"
    trained(command)
    (save / TRACKER).unlink()
    (save / TRACKER).mkdir()
    with pytest.raises(UserError, match=f"{TRACKER} cannot be read: Is a directory"):
        folders.find(save)
    (save / TRACKER).rmdir()
    assert folders.find(save).name == "iter_0000005"
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / TRACKER).write_text("5\n")
    with pytest.raises(UserError, match="names step 5, which is not there .the folder holds none"):
        folders.find(empty)


def test_a_writer_that_was_killed_while_it_replaced_the_tracked_step_is_no_typing_error(tmp_path):
    """Damage at 10, resumed from 5, and killed between the two renames of the new 10."""
    command, save = Command("a", tmp_path / "run", tmp_path / "save", resume=True), tmp_path / "save"
    trained(command, 2)
    (save / "iter_0000010").rename(save / ".iter_0000010.old")
    assert trained(replace(command, name="b")) == " a5 b10"
