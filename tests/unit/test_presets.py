"""Architectures: the published numbers, the two file formats, and what they refuse."""

import dataclasses
import json

import pytest

from megatron_jq.architecture import PRESETS, Architecture, RopeScaling, architecture_problems, padded_vocab_size
from megatron_jq.architecture_files import architecture_to_toml, load_architecture, read_architecture_toml
from megatron_jq.errors import UserError

# config.json as published with Qwen/Qwen3-0.6B
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
    "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16,
    "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
# … and with meta-llama/Llama-3.2-1B
LLAMA_32_1B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "head_dim": 64,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip

# … and with Qwen/Qwen3-30B-A3B
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
    "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
    "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


@pytest.fixture
def read_config(tmp_path):
    """A function that writes a config.json and reads it back as an Architecture, as --model does."""

    def read(source: dict) -> Architecture:
        (tmp_path / "config.json").write_text(json.dumps(source))
        return load_architecture(str(tmp_path / "config.json"))

    return read


def parameters(a: Architecture, vocab_size: int) -> int:
    """Counted from the shapes, as published model sizes are."""
    attention = a.hidden_size * a.kv_channels * (2 * a.num_attention_heads + 2 * a.num_query_groups)
    norms = 2 * a.hidden_size + (2 * a.kv_channels if a.qk_layernorm else 0)
    bias = a.kv_channels * (a.num_attention_heads + 2 * a.num_query_groups) if a.add_qkv_bias else 0
    block = 3 * a.hidden_size * a.ffn_hidden_size
    if a.num_experts is not None:
        block = a.num_experts * (3 * a.hidden_size * a.moe_ffn_hidden_size + a.hidden_size)  # the router's rows too
    layer = attention + norms + bias + block
    return a.num_layers * layer + a.hidden_size + (1 if a.tie_embeddings else 2) * vocab_size * a.hidden_size


@pytest.mark.parametrize(
    ("name", "source"),
    [("qwen3-0.6b", QWEN3_06B), ("llama-3.2-1b", LLAMA_32_1B), ("qwen3-30b-a3b", QWEN3_30B_A3B)],
)
def test_presets_equal_the_published_config(name, source, read_config):
    assert read_config(source) == PRESETS[name]


def test_parameter_counts_equal_the_published_ones():
    assert parameters(PRESETS["qwen3-0.6b"], 151936) == 596_049_920
    assert parameters(PRESETS["llama-3.2-1b"], 128256) == 1_235_814_400
    assert parameters(PRESETS["qwen3-30b-a3b"], 151936) == 30_532_122_624
    assert parameters(PRESETS["small"], 1024) == pytest.approx(19.4e6, rel=0.01)


def test_presets_are_sound():
    assert {name: architecture_problems(a) for name, a in PRESETS.items()} == {name: [] for name in PRESETS}


