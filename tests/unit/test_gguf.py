"""GGUF files as input of `convert`: every family's tensors, types, tokenizers, and what is refused."""

import json
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch

from megatron_jq.architecture import Architecture, RopeScaling
from megatron_jq.architecture_files import load_architecture, read_hugging_face_config
from megatron_jq.checkpoint import contents
from megatron_jq.checkpoint.convert import hf_to_megatron
from megatron_jq.data.gguf_files import read_gguf
from megatron_jq.data.gguf_tokenizer import tokenizer_files
from megatron_jq.data.tokenizer_choice import kind_of
from megatron_jq.data.tokenizers import load_tokenizer
from megatron_jq.errors import UserError
from megatron_jq.evaluate.inputs import first_settings
from tests.unit import tokenizer_kinds
from tests.unit.hf_folders import CUT, assert_same, export, weights

gguf = pytest.importorskip("gguf")
gguf_files = pytest.importorskip("tests.unit.gguf_files")
write, TYPES = gguf_files.write, gguf_files.TYPES

PLAIN = Architecture(
    num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=8,
    max_position_embeddings=64, tie_embeddings=True, vocab_size=36, norm_epsilon=1e-5, rotary_base=1e5,
)  # fmt: skip
FAMILIES = {
    "llama": PLAIN,
    "qwen2": replace(PLAIN, add_qkv_bias=True, tie_embeddings=False),
    "qwen3": replace(PLAIN, qk_layernorm=True, kv_channels=16),
    "qwen3moe": replace(
        PLAIN, qk_layernorm=True, num_experts=3, moe_router_topk=2, moe_ffn_hidden_size=32, moe_norm_topk_prob=True,
        tie_embeddings=False,
    ),
}  # fmt: skip


def converted(path: Path, folder: Path, **options) -> dict[str, torch.Tensor]:
    """Through a checkpoint of ours and back into Hugging Face's form."""
    hf_to_megatron(path, folder / "megatron", CUT, **options)
    return export(folder / "megatron", folder / "hf")


def refusal(path: Path, tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught:
        hf_to_megatron(path, tmp_path / "no", CUT)
    assert not (tmp_path / "no").exists() and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_arrives_bit_for_bit_and_the_config_says_what_it_is(family, tmp_path):
    architecture, lines = FAMILIES[family], []
    tensors = weights(architecture)
    path = write(tmp_path / "model.gguf", architecture, tensors, family)
    assert_same(converted(path, tmp_path, log=lines.append), tensors)
    assert read_hugging_face_config(tmp_path / "hf" / "config.json") == architecture
    [line] = lines
    assert "gets no tokenizer" in line and "'nobody-knows'" in line and "--tokenizer-model" in line


@pytest.mark.parametrize("kind", [TYPES.F16, TYPES.BF16, TYPES.Q8_0, TYPES.Q4_1], ids=lambda kind: kind.name)
def test_packed_values_are_those_of_the_packages_own_unpacking(kind, tmp_path):
    """Rows are packed one by one, so that turned rows unpack to the same values."""
    tensors = weights(PLAIN)
    path = write(tmp_path / "model.gguf", PLAIN, tensors, "llama", kind=kind)
    expected = {
        name: torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.numpy(), kind), kind).copy())
        if tensor.dim() > 1
        else tensor
        for name, tensor in tensors.items()
    }
    assert any(not torch.equal(expected[name], tensor) for name, tensor in tensors.items())
    assert_same(converted(tmp_path, tmp_path, log=lambda line: None), expected)  # the folder that holds it
    assert path.is_file()


def test_llama_3s_scaling_of_frequencies_is_read_and_another_is_refused(tmp_path):
    scaled = replace(PLAIN, rope_scaling=RopeScaling(32.0), rotary_base=5e5, kv_channels=16)
    tensors = weights(scaled)
    converted(write(tmp_path / "model.gguf", scaled, tensors, "llama"), tmp_path, log=lambda line: None)
    assert read_hugging_face_config(tmp_path / "hf" / "config.json") == scaled
    other = replace(scaled, rope_scaling=RopeScaling(32.0, original_max_position_embeddings=4096))
    path = write(tmp_path / "other.gguf", other, tensors, "llama")
    assert "rope_freqs.weight is no scaling of Llama 3's" in refusal(path, tmp_path)


