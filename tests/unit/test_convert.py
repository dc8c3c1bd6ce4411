"""Conversions in one process: what is refused, what is left behind, and what is carried along."""

import errno
import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from megatron_jq.checkpoint import convert, folder, huggingface
from megatron_jq.checkpoint.convert import hf_to_megatron
from megatron_jq.checkpoint.reshard import reshard
from megatron_jq.checkpoint.slabs import ShardLayout
from megatron_jq.errors import UserError
from tests.unit.hf_folders import CUT, DOWN, NORM, SMALL_FILES, TINY, assert_same, export, make, weights


@pytest.fixture
def source(tmp_path):
    return make(tmp_path / "hf")


@pytest.fixture
def checkpoint(source, tmp_path):
    hf_to_megatron(source, tmp_path / "megatron", CUT)
    return tmp_path / "megatron"


# What arrives


def test_everything_arrives_back_byte_for_byte(source, checkpoint, tmp_path):
    assert_same(export(checkpoint, tmp_path / "back"), load_file(source / "model.safetensors"))
    for name in ("config.json", *SMALL_FILES):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == sorted(p.name for p in source.iterdir())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_folder_is_kept(tmp_path, dtype):
    tensors = weights(dtype=dtype)
    hf_to_megatron(make(tmp_path / "hf", tensors), tmp_path / "megatron", CUT)
    assert folder.read_manifest(tmp_path / "megatron" / "iter_0000000").bf16 == (dtype == torch.bfloat16)
    assert_same(export(tmp_path / "megatron", tmp_path / "back"), tensors)


def test_an_export_in_another_dtype_is_rounded_once_and_says_so_in_its_config(source, checkpoint, tmp_path):
    expected = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    assert_same(export(checkpoint, tmp_path / "back", torch.bfloat16), expected)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_files_are_split_at_the_size_and_listed_in_the_index(source, checkpoint, tmp_path):
    found = export(checkpoint, tmp_path / "back", max_shard_bytes=700)
    assert_same(found, load_file(source / "model.safetensors"))
    files = {path.name: load_file(path) for path in (tmp_path / "back").glob("*.safetensors")}
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    assert set(files) == {f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))}
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in files.values()]
    assert len(files) > 5 and all(s <= 700 or len(t) == 1 for s, t in zip(sizes, files.values(), strict=True))
    hf_to_megatron(tmp_path / "back", tmp_path / "again", ShardLayout(2, 1))
    assert_same(export(tmp_path / "again", tmp_path / "twice"), found)


def test_a_tied_folder_that_holds_its_output_layer_all_the_same_is_read(tmp_path):
    """As Qwen3-0.6B's does."""
    tied = replace(TINY, tie_embeddings=True)
    tensors = weights(tied)
    twice = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    hf_to_megatron(make(tmp_path / "hf", twice, tied), tmp_path / "megatron", CUT)
    assert_same(export(tmp_path / "megatron", tmp_path / "back"), tensors)
    twice["lm_head.weight"][10, 7] += 1
    with pytest.raises(UserError, match="lm_head.weight is not model.embed_tokens.weight"):
        hf_to_megatron(make(tmp_path / "other", twice, tied), tmp_path / "no", CUT)


# What is refused


def broken(change):
    """A folder whose tensors `change` has changed."""

    def build(path):
        tensors = weights()
        change(tensors)
        return make(path, tensors)

    return build


def _truncated(path):
    make(path)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-1])
    return path


def _index(path, **weight_map):
    make(path)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def _pickled(path):
    make(path)
    (path / "model.safetensors").unlink()
    torch.save({}, path / "pytorch_model.bin")
    return path


def _without(name):
    def build(path):
        make(path)
        (path / name).unlink()
        return path

    return build


