"""Checkpoints of runs, cut anew, exported and described; and the command line of all four conversions."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from megatron_jq.checkpoint import folder
from megatron_jq.checkpoint.reshard import inspect, reshard
from megatron_jq.checkpoint.slabs import ShardLayout, main_weight, slab_axes
from megatron_jq.checkpoint.torch_dist import Shard, ShardReader, write_shards
from megatron_jq.cli.main import main
from megatron_jq.errors import UserError
from tests.unit.hf_folders import CUT, DOWN, TINY, export, make


def run_checkpoint(save: Path, config_json: str | None = None) -> dict[str, torch.Tensor]:
    """As a bfloat16 run at TP1 leaves it: weights, main weights, moments, random states. Key → whole tensor."""
    generator = torch.Generator().manual_seed(1)
    shapes, tensors = CUT.shapes(TINY), {}
    for key, shape in shapes.items():
        main = torch.randn(shape, generator=generator)
        tensors |= {key: main.bfloat16(), main_weight(key): main}
        tensors[f"optimizer.state.exp_avg.{key}"] = torch.randn(shape, generator=generator)
    tensors["random.torch"] = torch.randint(256, (2, 16), generator=generator).byte()
    partial = folder.begin(save, 30)
    rows = [Shard(k, tuple(t.shape), (i, *(0,) * (t.dim() - 1)), (1, *t.shape[1:]), t.dtype, lambda r=t[i : i + 1]: r)
            for k, t in tensors.items() for i in range(len(t))]  # fmt: skip
    write_shards(rows, partial)
    (partial / "tokenizer").mkdir()
    (partial / "tokenizer" / "tokenizer.model").write_bytes(b"pieces")
    if config_json is not None:
        (partial / "tokenizer" / "config.json").write_text(config_json)
    architecture = asdict(replace(TINY, vocab_size=None))
    manifest = folder.Manifest(30, architecture, 11, True, config="[model]\n", optimizer={"name": "adam", "step": 30})
    folder.commit(partial, manifest)
    return tensors


def test_resharding_keeps_weights_moments_and_random_states(tmp_path):
    tensors = run_checkpoint(tmp_path / "run")
    cut = reshard(tmp_path / "run", tmp_path / "cut", ShardLayout(2, 8))
    reader, axes = ShardReader(cut), slab_axes(TINY)
    assert reader.tensors.keys() == tensors.keys()
    for key, tensor in tensors.items():
        shape, dtype = reader.tensors[key]
        found = reader.read(key, (0,) * len(shape), shape)
        vocabulary = key.endswith(("word_embeddings.weight", "output_layer.weight"))
        assert dtype == tensor.dtype and shape[0] == (16 if vocabulary else tensor.shape[0])
        rows = 11 if vocabulary else len(tensor)
        assert torch.equal(found[:rows], tensor[:rows]), key
    fc1 = "decoder.layers.mlp.linear_fc1.weight"
    assert sorted(reader.stored_shards(fc1)) == [((l, r, 0), (1, 6, 8)) for l in range(2) for r in (0, 6, 12, 18)]  # noqa: E741
    assert len(reader.stored_shards("random.torch")) == 2 and axes[fc1] == 2
    manifest = folder.read_manifest(cut)
    assert (manifest.step, manifest.optimizer, manifest.config) == (30, {"name": "adam", "step": 30}, "[model]\n")
    assert (cut / "tokenizer" / "tokenizer.model").read_bytes() == b"pieces"
    folder.verify(cut, manifest, manifest.files)


def test_a_run_exports_its_weights_or_in_float32_its_main_weights(tmp_path):
    tensors = run_checkpoint(tmp_path / "run")
    for dtype, key in ((None, "embedding.word_embeddings.weight"), (torch.float32, None)):
        key = key or main_weight("embedding.word_embeddings.weight")
        # its tokenizer is no tokenizer: test_tokenizer_export.py has real ones
        found = export(tmp_path / "run", tmp_path / f"hf-{dtype}", dtype, with_tokenizer=False)
        assert torch.equal(found["model.embed_tokens.weight"], tensors[key][:11])
        down = tensors[key.replace("embedding.word_embeddings", "decoder.layers.mlp.linear_fc2")]
        assert torch.equal(found[DOWN], down[1])
    config = json.loads((tmp_path / "hf-None" / "config.json").read_text())
    assert config["model_type"] == "qwen3" and config["vocab_size"] == 11 and config["torch_dtype"] == "bfloat16"
    assert not (tmp_path / "hf-None" / "tokenizer.model").exists()
    with pytest.raises(UserError, match="is not a sentencepiece model"):
        export(tmp_path / "run", tmp_path / "with")


def test_a_config_of_another_kind_of_model_beside_the_tokenizer_does_not_matter(tmp_path):
    run_checkpoint(tmp_path / "run", json.dumps({"model_type": "gpt2", "n_ctx": 5}))
    export(tmp_path / "run", tmp_path / "back", with_tokenizer=False)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["model_type"] == "qwen3" and "n_ctx" not in config


def test_inspect_tells_step_architecture_tensors_and_settings(tmp_path):
    run_checkpoint(tmp_path / "run")
    text = inspect(tmp_path / "run")
    for expected in (
        "iter_0000030: step 30",
        "vocabulary of 11 tokens",
        "name adam, step 30",
        "hidden_size",
        "[model]",
    ):
        assert expected in text
    [line] = [line for line in text.splitlines() if line.startswith("optimizer.state.exp_avg.output_layer")]
    assert line.split() == ["optimizer.state.exp_avg.output_layer.weight", "12", "x", "8", "float32", "384", "B", "12"]


# The command


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "convert: the following arguments are required: COMMAND"),
        (["merge"], "argument COMMAND: invalid choice: 'merge'"),
        (["inspect"], "convert inspect: the following arguments are required: --load"),
        (["hf-to-megatron", "--hf", "nowhere", "--save", "new"], "--hf nowhere: there is no such folder"),
        (["inspect", "--load", "nowhere"], "--load nowhere: there is no such folder"),
        (["reshard", "--load", "a", "--save", "b", "--tensor-model-parallel-size", "0"], "at least 1, not '0'"),
        (["megatron-to-hf", "--load", "a", "--hf", "b", "--max-shard-size", "5 elephants"], "such as 5GB or 500MB"),
        (["megatron-to-hf", "--load", "a", "--hf", "b", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_the_command_answers_mistakes_in_one_line(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_refuses_to_run_on_several_ranks(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["convert", "inspect", "--load", str(tmp_path)]) == 2
    assert "runs in one process" in capsys.readouterr().err


def test_the_command_converts_both_ways_and_refuses_an_uneven_cut(tmp_path, capsys):
    source = make(tmp_path / "hf")
    save, back = str(tmp_path / "megatron"), str(tmp_path / "back")
    uneven = ["--save", save, "--tensor-model-parallel-size", "5"]
    assert main(["convert", "hf-to-megatron", "--hf", str(source), *uneven]) == 2
    assert "--tensor-model-parallel-size does not divide" in capsys.readouterr().err
    assert main(["convert", "hf-to-megatron", "--hf", str(source), "--save", save]) == 0
    arguments = ["--load", save, "--hf", back, "--max-shard-size", "1kb", "--dtype", "bfloat16"]
    assert main(["convert", "megatron-to-hf", *arguments]) == 0
    assert main(["convert", "inspect", "--load", save]) == 0
    assert "checksums verified" in capsys.readouterr().out
    assert len(list(Path(back).glob("*.safetensors"))) > 3