def test_tokens_are_added_to_a_file_as_to_a_folder(tmp_path):
    folder = tokenizer_kinds.make(tmp_path / "tokenizer", "byte-level")
    size = load_tokenizer("huggingface", folder).vocab_size
    architecture = replace(PLAIN, vocab_size=size)
    tensors = weights(architecture)
    path = write(tmp_path / "model.gguf", architecture, tensors, "llama", tokenizer=folder)
    grown = converted(path, tmp_path, new_tokens=["<plan>"])["model.embed_tokens.weight"]
    assert len(grown) == size + 1 and torch.equal(grown[:-1], tensors["model.embed_tokens.weight"])
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json")).token_to_id("<plan>") == size
    with pytest.raises(UserError, match=f"{path} has '<think>' .* already"):
        converted(path, tmp_path / "no", new_tokens=["<think>"])


@pytest.mark.parametrize("kind", ["byte-level", "prepend"])
def test_the_tokenizer_gives_the_ids_of_the_one_that_it_was_made_of(kind, tmp_path):
    folder = tokenizer_kinds.make(tmp_path / "tokenizer", kind)
    original = load_tokenizer("huggingface", folder)
    architecture = replace(PLAIN, vocab_size=original.vocab_size)
    path = write(tmp_path / "model.gguf", architecture, weights(architecture), "llama", tokenizer=folder)
    hf_to_megatron(path, tmp_path / "megatron", CUT)
    contents.carry_tokenizer(path, tmp_path)
    carried = tmp_path / "megatron" / "iter_0000000" / "tokenizer"
    for kind_and_path in (
        kind_of("sentencepiece", path), ("huggingface", carried), ("huggingface", tmp_path / "tokenizer"),
    ):  # fmt: skip
        tokenizer = load_tokenizer(*kind_and_path)
        for text in (*tokenizer_kinds.TEXTS, "<think> 7 </think>[INST]", "\n\n é <s>", " a  b"):
            assert tokenizer.encode(text) == original.encode(text), text
        ids = original.encode("what is 12 + 30 ?")
        assert tokenizer.decode(ids) == original.decode(ids)
        for name in ("eos_id", "pad_id", "think_open_id", "think_close_id", "vocab_size"):
            assert getattr(tokenizer, name) == getattr(original, name), name
        assert tokenizer.bos_ids("auto") == [] and tokenizer.bos_ids("on") == original.bos_ids("on")
        assert tokenizer.chat_frame(system=False).texts == ("", "")


@pytest.mark.parametrize(
    ("rule", "splits"),
    [
        ("gpt-2", ["It", "'s", "Ġ1234", "!", "Ċ", "ĠX"]),
        ("smollm", ["It", "'s", "Ġ", "1", "2", "3", "4", "!", "Ċ", "ĠX"]),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "4", "!Ċ", "ĠX"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "!Ċ", "ĠX"]),
        ("tekken", ["It", "'s", "Ġ", "1", "2", "3", "4", "!Ċ", "ĠX"]),
    ],
)
def test_texts_are_split_by_the_rule_that_the_file_names(rule, splits, tmp_path):
    """gpt-2, smollm: tokenizers' own parts, as the models' tokenizer.json; the others: patterns of these families."""
    folder = tokenizer_kinds.make(tmp_path / "tokenizer", "byte-level")
    architecture = replace(PLAIN, vocab_size=load_tokenizer("huggingface", folder).vocab_size)
    path = write(tmp_path / "model.gguf", architecture, weights(architecture), "llama", tokenizer=folder)
    file = read_gguf(path, "--hf")
    files = tokenizer_files(replace(file, values={**file.values, "tokenizer.ggml.pre": rule}))
    tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    assert [text for text, _ in tokenizer.pre_tokenizer.pre_tokenize_str("It's 1234!\n X")] == splits
    begins = rule in ("llama-bpe", "tekken")
    assert json.loads(files["tokenizer_config.json"])["add_bos_token"] == begins
    assert (tokenizer.encode("a").ids[0] == tokenizer.token_to_id("<s>")) == begins