REFUSALS = {
    "a missing tensor": (broken(lambda t: t.pop(NORM)), "lacks 1 .*model.norm.weight"),
    "an extra tensor": (broken(lambda t: t.update({"a.bias": torch.ones(2)})), "unexpected tensors, 1 .*a.bias"),
    "a wrong shape": (
        broken(lambda t: t.update({DOWN: torch.ones(8, 11)})),
        r"\(8, 11\), by its config.json \(8, 12\)",
    ),
    "mixed dtypes": (broken(lambda t: t.update({DOWN: t[DOWN].half()})), "save the folder in one dtype"),
    "a quantised tensor": (
        broken(lambda t: t.update({DOWN: torch.ones(8, 12, dtype=torch.int8)})),
        "type I8; quantised checkpoints cannot be read",
    ),
    "an unknown family": (lambda path: make(path, model_type="gpt2"), "model_type 'gpt2' is not supported"),
    "no config": (_without("config.json"), "cannot read .*config.json"),
    "no weights": (_without("model.safetensors"), "holds no weights"),
    "a truncated file": (_truncated, "model.safetensors is not a whole safetensors file"),
    "pickles": (_pickled, "can run code and are not read; convert them to safetensors"),
    "a missing shard": (lambda path: _index(path, **{NORM: "model-2.safetensors"}), "model-2.safetensors, which is m"),
    "a wrong index": (lambda path: _index(path, nothing="model.safetensors"), "holds nothing, but it does not"),
    "an index that leads elsewhere": (
        lambda path: _index(path, **{NORM: "../hf/model.safetensors"}),
        "which is no file below",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_folder_is_refused_in_one_line_and_nothing_is_left_behind(name, tmp_path):
    build, message = REFUSALS[name]
    source = build(tmp_path / "hf")
    with pytest.raises(UserError, match=message) as caught:
        hf_to_megatron(source, tmp_path / "megatron", CUT)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "megatron").exists()


def test_existing_targets_are_refused_and_left_alone(source, checkpoint, tmp_path):
    before = (checkpoint / "iter_0000000" / "checkpoint.json").read_bytes()
    for work in (lambda: hf_to_megatron(source, checkpoint, CUT), lambda: reshard(checkpoint, checkpoint, CUT)):
        with pytest.raises(UserError, match="--save .* exists and is not empty"):
            work()
    assert (checkpoint / "iter_0000000" / "checkpoint.json").read_bytes() == before
    with pytest.raises(UserError, match="--hf .* exists and is not empty"):
        export(checkpoint, source)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        export(checkpoint, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert_same(export(checkpoint, tmp_path / "empty"), load_file(source / "model.safetensors"))


def _full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_no_partial_folder(checkpoint, source, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "write_weights", _full_disk)
    monkeypatch.setattr(convert, "write_shards", _full_disk)
    with pytest.raises(UserError, match="--hf .* cannot be written: No space left"):
        export(checkpoint, tmp_path / "back")
    with pytest.raises(UserError, match="--save .* cannot be written: No space left"):
        hf_to_megatron(source, tmp_path / "new", CUT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


def test_what_a_killed_conversion_left_is_removed_by_the_next(checkpoint, source, tmp_path):
    for path in (tmp_path / ".back.partial", tmp_path / "new" / ".iter_0000000.partial"):
        path.mkdir(parents=True)
        (path / "model.safetensors").write_text("half")
    assert_same(export(checkpoint, tmp_path / "back"), load_file(source / "model.safetensors"))
    hf_to_megatron(source, tmp_path / "new", CUT)
    assert not (tmp_path / ".back.partial").exists()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["iter_0000000", folder.TRACKER]


def test_a_writer_that_drops_or_bends_a_tensor_is_caught_before_the_folder_appears(checkpoint, tmp_path, monkeypatch):
    write = huggingface.write_weights
    without = lambda f, signature, *rest: write(f, dict(list(signature.items())[:-1]), *rest)  # noqa: E731
    monkeypatch.setattr(convert, "write_weights", without)
    with pytest.raises(UserError, match="lacks 1 of the tensors"):
        export(checkpoint, tmp_path / "back")
    assert not list(tmp_path.glob("*back*"))


def test_a_damaged_checkpoint_is_not_exported(checkpoint, tmp_path):
    [file] = (checkpoint / "iter_0000000").glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="no whole checkpoint; .* does not match its checksum"):
        export(checkpoint, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_without_the_safetensors_package_the_message_says_what_to_install(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match=r"pip install megatron-jq\[hf\]"):
        hf_to_megatron(source, tmp_path / "megatron", CUT)
