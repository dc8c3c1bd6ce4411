"""The table between Hugging Face's and Megatron-core's tensors: complete, without overlap, and in the right order."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_jq.architecture import PRESETS, Architecture, RopeScaling
from megatron_jq.architecture_files import read_hugging_face_config
from megatron_jq.errors import UserError
from megatron_jq.model.hf import hugging_face_tensors, megatron_tensors, rows_of_slabs
from megatron_jq.model.hf_config import family, hugging_face_config

SMALL = Architecture(
    num_layers=2, hidden_size=6, ffn_hidden_size=5, num_attention_heads=6, num_query_groups=2, kv_channels=4,
    max_position_embeddings=64, tie_embeddings=False, vocab_size=11,
)  # fmt: skip


@st.composite
def architectures(draw):
    groups, experts = draw(st.integers(1, 3)), draw(st.sampled_from([None, 2, 5]))
    return Architecture(
        num_layers=draw(st.integers(1, 3)),
        hidden_size=draw(st.integers(1, 7)),
        ffn_hidden_size=draw(st.integers(1, 7)),
        num_attention_heads=groups * draw(st.integers(1, 3)),
        num_query_groups=groups,
        kv_channels=2 * draw(st.integers(1, 3)),
        max_position_embeddings=16,
        qk_layernorm=draw(st.booleans()),
        add_qkv_bias=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        vocab_size=draw(st.integers(1, 9)),
        num_experts=experts,
        moe_ffn_hidden_size=None if experts is None else draw(st.integers(1, 5)),
    )


@given(architectures(), st.integers(0, 3))
def test_spans_fill_every_tensor_and_every_slab_exactly_once(architecture, padding):
    tensors = hugging_face_tensors(architecture)
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    for tensor in tensors:
        rows = [row for span in tensor.spans for row in range(span.start, span.start + span.count)]
        assert rows == list(range(tensor.shape[0])), tensor.name
    shapes, slabs = megatron_tensors(architecture, architecture.vocab_size + padding), rows_of_slabs(tensors)
    for slab, parts in slabs.items():
        lead = len(slab.index)
        rows = [row for _, span in parts for row in range(span.at, span.at + span.count)]
        padded = padding if slab.key.endswith(("word_embeddings.weight", "output_layer.weight")) else 0
        assert rows == list(range(shapes[slab.key][lead] - padded)), slab
        assert {tensor.shape[1:] for tensor, _ in parts} == {shapes[slab.key][lead + 1 :]}
    for key, shape in shapes.items():
        indices = {slab.index for slab in slabs if slab.key == key}
        lead = len(next(iter(indices)))
        assert indices == set(itertools.product(*map(range, shape[:lead]))), key


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_query_key_and_value_rows_lie_group_by_group(kind):
    """Against the usual formula over views: [groups, heads a group + 2, channels]."""
    a = replace(SMALL, add_qkv_bias=True)
    table = {tensor.name: tensor for tensor in hugging_face_tensors(a)}
    generator = torch.Generator().manual_seed(0)
    parts = {letter: table[f"model.layers.1.self_attn.{letter}_proj.{kind}"] for letter in "qkv"}
    values = {letter: torch.randn(tensor.shape, generator=generator) for letter, tensor in parts.items()}
    grouped = [values[letter].unflatten(0, (2, -1, 4)) for letter in "qkv"]
    expected = torch.cat(grouped, dim=1).flatten(0, 2)
    actual = torch.full_like(expected, torch.nan)
    for letter, tensor in parts.items():
        for span in tensor.spans:
            assert span.slab.key == f"decoder.layers.self_attention.linear_qkv.{kind}" and span.slab.index == (1,)
            actual[span.at : span.at + span.count] = values[letter][span.start : span.start + span.count]
    assert torch.equal(actual, expected)


CONFIGS = {
    "llama": replace(SMALL, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32), norm_epsilon=1e-5, rotary_base=5e5),
    "qwen2": replace(SMALL, add_qkv_bias=True, tie_embeddings=True),
    "qwen3": replace(SMALL, qk_layernorm=True),
    "qwen3_moe": replace(
        SMALL, qk_layernorm=True, num_experts=4, moe_ffn_hidden_size=3, moe_router_topk=3, moe_norm_topk_prob=False,
        moe_aux_loss_coeff=0.25,
    ),
    **{name: PRESETS[name] for name in ("qwen3-0.6b", "llama-3.2-1b", "qwen3-30b-a3b")},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_an_architecture_survives_its_config_json(name, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(hugging_face_config(CONFIGS[name], "bfloat16")))
    assert read_hugging_face_config(path) == CONFIGS[name]
    assert json.loads(path.read_text())["model_type"] == name or name in PRESETS


def test_an_original_config_keeps_its_family_and_what_an_architecture_does_not_say():
    original = {"model_type": "mistral", "bos_token_id": 1, "rope_parameters": {"rope_theta": 7.0}, "dtype": "float32"}
    config = hugging_face_config(SMALL, "bfloat16", original)
    assert config["model_type"] == "mistral" and config["architectures"] == ["MistralForCausalLM"]
    assert config["bos_token_id"] == 1 and config["rope_theta"] == SMALL.rotary_base
    assert "rope_parameters" not in config and "dtype" not in config
    assert hugging_face_config(replace(SMALL, qk_layernorm=True), "bfloat16", original)["model_type"] == "qwen3"


@pytest.mark.parametrize(
    "changes",
    [{"qk_layernorm": True, "add_qkv_bias": True}, {"num_experts": 4, "moe_ffn_hidden_size": 3}],
)
def test_an_architecture_of_no_family_is_refused(changes):
    with pytest.raises(UserError, match="no Hugging Face family"):
        family(replace(SMALL, **changes))
