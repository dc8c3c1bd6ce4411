"""F3: Architecture → Hugging Face config.json; architecture.py reads the other way."""

from typing import Any

from megatron_jq.architecture import Architecture
from megatron_jq.errors import UserError

#: model_type → the class that `architectures` names.
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}

#: Keys of which a config.json has one or the other by the age of transformers: all go before ours are set.
_SPELLINGS = ("rope_parameters", "rope_scaling", "rope_theta", "num_local_experts", "dtype", "torch_dtype")


def family(architecture: Architecture, preferred: str | None = None) -> str:
    """Return the model_type that computes this architecture's function: `preferred` where it does, or UserError."""
    a = architecture
    if a.num_experts is not None:
        fitting = ("qwen3_moe",) if a.qk_layernorm and not a.add_qkv_bias else ()
    elif a.qk_layernorm:
        fitting = () if a.add_qkv_bias else ("qwen3",)
    else:
        fitting = ("qwen2",) if a.add_qkv_bias else ("llama", "mistral")
    if not fitting:
        raise UserError(
            "no Hugging Face family has this architecture: "
            f"qk_layernorm {a.qk_layernorm}, add_qkv_bias {a.add_qkv_bias}, num_experts {a.num_experts}"
        )
    return preferred if preferred is not None and preferred in fitting else fitting[0]


def hugging_face_config(
    architecture: Architecture, dtype: str, original: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return config.json of a checkpoint whose tensors have torch's `dtype`; architecture.vocab_size must be set.

    original: the config.json that the policy once came with; it keeps what an Architecture does not say (token ids).
    """
    a, original = architecture, dict(original or {})
    kind = family(a, original.get("model_type"))
    for key in _SPELLINGS:
        original.pop(key, None)
    config = {
        **original,
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.ffn_hidden_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_query_groups,
        "head_dim": a.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": a.max_position_embeddings,
        "initializer_range": a.init_method_std,
        "rms_norm_eps": a.norm_epsilon,
        "tie_word_embeddings": a.tie_embeddings,
        # The spelling of transformers 4; version 5 reads it too.
        "rope_theta": a.rotary_base,
        "rope_scaling": _rope_scaling(a),
        "torch_dtype": dtype,
    }
    if kind in ("llama", "qwen3", "qwen3_moe"):
        config["attention_bias"] = False
    if kind == "mistral":
        config["sliding_window"] = None
    if kind.startswith("qwen"):
        config["use_sliding_window"] = False
        if len(config.get("layer_types", ())) != a.num_layers:
            config.pop("layer_types", None)
    return {**config, **(_experts(a) if a.num_experts is not None else {})}


def with_token_ids(config: dict[str, Any], ids: dict[str, int | None], vocab_size: int) -> dict[str, Any]:
    """Return a config.json or generation_config.json with the ids that a run trained with.

    ids: of eos_token_id, bos_token_id and pad_token_id; None where the tokenizer has none. The end of text comes first,
    before what else ended a text for the model. The other two fill gaps, which the family's defaults would fill.
    """
    eos, before = ids["eos_token_id"], config.get("eos_token_id")
    others = [token for token in (before if isinstance(before, list) else [before]) if token not in (None, eos)]
    others = [token for token in others if token < vocab_size]
    result = {**config, "eos_token_id": [eos, *others] if others else eos}
    if isinstance(before, list) and before == [eos]:
        result["eos_token_id"] = before
    for name in ("bos_token_id", "pad_token_id"):
        previous = config.get(name)
        if previous is None or previous >= vocab_size:
            result[name] = ids[name]
    return result


def _rope_scaling(a: Architecture) -> dict[str, Any] | None:
    if a.rope_scaling is None:
        return None
    s = a.rope_scaling
    return {
        "rope_type": "llama3",
        "factor": s.factor,
        "low_freq_factor": s.low_freq_factor,
        "high_freq_factor": s.high_freq_factor,
        "original_max_position_embeddings": s.original_max_position_embeddings,
    }


def _experts(a: Architecture) -> dict[str, Any]:
    return {
        "num_experts": a.num_experts,
        "moe_intermediate_size": a.moe_ffn_hidden_size,
        "num_experts_per_tok": a.moe_router_topk,
        "norm_topk_prob": a.moe_norm_topk_prob,
        "router_aux_loss_coef": a.moe_aux_loss_coeff,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
