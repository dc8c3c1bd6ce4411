"""`--model FOLDER` trains the folder's weights; where weights come from is always said; nothing is trained in silence.

Why: a folder with safetensors that is taken for its config.json alone trains random weights to the end, exit code 0.
What a layout does to the weights is in distributed/test_hf_families.py.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_jq.architecture import Architecture
from megatron_jq.model.hf import hugging_face_tensors
from megatron_jq.model.hf_config import hugging_face_config
from megatron_jq.records import MEASURED
from tests.e2e.launch import SMALL, run

SHAPE = Architecture(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, kv_channels=8,
    max_position_embeddings=128, qk_layernorm=True, vocab_size=300,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tied Qwen3 with random weights and a byte-level tokenizer."""
    import tokenizers

    path = tmp_path_factory.mktemp("models") / "qwen"
    path.mkdir()
    generator = torch.Generator().manual_seed(5)
    tensors = {t.name: 0.1 * torch.randn(t.shape, generator=generator) for t in hugging_face_tensors(SHAPE)}
    save_file({name: t + 1 if "norm" in name else t for name, t in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(hugging_face_config(SHAPE, "float32")), encoding="utf-8")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator([], tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    model.add_special_tokens(["<|end|>"])
    model.add_tokens([tokenizers.AddedToken(name, special=False) for name in ("<think>", "</think>")])
    model.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}', encoding="utf-8")
    return path


def train(tmp_path: Path, name: str, *flags: str, size: int = 1):
    """(ranks, lines of metrics without times) of a run in tmp_path/name."""
    ended = run(
        [*SMALL, "--run-dir", str(tmp_path / name), "--q", "1", "--no-tensorboard", *flags], tmp_path, size=size
    )
    metrics = tmp_path / name / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.open(encoding="utf-8")] if metrics.exists() else []
    return ended, [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def refused(ended, *words: str) -> None:
    for end in ended:
        assert end.code == 2 and all(word in end.err for word in words), end


@pytest.mark.parametrize("flags", [[], ["--bf16"]])
def test_a_folder_is_trained_as_its_conversion_is(folder, tmp_path, flags):
    [done] = run(["convert", "hf-to-megatron", "--hf", str(folder), "--save", str(tmp_path / "converted")], tmp_path)
    assert done.code == 0, done
    model = ["--model", str(folder), *flags]
    [from_folder], straight = train(tmp_path, "straight", *model)
    [from_checkpoint], converted = train(tmp_path, "converted-run", *model, "--load", str(tmp_path / "converted"))
    assert from_folder.code == from_checkpoint.code == 0 and len(straight) == 3, from_folder
    assert straight == converted
    assert f"begins with the weights of {folder} (Hugging Face)" in from_folder.out
    assert f"begins with the weights of {tmp_path}/converted/iter_0000000 (step 0)" in from_checkpoint.out
    assert f"tokenizer {tmp_path}/straight/tokenizer | " in from_folder.out
    [from_load], loaded = train(tmp_path, "loaded", *model[:0], *flags, "--model", str(folder), "--load", str(folder))
    assert from_load.code == 0 and loaded == straight
    random = train(tmp_path, "random", "--model", str(folder / "config.json"), "--tokenizer-model", str(folder), *flags)
    assert random[0][0].code == 0 and "begins with random weights (--seed 1234)" in random[0][0].out
    assert random[1][0]["log_p_mean"] != straight[0]["log_p_mean"]


def test_a_resumed_run_has_its_own_weights_wherever_the_folder_is(folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    [first], lines = train(tmp_path, "run", "--model", str(source), "--train-iters", "5", "--save-interval", "1")
    (tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("4\n", encoding="utf-8")
    (source / "model.safetensors").write_bytes(b"damaged meanwhile, and not read")
    again = ["--model", str(source), "--train-iters", "5", "--save-interval", "1", "--resume"]
    [second], resumed = train(tmp_path, "run", *again)
    assert (first.code, second.code) == (0, 0), second
    assert "iter_0000004: 4 steps are done" in second.out and resumed == lines
    [third], _ = train(tmp_path, "run", *again)  # a job that starts again after its end, as launchers do
    assert third.code == 0 and "5 steps are done, nothing is left to do (--train-iters 5)" in third.out
    ended, _ = train(tmp_path, "other", "--model", str(source), "--load", str(tmp_path / "run/checkpoints"))
    refused(ended, "--load", "its run is done (5 steps, --train-iters 3)", "--finetune", "--train-iters")
    assert not (tmp_path / "other" / "metrics.jsonl").exists()


def broken(folder: Path, target: Path, how: str) -> Path:
    """The folder with one thing wrong."""
    shutil.copytree(folder, target)
    tensors, weights = load_file(target / "model.safetensors"), target / "model.safetensors"
    if how == "pickles alone":
        weights.rename(target / "pytorch_model.bin")
    elif how == "no shard":
        weights.unlink()
        index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
        (target / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    elif how == "shards without index":
        weights.rename(target / "model-00001-of-00002.safetensors")
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "no tokenizer":
        (target / "tokenizer.json").unlink()
    else:
        if how == "lacking":
            del tensors["model.norm.weight"]
        elif how == "other shape":
            tensors["model.norm.weight"] = torch.ones(31)
        elif how == "unknown":
            tensors["model.norm.bias"] = torch.ones(32)
        save_file(tensors, weights)
    return target


@pytest.mark.parametrize(
    ("how", "words"),
    {
        "pickles alone": ("--model", "pickled weights", "safetensors"),
        "no shard": ("model-00001-of-00001.safetensors, which is missing",),
        "shards without index": ("--model", "holds no weights: neither model.safetensors nor"),
        "cut": ("not a whole safetensors file",),
        "lacking": ("lacks 1 of the tensors", "model.norm.weight"),
        "other shape": ("model.norm.weight has shape (31,)",),
        "unknown": ("has unexpected tensors", "model.norm.bias"),
        "no tokenizer": ("holds no tokenizer", "--tokenizer-model"),
    }.items(),
)
def test_a_folder_whose_weights_cannot_be_read_is_no_random_model(folder, tmp_path, how, words):
    path = broken(folder, tmp_path / "broken", how)
    ended, lines = train(tmp_path, "run", "--model", str(path), "--tensor-model-parallel-size", "2", size=2)
    refused(ended, *words)
    assert not lines and not (tmp_path / "run" / "config.toml").exists()


def test_other_sizes_than_the_folders_are_refused(folder, tmp_path):
    ended, _ = train(tmp_path, "run", "--model", str(folder), "--ffn-hidden-size", "64")
    refused(ended, "ffn_hidden_size is 48 there and 64 here")
    ended, _ = train(tmp_path, "run", "--load", str(folder))
    refused(ended, "holds another architecture", "name it with --model")


def test_a_folder_is_evaluated_without_a_copy_on_disk(folder, tmp_path):
    data = ["--eval-data", "builtin:recall", "--eval-examples", "3", "--eval-samples", "2", "--rationale-budget", "4"]
    argv = ["evaluate", "--hf", str(folder), *data, "--device", "cpu", "--output", str(tmp_path / "out")]
    for size, layout in ((1, []), (2, ["--tensor-model-parallel-size", "2"])):
        output = ["--output", str(tmp_path / f"out{size}")]
        ended = run([*argv[:-2], *output, *layout], tmp_path, size=size)
        assert [end.code for end in ended] == [0] * size, ended
        assert f"evaluates the weights of {folder} (Hugging Face)" in ended[0].out
    names = sorted(path.name for path in (tmp_path / "out1").iterdir())
    assert names == ["evaluation.json", "samples.jsonl"]
    heads = [json.loads((tmp_path / f"out{n}/samples.jsonl").open(encoding="utf-8").readline()) for n in (1, 2)]
    assert heads[0] == heads[1]
    (ended,) = run(["evaluate", "--load", str(folder), *data, "--output", str(tmp_path / "x")], tmp_path)
    refused([ended], "it is a Hugging Face folder", "--hf")