def test_a_file_that_is_none_is_cut_off_or_one_of_several_is_named(tmp_path):
    path = write(tmp_path / "whole.gguf", PLAIN, weights(PLAIN), "llama")
    content, other = path.read_bytes(), tmp_path / "other.gguf"
    start = read_gguf(path, "--hf").tensors["blk.1.ffn_up.weight"].start
    for damaged, says in (
        (b"a text, by that name\n" * 9, "does not begin as a GGUF file does"),
        (b"", "does not begin as a GGUF file does"),
        (content[:700], "ends before its list of tensors does; download it again"),
        (content[: start + 100], "ends within blk."),
        (content[:4] + struct.pack(">I", 3) + content[8:], "version 0x3000000 of the format"),
    ):
        other.write_bytes(damaged)
        message = refusal(other, tmp_path)
        assert says in message and str(other) in message, message
    assert "cannot be read: No such file" in refusal(tmp_path / "none.gguf", tmp_path)
    message = refusal(tmp_path, tmp_path)
    assert "holds 2 GGUF files (other.gguf, whole.gguf); name one of them: --hf" in message
    write(other, PLAIN, weights(PLAIN), "llama", keys={"split.count": 3, "split.no": 1})
    assert "is part 2 of 3" in (message := refusal(other, tmp_path)) and "llama-gguf-split --merge" in message


@pytest.mark.parametrize(
    ("family", "keys", "says"),
    [
        ("gemma3", {}, "a model of the family 'gemma3'; these are converted: llama, qwen2, qwen3, qwen3moe"),
        ("llama", {"llama.expert_count": 8}, "of the family 'llama' with experts"),
        ("llama", {"llama.rope.scaling.type": "yarn"}, "rope.scaling.type = yarn is not converted, only none"),
        ("llama", {"llama.rope.dimension_count": 4}, "llama.rope.dimension_count = 4 is not converted, only 8"),
        ("llama", {"llama.attention.head_count_kv": [2, 1]}, "attention.head_count_kv differs from layer to layer"),
        ("llama", {"llama.block_count": None}, "llama.block_count is missing"),
        ("llama", {"llama.block_count": 1}, "has unexpected tensors, 9 in all: blk.1.attn_k.weight"),
        ("llama", {"llama.block_count": 3}, "lacks tensors, 9 in all: blk.2.attn_k.weight"),
    ],
)
def test_a_model_that_is_not_converted_is_refused_by_file_and_key(family, keys, says, tmp_path):
    path = write(tmp_path / "model.gguf", PLAIN, weights(PLAIN), family, keys=keys)
    message = refusal(path, tmp_path)
    assert says in message and str(path) in message, message


def test_a_type_that_cannot_be_unpacked_is_named_with_its_tensor(tmp_path):
    path = write(tmp_path / "model.gguf", PLAIN, weights(PLAIN), "llama", kind=TYPES.I8)
    message = refusal(path, tmp_path)
    assert "has type I8, which the gguf package cannot unpack; take the model's F16 or Q8_0 file" in message


def test_without_the_package_the_message_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "model.gguf", PLAIN, weights(PLAIN), "llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install megatron-jq[hf]" in refusal(path, tmp_path)


def test_other_commands_say_that_the_file_is_converted_first(tmp_path):
    path = write(tmp_path / "model.gguf", PLAIN, weights(PLAIN), "llama")
    for source in (path, tmp_path):
        with pytest.raises(UserError, match="convert hf-to-megatron --hf .* --save FOLDER; then give --load FOLDER"):
            first_settings(None, source)
        with pytest.raises(UserError, match="--model .*: GGUF files are converted first"):
            load_architecture(str(source))
