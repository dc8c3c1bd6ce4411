"""F3: the spec of a layer: Megatron-core's, with our core attention, router and (for local layers) norm."""

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_jq.model.attention import PlannedAttention
from megatron_jq.model.moe import SequenceBalancedRouter
from megatron_jq.model.norm import LocalRMSNorm
from megatron_jq.parallel.megatron import versions


def layer_spec(config: TransformerConfig, transformer_engine: bool) -> tuple[ModuleSpec, type]:
    """Return the spec of every layer and the class of the norm that follows the last one."""
    experts = dict(num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm)  # noqa: C408
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        spec: ModuleSpec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm, **experts)
        norm = TENorm
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm", **experts)
        norm = LocalRMSNorm
        spec.submodules.input_layernorm = norm
        spec.submodules.pre_mlp_layernorm = norm
        if config.qk_layernorm:
            spec.submodules.self_attention.submodules.q_layernorm = norm
            spec.submodules.self_attention.submodules.k_layernorm = norm
    spec.submodules.self_attention.submodules.core_attention = PlannedAttention
    if config.num_moe_experts is not None:
        # In checkpoints norms have their names in Transformer Engine's layers; before experts this one has its own.
        spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
        spec.submodules.mlp = versions.set_router(spec.submodules.mlp, SequenceBalancedRouter)
    return spec, norm
