"""Names that stand in a file (a manifest, an index, a sweep) never lead out of its folder, whatever reads them.

Why: checkpoints, Hugging Face folders and prepared sets are copied from anywhere. One that names `../../x` must not
have us write there, nor read from there.
"""

import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_jq.checkpoint import folder
from megatron_jq.checkpoint.convert import hf_to_megatron
from megatron_jq.checkpoint.folder import DamagedCheckpoint
from megatron_jq.checkpoint.reshard import inspect, reshard
from megatron_jq.checkpoint.slabs import ShardLayout
from megatron_jq.checkpoint.torch_dist import ShardReader
from megatron_jq.data.prepared import read_prepared
from megatron_jq.errors import RunFailure, UserError
from megatron_jq.files import inside
from megatron_jq.grid import read_grid
from megatron_jq.preflight.facts import Facts
from megatron_jq.preflight.verdict import unseen_marks
from tests.unit.hf_folders import CUT, export, make

#: Names that lead out of a folder, or to no file in it.
HOSTILE = ("../../secret", "/secret", "tokenizer/../../secret", "..", ".", "", "a//b", "a/./b", "..\\secret", "a\0b")
PARTS = st.one_of(st.sampled_from(["..", ".", "", "a", "b.json", "\0", "\\", "~"]), st.text(max_size=3))


@given(st.lists(PARTS, max_size=5).map("/".join))
def test_any_name_is_a_path_below_the_folder_or_is_refused(name):
    root = Path("/some/folder")
    try:
        path = inside(root, name, "manifest")
    except UserError as error:
        assert "manifest names" in str(error)
    else:
        assert ".." not in path.parts and path != root and path.is_relative_to(root)
        assert path.relative_to(root).as_posix() == name


@pytest.mark.parametrize("name", [None, 3, ["a"], {"a": 1}, b"a"])
def test_what_is_no_text_is_no_name(name):
    with pytest.raises(DamagedCheckpoint):
        inside(Path("x"), name, "manifest", DamagedCheckpoint)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A whole one, two folders below a file that is nobody's business."""
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    hf_to_megatron(make(tmp_path / "hf"), tmp_path / "in" / "megatron", CUT)
    return tmp_path / "in" / "megatron" / "iter_0000000"


def rename_in_manifest(checkpoint: Path, name: str) -> None:
    """The manifest promises the secret's content under `name` in place of a tokenizer's file; checksums are right."""
    path = checkpoint / "checkpoint.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    del table["files"]["tokenizer/tokenizer_config.json"]
    secret = checkpoint.parents[2]
    table["files"][name] = folder.checksums(secret, ["secret"])["secret"]
    path.write_text(json.dumps(table), encoding="utf-8")


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("command", [inspect, lambda c: reshard(c, c.parents[1] / "new", ShardLayout(1, 8)), export])
def test_a_manifest_names_files_of_its_folder_alone(command, name, checkpoint, tmp_path):
    rename_in_manifest(checkpoint, name)
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    with pytest.raises(UserError, match="names .*, which is no file below"):
        command(checkpoint, tmp_path / "in" / "out" / "new") if command is export else command(checkpoint)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before
    assert (tmp_path / "secret").read_text(encoding="utf-8") == "secret"


def test_an_export_takes_what_the_manifest_lists_and_nothing_that_was_put_beside(checkpoint, tmp_path):
    (checkpoint / "tokenizer" / "vocab.json").symlink_to(tmp_path / "secret")
    export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out" / "vocab.json").exists() and (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("name", HOSTILE)
def test_an_index_of_tensors_names_files_of_its_folder_alone(name, checkpoint):
    with open(checkpoint / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    for stored in metadata.storage_data.values():
        stored.relative_path = name
    with open(checkpoint / ".metadata", "wb") as file:
        pickle.dump(metadata, file)
    with pytest.raises(DamagedCheckpoint, match="which is no file below"):
        ShardReader(checkpoint)


@pytest.mark.parametrize("name", [*HOSTILE, None, 7])
def test_a_safetensors_index_names_files_of_its_folder_alone(name, tmp_path):
    source = make(tmp_path / "hf")
    index = {"weight_map": {"model.norm.weight": name}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match="which is no file below"):
        hf_to_megatron(source, tmp_path / "out", CUT)


def test_links_in_a_folder_are_followed_as_the_hub_cache_is_made_of_them(tmp_path):
    source, blobs = make(tmp_path / "hf"), tmp_path / "blobs"
    blobs.mkdir()
    for path in list(source.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    assert hf_to_megatron(source, tmp_path / "out", CUT).is_dir()


@pytest.mark.parametrize("field", ["tokenizer_type", "splits"])
def test_a_prepared_set_names_no_path(field, tmp_path):
    manifest = {
        "format": 2, "content": "", "data_format": "jsonl", "prompt_style": "plain", "template_sha256": "",
        "tokenizer_type": "sentencepiece", "tokenizer": "",
        "splits": {"train": {"rows": 1, "sha256": "", "fingerprint": ""}},
    }  # fmt: skip
    manifest[field] = "../../secret" if field == "tokenizer_type" else {"../../secret": manifest["splits"]["train"]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UserError, match="no manifest|no split"):
        read_prepared(str(tmp_path), "train")


@pytest.mark.parametrize("values", ['["..", "x"]', '["", "x"]', '[".", "x"]'])
def test_a_point_of_a_sweep_has_a_folder_of_its_own(values, tmp_path):
    (tmp_path / "grid.toml").write_text(f"prompt_field = {values}\n", encoding="utf-8")
    with pytest.raises(UserError, match="grid.toml names"):
        read_grid(tmp_path / "grid.toml")


@pytest.mark.parametrize("name", HOSTILE[:5])
def test_a_node_of_a_job_names_a_file_of_the_run_directory_alone(name, tmp_path):
    node = Facts("n1", (), "", "", 0, None, None, name, ())
    with pytest.raises(RunFailure, match="n1 names"):
        unseen_marks({"n1": node}, tmp_path)


def test_a_checkpoint_written_by_us_names_its_files_so(checkpoint):
    manifest = folder.read_manifest(checkpoint)
    folder.verify(checkpoint, manifest, manifest.files)
    assert torch.equal(*[ShardReader(checkpoint).read("decoder.final_layernorm.weight", (0,), (8,)) for _ in range(2)])
