"""Checkpoint folders: a name means whole, the newest whole one is found, damaged ones are named and passed over."""

import json
import os
import shutil
from dataclasses import replace

import pytest

from megatron_jq.checkpoint import contents
from megatron_jq.checkpoint import folder as folders
from megatron_jq.checkpoint.folder import MANIFEST, TRACKER, DamagedCheckpoint, Manifest
from megatron_jq.errors import UserError

MANIFEST_1 = Manifest(step=0, architecture={"num_layers": 2}, vocab_size=70, bf16=False)


def write(save, step, **changes):
    partial = folders.begin(save, step)
    (partial / "a.distcp").write_bytes(bytes(range(200)) * 10)
    (partial / "tokenizer").mkdir()
    (partial / "tokenizer" / "tokenizer.model").write_bytes(b"pieces")
    return folders.commit(partial, replace(MANIFEST_1, step=step, **changes))


def test_a_folder_appears_whole_with_a_manifest_of_every_file(tmp_path):
    final = write(tmp_path, 40)
    assert final == tmp_path / "iter_0000040" and (tmp_path / TRACKER).read_text() == "40\n"
    manifest = folders.read_manifest(final)
    assert manifest.step == 40 and set(manifest.files) == {"a.distcp", "tokenizer/tokenizer.model"}
    assert manifest.files["a.distcp"]["bytes"] == 2000
    folders.verify(final, manifest, manifest.files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000040", TRACKER]


def test_what_was_half_written_has_no_name_and_is_begun_anew(tmp_path):
    write(tmp_path, 20)
    (folders.begin(tmp_path, 40) / "half").write_bytes(b"x")
    assert folders.find(tmp_path).name == "iter_0000020"
    assert list(folders.begin(tmp_path, 40).iterdir()) == []
    folders.remove_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000020", TRACKER]


def test_nothing_later_than_the_tracker_is_taken(tmp_path):
    """A writer that was killed before it moved the tracker left it there, or a user who went back."""
    write(tmp_path, 20)
    write(tmp_path, 40)
    (tmp_path / TRACKER).write_text("20\n")
    assert [path.name for path in folders.candidates(tmp_path)] == ["iter_0000020"]
    flip(tmp_path / "iter_0000020" / "a.distcp")
    with pytest.raises(UserError, match=f"no whole checkpoint.*to continue from step 40, write that into {TRACKER}"):
        folders.find(tmp_path, log=lambda _: None)
    (tmp_path / TRACKER).unlink()
    assert folders.find(tmp_path).name == "iter_0000040"


def test_saving_a_step_again_replaces_its_folder(tmp_path):
    write(tmp_path, 20, vocab_size=1)
    assert folders.read_manifest(write(tmp_path, 20, vocab_size=2)).vocab_size == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000020", TRACKER]


def flip(path):
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "does not match its checksum": lambda f: flip(f / "a.distcp"),
    "a.distcp is missing": lambda f: (f / "a.distcp").unlink(),
    "has 1999 bytes instead of 2000": lambda f: os.truncate(f / "a.distcp", 1999),
    "checkpoint.json cannot be read: No such file": lambda f: (f / MANIFEST).unlink(),
    "checkpoint.json is not a manifest": lambda f: (f / MANIFEST).write_text("{"),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_found(tmp_path, words):
    write(tmp_path, 20)
    newest, said = write(tmp_path, 40), []
    DAMAGE[words](newest)
    assert folders.find(tmp_path, log=said.append).name == "iter_0000020"
    assert len(said) == 1 and "iter_0000040" in said[0] and words in said[0]
    shutil.rmtree(tmp_path / "iter_0000020")
    with pytest.raises(UserError, match=f"--load .*no whole checkpoint.*{words}"):
        folders.find(tmp_path, log=said.append)


def test_a_named_checkpoint_is_taken_or_refused_not_replaced(tmp_path):
    write(tmp_path, 20)
    flip(write(tmp_path, 40) / "a.distcp")
    assert folders.find(tmp_path / "iter_0000020") == tmp_path / "iter_0000020"
    with pytest.raises(UserError, match="iter_0000040"):
        folders.find(tmp_path / "iter_0000040", log=lambda _: None)


def test_folders_without_checkpoints_are_said(tmp_path):
    with pytest.raises(UserError, match="--load .*absent: there is no such folder"):
        folders.find(tmp_path / "absent")
    with pytest.raises(UserError, match="there is no checkpoint"):
        folders.find(tmp_path)


def test_a_later_format_is_refused_with_the_remedy(tmp_path):
    final = write(tmp_path, 20)
    table = json.loads((final / MANIFEST).read_text())
    (final / MANIFEST).write_text(json.dumps({**table, "format": 2}))
    with pytest.raises(UserError, match="later version"):
        folders.read_manifest(final)
    (final / MANIFEST).write_text(json.dumps({**table, "a_field_of_tomorrow": 1}))
    assert folders.read_manifest(final).step == 20


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step, value in ((10, 0.1), (20, 0.9), (30, None), (40, 0.3), (50, 0.2)):
        write(tmp_path, step, metrics={"p_mean": value})
    assert folders.prune(tmp_path, keep_last=None, keep_best=None) == []
    removed = folders.prune(tmp_path, keep_last=2, keep_best="p_mean")
    assert [path.name for path in removed] == ["iter_0000010", "iter_0000030"]
    left = ["iter_0000020", "iter_0000040", "iter_0000050", TRACKER]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    folders.prune(tmp_path, keep_last=1, keep_best="a metric that none has")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000050", TRACKER]


@pytest.mark.parametrize(
    ("keep_last", "left"),
    [
        (None, {50, 100, 150, 170, 180}),
        (1, {150, 180}),
        (2, {100, 150, 170, 180}),
    ],
)
def test_what_was_saved_for_the_time_alone_stays_while_it_is_among_the_newest_two(keep_last, left, tmp_path):
    by_time = {20, 90, 110, 160, 170, 180}
    for step in sorted({50, 100, 150} | by_time):
        write(tmp_path, step, by_time=step in by_time)
        folders.prune(tmp_path, keep_last=keep_last, keep_best=None)
    assert {folders.step_of(path) for path in tmp_path.glob("iter_*")} == left
    write(tmp_path, 200), write(tmp_path, 250)
    folders.prune(tmp_path, keep_last=keep_last, keep_best=None)
    assert not {folders.step_of(path) for path in tmp_path.glob("iter_*")} & by_time


def test_only_a_tokenizers_files_are_carried_along(tmp_path):
    model, partial = tmp_path / "model", tmp_path / "partial"
    model.mkdir(), partial.mkdir()
    for name in ("tokenizer.json", "generation_config.json", "model.safetensors"):
        (model / name).write_text(name)
    contents.carry_tokenizer(model, partial)
    assert sorted(p.name for p in (partial / "tokenizer").iterdir()) == ["generation_config.json", "tokenizer.json"]
    (tmp_path / "pieces.model").write_text("pieces")
    contents.carry_tokenizer(tmp_path / "pieces.model", partial)
    assert (partial / "tokenizer" / "tokenizer.model").read_text() == "pieces"


def test_a_damaged_manifest_is_not_mistaken_for_a_foreign_one(tmp_path):
    final = write(tmp_path, 20)
    (final / MANIFEST).write_text(json.dumps({"format": 1}))
    with pytest.raises(DamagedCheckpoint, match="not a manifest"):
        folders.read_manifest(final)
