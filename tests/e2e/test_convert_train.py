"""A Hugging Face model through the whole command line: converted, trained on two stages, exported, loaded again."""

import json
import shutil
from pathlib import Path

import torch

from tests.distributed.ranks import run_apart
from tests.e2e.launch import SMALL, run


def _make(folder: Path) -> None:
    """A tied Qwen3 with a byte-level tokenizer, as transformers and tokenizers write them."""
    import tokenizers
    from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config

    torch.manual_seed(0)
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator([], tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    model.add_special_tokens(["<|end|>"])
    model.add_tokens([tokenizers.AddedToken(name, special=False) for name in ("<think>", "</think>")])
    config = Qwen3Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=256,
    )  # fmt: skip
    policy = AutoModelForCausalLM.from_config(config)
    policy.generation_config = GenerationConfig(eos_token_id=256, temperature=0.6, do_sample=True)
    policy.save_pretrained(folder)
    model.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _loaded(folder: Path) -> tuple[dict[str, torch.Tensor], list[int], float]:
    """(weights, ids of "a b", temperature of generation) as transformers reads them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return weights, AutoTokenizer.from_pretrained(folder)("a b")["input_ids"], model.generation_config.temperature


def _ends_well(argv: list[str], folder: Path, size: int = 1) -> None:
    ended = run(argv, folder, size=size)
    assert [end.code for end in ended] == [0] * size, ended


def test_a_converted_model_is_trained_and_exported(tmp_path):
    source, checkpoint, back = tmp_path / "hf", tmp_path / "megatron", tmp_path / "back"
    run_apart(_make, source)
    _ends_well(["convert", "hf-to-megatron", "--hf", str(source), "--save", str(checkpoint)], tmp_path)
    carried = tmp_path / "carried"  # the checkpoint holds all that is needed: the original folder may go
    shutil.copytree(checkpoint / "iter_0000000" / "tokenizer", carried)
    shutil.move(source, tmp_path / "moved")
    flags = [
        "--model", str(carried), "--load", str(checkpoint), "--tokenizer-type", "huggingface", "--tokenizer-model",
        str(carried), "--pipeline-model-parallel-size", "2", "--run-dir", str(tmp_path / "run"), "--lr", "1e-3",
        "--q", "1",
    ]  # fmt: skip
    _ends_well([*SMALL, *flags], tmp_path, size=2)
    saved = str(tmp_path / "run" / "checkpoints")
    _ends_well(["convert", "megatron-to-hf", "--load", saved, "--hf", str(back)], tmp_path)
    before, after = run_apart(_loaded, tmp_path / "moved"), run_apart(_loaded, back)
    assert after[1:] == before[1:] and after[2] == 0.6
    assert after[0].keys() == before[0].keys()
    moved = [(after[0][name] - tensor).abs().max().item() for name, tensor in before[0].items()]
    assert 1e-6 < max(moved) < 3 * 1.1e-3  # three steps of Adam at 1e-3, from these weights and no others
