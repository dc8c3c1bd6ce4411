"""Tiny Hugging Face folders, written by the safetensors package."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_jq.architecture import Architecture
from megatron_jq.checkpoint.convert import megatron_to_hf
from megatron_jq.checkpoint.slabs import ShardLayout
from megatron_jq.model.hf import hugging_face_tensors
from megatron_jq.model.hf_config import hugging_face_config

NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
TINY = Architecture(
    num_layers=2, hidden_size=8, ffn_hidden_size=12, num_attention_heads=4, num_query_groups=2, kv_channels=4,
    max_position_embeddings=64, qk_layernorm=True, tie_embeddings=False, vocab_size=11,
)  # fmt: skip
CUT = ShardLayout(1, 4)
SMALL_FILES = {
    "tokenizer.json": '{"a": 1}',
    "tokenizer_config.json": "{}",
    "generation_config.json": '{"top_p": 0.9}',
    "chat_template.jinja": "{{ messages }}",
}


def weights(architecture=TINY, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {t.name: torch.randn(t.shape, generator=generator).to(dtype) for t in hugging_face_tensors(architecture)}


def make(path: Path, tensors=None, architecture=TINY, **config) -> Path:
    """A whole folder: weights, config.json, tokenizer."""
    path.mkdir()
    tensors = weights(architecture) if tensors is None else tensors
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    dtype = str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    (path / "config.json").write_text(json.dumps({**hugging_face_config(architecture, dtype), **config}))
    for name, text in SMALL_FILES.items():
        (path / name).write_text(text)
    return path


def export(load: Path, target: Path, dtype=None, max_shard_bytes=10**9, with_tokenizer=True) -> dict[str, torch.Tensor]:
    megatron_to_hf(load, target, dtype=dtype, max_shard_bytes=max_shard_bytes, with_tokenizer=with_tokenizer)
    return {name: t for path in sorted(target.glob("*.safetensors")) for name, t in load_file(path).items()}


def assert_same(found: dict, expected: dict):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