@pytest.mark.parametrize("name", list(PRESETS))
def test_toml_round_trip(name, tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(architecture_to_toml(PRESETS[name]))
    assert read_architecture_toml(path) == PRESETS[name]


def test_toml_derives_groups_and_channels(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(
        "num-layers = 3\nhidden_size = 96\nffn_hidden_size = 256\nnum_attention_heads = 6\n"
        "max_position_embeddings = 128\nrotary_base = 5000\n"
    )
    assert load_architecture(str(path)) == Architecture(3, 96, 256, 6, 6, 16, 128, rotary_base=5000.0)


GOOD_TOML = "num_layers = 2\nhidden_size = 64\nffn_hidden_size = 64\nnum_attention_heads = 4\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD_TOML, "missing max_position_embeddings"),
        (GOOD_TOML + "max_positions_embeddings = 4", "did you mean max_position_embeddings?"),
        (GOOD_TOML + "max_position_embeddings = 4.5", "max_position_embeddings = 4.5 must be of type int"),
        (GOOD_TOML + "max_position_embeddings = true", "must be of type int"),
        (GOOD_TOML + "max_position_embeddings = 4\nnum_query_groups = 3", "must be a multiple of num_query_groups (3)"),
        (GOOD_TOML + "max_position_embeddings = 0", "max_position_embeddings must be at least 1"),
        (GOOD_TOML + "max_position_embeddings = 4\nnorm_epsilon = 0", "norm_epsilon must be above 0"),
        (GOOD_TOML + "max_position_embeddings = 4\n[rope_scaling]\nfactr = 8.0", "did you mean factor?"),
        (GOOD_TOML + "max_position_embeddings = 4\n[rope_scaling]\nlow_freq_factor = 1.0", "missing factor"),
    ],
)
def test_bad_toml_names_the_file_the_key_and_the_fix(tmp_path, text, message):
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        read_architecture_toml(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_qwen2_has_biases_and_no_qk_norm_and_its_inactive_window_is_ignored(read_config):
    source = {k: v for k, v in QWEN3_06B.items() if k not in ("head_dim", "attention_bias")}
    source |= {"model_type": "qwen2", "sliding_window": 4096, "tie_word_embeddings": False}
    read = read_config(source)
    assert (read.add_qkv_bias, read.qk_layernorm, read.tie_embeddings) == (True, False, False)
    assert (read.kv_channels, read.max_position_embeddings) == (64, 40960)


def test_mistral_context_ends_at_its_window(read_config):
    source = {k: v for k, v in LLAMA_32_1B.items() if k != "rope_scaling"} | {"model_type": "mistral"}
    assert read_config(source | {"sliding_window": 4096}).max_position_embeddings == 4096
    assert read_config(source | {"sliding_window": None}).max_position_embeddings == 131072


def test_old_llama_without_groups_and_head_dim(read_config):
    source = {k: v for k, v in LLAMA_32_1B.items() if k not in ("num_key_value_heads", "head_dim", "rope_scaling")}
    read = read_config(source)
    assert (read.num_query_groups, read.kv_channels, read.rope_scaling) == (32, 64, None)


def test_transformers_5_keeps_rope_in_one_table(read_config):
    source = {k: v for k, v in LLAMA_32_1B.items() if k not in ("rope_scaling", "rope_theta")}
    source["rope_parameters"] = LLAMA_32_1B["rope_scaling"] | {"rope_theta": 500000.0}
    assert read_config(source) == PRESETS["llama-3.2-1b"]
    source["rope_parameters"] = {"rope_type": "default", "rope_theta": 2e4}
    assert read_config(source) == dataclasses.replace(PRESETS["llama-3.2-1b"], rope_scaling=None, rotary_base=2e4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gpt2"},
            "model_type 'gpt2' is not supported; these are: llama, mistral, qwen2, qwen3, qwen3_moe",
        ),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "rope type 'llama3' lacks low_freq_factor"),
        ({"hidden_size": "1024"}, "hidden_size must be an integer, not '1024'"),
        ({"head_dim": None}, "head_dim must be an integer, not None"),
    ],
)
def test_what_a_policy_cannot_express_is_refused(change, message, read_config):
    with pytest.raises(UserError) as raised:
        read_config(QWEN3_06B | change)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_sparse_step": 2}, "dense layers between those with experts are not supported"),
        ({"mlp_only_layers": [0]}, "dense layers between those with experts are not supported"),
        ({"num_experts": None}, "num_experts must be an integer, not None"),
        ({"num_experts_per_tok": 129}, "moe_router_topk must lie between 1 and num_experts (128): 129"),
        ({"num_experts_per_tok": 1}, "moe_router_topk 1 needs moe_norm_topk_prob false"),
        ({"num_experts": 1, "num_experts_per_tok": 1}, "num_experts must be at least 2, not 1"),
        ({"moe_intermediate_size": 0}, "num_experts needs moe_ffn_hidden_size of at least 1, not 0"),
        ({"router_aux_loss_coef": -1.0}, "moe_aux_loss_coeff must be at least 0 and finite, not -1.0"),
    ],
)
def test_experts_that_a_policy_cannot_have_are_refused(change, message, read_config):
    with pytest.raises(UserError) as raised:
        read_config(QWEN3_30B_A3B | change)
    assert message in str(raised.value)


def test_published_defaults_of_experts(read_config):
    left_out = ("norm_topk_prob", "router_aux_loss_coef", "mlp_only_layers", "decoder_sparse_step")
    read = read_config({k: v for k, v in QWEN3_30B_A3B.items() if k not in left_out})
    assert (read.moe_norm_topk_prob, read.moe_aux_loss_coeff, read.moe_router_topk) == (False, 0.001, 8)


def test_a_folder_stands_for_its_config_json(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_06B))
    assert load_architecture(str(tmp_path)) == PRESETS["qwen3-0.6b"]


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_a_broken_config_json_is_a_user_error(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"config\.json"):
        load_architecture(str(tmp_path))


def test_unknown_presets_get_the_nearest_name():
    with pytest.raises(UserError, match=r"no such preset .* did you mean qwen3-0.6b\?"):
        load_architecture("qwen3-0.6")


def test_vocabulary_is_padded_as_megatron_pads_it():
    assert padded_vocab_size(1000, 128, 1) == 1024
    assert padded_vocab_size(1024, 128, 1) == 1024
    assert padded_vocab_size(1025, 128, 2) == 1280
    assert padded_vocab_size(151936, 128, 8) == 152576


def test_llama_3_scaling_has_the_published_corners():
    assert PRESETS["llama-3.2-1b"].rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
