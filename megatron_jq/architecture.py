"""F1: the shape of a policy and its presets. Plain numbers, no torch. architecture_files.py reads it from files.

What every policy here shares is not a field: decoder-only, RMSNorm before each block, SwiGLU, rotary positions over the
whole head, no biases but the optional one on query, key and value. Either every layer's SwiGLU block is dense, or every
layer has `num_experts` of them and a softmax router that picks `moe_router_topk` for a token.
"""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of low rotary frequencies; `factor` 1 would be no scaling."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class Architecture:
    """Everything that decides a policy's parameter shapes and its function, but the tokenizer's vocabulary."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int  # key/value heads
    kv_channels: int  # channels per head
    max_position_embeddings: int
    rotary_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-6
    qk_layernorm: bool = False
    add_qkv_bias: bool = False
    tie_embeddings: bool = True
    init_method_std: float = 0.02
    vocab_size: int | None = None  # None: the tokenizer's
    num_experts: int | None = None  # experts per layer; None: one dense block
    moe_ffn_hidden_size: int | None = None  # width of one expert's SwiGLU block; None without experts
    moe_router_topk: int = 2  # experts that a token visits
    moe_norm_topk_prob: bool = True  # their probabilities are scaled to sum to 1
    moe_aux_loss_coeff: float = 0.001  # of the load-balancing loss (docs/loss-scaling.md)


PRESETS = {
    "tiny": Architecture(
        num_layers=2, hidden_size=64, ffn_hidden_size=192, num_attention_heads=4, num_query_groups=2, kv_channels=16,
        max_position_embeddings=512, qk_layernorm=True,
    ),
    "small": Architecture(  # 19.4 million parameters with a vocabulary of 1024
        num_layers=6, hidden_size=512, ffn_hidden_size=1536, num_attention_heads=8, num_query_groups=4, kv_channels=64,
        max_position_embeddings=2048, qk_layernorm=True,
    ),
    "qwen3-0.6b": Architecture(
        num_layers=28, hidden_size=1024, ffn_hidden_size=3072, num_attention_heads=16, num_query_groups=8,
        kv_channels=128, max_position_embeddings=40_960, rotary_base=1e6, qk_layernorm=True, vocab_size=151_936,
    ),
    "llama-3.2-1b": Architecture(
        num_layers=16, hidden_size=2048, ffn_hidden_size=8192, num_attention_heads=32, num_query_groups=8,
        kv_channels=64, max_position_embeddings=131_072, rotary_base=5e5, rope_scaling=RopeScaling(factor=32.0),
        norm_epsilon=1e-5, vocab_size=128_256,
    ),
    "tiny-moe": Architecture(
        num_layers=2, hidden_size=64, ffn_hidden_size=192, num_attention_heads=4, num_query_groups=2, kv_channels=16,
        max_position_embeddings=512, qk_layernorm=True, num_experts=4, moe_ffn_hidden_size=96, moe_router_topk=2,
    ),
    "qwen3-30b-a3b": Architecture(
        num_layers=48, hidden_size=2048, ffn_hidden_size=6144, num_attention_heads=32, num_query_groups=4,
        kv_channels=128, max_position_embeddings=40_960, rotary_base=1e6, qk_layernorm=True, tie_embeddings=False,
        vocab_size=151_936, num_experts=128, moe_ffn_hidden_size=768, moe_router_topk=8,
    ),
}  # fmt: skip


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_model_parallel_size: int) -> int:
    """Return the embedding's rows: the next multiple of divisible_by x TP, as Megatron pads, for equal shards."""
    multiple = divisible_by * tensor_model_parallel_size
    return math.ceil(vocab_size / multiple) * multiple


def architecture_problems(architecture: Architecture) -> list[str]:
    """List what is wrong with the numbers by themselves, whatever the layout."""
    a, problems = architecture, []
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    for name in (*sizes, "max_position_embeddings"):
        if getattr(a, name) < 1:
            problems.append(f"{name} must be at least 1, not {getattr(a, name)}")
    if a.num_query_groups >= 1 and a.num_attention_heads % a.num_query_groups:
        problems.append(
            f"num_attention_heads ({a.num_attention_heads}) must be a multiple of num_query_groups "
            f"({a.num_query_groups})"
        )
    if a.kv_channels % 2:
        problems.append(f"kv_channels ({a.kv_channels}) must be even: rotary positions turn pairs of channels")
    for name in ("rotary_base", "norm_epsilon", "init_method_std"):
        if not (math.isfinite(getattr(a, name)) and getattr(a, name) > 0):
            problems.append(f"{name} must be above 0 and finite, not {getattr(a, name)}")
    if a.vocab_size is not None and a.vocab_size < 1:
        problems.append(f"vocab_size must be at least 1, not {a.vocab_size}")
    return problems + _expert_problems(a)


def _expert_problems(a: Architecture) -> list[str]:
    if a.num_experts is None:
        if a.moe_ffn_hidden_size is None:
            return []
        return ["moe_ffn_hidden_size is set, num_experts is not: set both, or neither"]
    problems = []
    if a.num_experts < 2:
        problems.append(f"num_experts must be at least 2, not {a.num_experts}")
    if a.moe_ffn_hidden_size is None or a.moe_ffn_hidden_size < 1:
        problems.append(f"num_experts needs moe_ffn_hidden_size of at least 1, not {a.moe_ffn_hidden_size}")
    if not 1 <= a.moe_router_topk <= a.num_experts:
        problems.append(f"moe_router_topk must lie between 1 and num_experts ({a.num_experts}): {a.moe_router_topk}")
    if a.moe_router_topk == 1 and a.moe_norm_topk_prob:
        problems.append("moe_router_topk 1 needs moe_norm_topk_prob false: a probability scaled to 1 has no gradient")
    if not (math.isfinite(a.moe_aux_loss_coeff) and a.moe_aux_loss_coeff >= 0):
        problems.append(f"moe_aux_loss_coeff must be at least 0 and finite, not {a.moe_aux_loss_coeff}")
    return problems


def with_overrides(architecture: Architecture, **overrides: int | float | bool | None) -> Architecture:
    """Return the same architecture with the overrides that are not None."""
    return replace(architecture, **{name: value for name, value in overrides.items() if value is not None})
