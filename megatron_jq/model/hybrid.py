"""F3: the policy over Megatron-core's HybridModel, which 0.19 names as GPTModel's successor.

HybridModel lists attention and MLP as layers of their own. A layer of the architecture is `*-` in its pattern (`*E`
with experts), layer i the entries 2i and 2i + 1 of `decoder.layers`. Everything else counts layers of the architecture:
settings, the pipeline layout, and names in checkpoints, which do not depend on the class.

Import it after `versions.check_hybrid_model`.
"""

from typing import Any

from megatron.core.dist_checkpointing.gpt_checkpoint_interop import (  # pyright: ignore[reportMissingImports]
    gpt_compatible_layer_maps,
    retarget_sharded_state_dict_to_gpt_checkpoint,
)
from megatron.core.models.hybrid.hybrid_block import (  # pyright: ignore[reportMissingImports]
    HybridStack,
    HybridStackSubmodules,
)
from megatron.core.models.hybrid.hybrid_model import HybridModel  # pyright: ignore[reportMissingImports]
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from megatron_jq.model.policy import Policy


class NormedStack(HybridStack):
    """HybridStack with a final norm of class `norm` under GPTModel's name; HybridStack writes a class in."""

    def __init__(self, *args: Any, norm: type, **options: Any):
        super().__init__(*args, post_layer_norm=False, **options)
        if self.post_process:
            self.final_layernorm = norm(
                config=self.config, hidden_size=self.config.hidden_size, eps=self.config.layernorm_epsilon
            )

    def forward(self, *args: Any, **options: Any) -> Tensor:
        hidden_T1H = super().forward(*args, **options)
        return self.final_layernorm(hidden_T1H) if self.post_process else hidden_T1H


class HybridPolicy(Policy, HybridModel):
    """Megatron-core's HybridModel with the J_Q head. layer: the spec of a whole layer; norm: the final norm's class."""

    MODULES = 2

    def __init__(
        self,
        *,
        config: TransformerConfig,
        layer: ModuleSpec,
        norm: type,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
        **options: Any,
    ):
        super().__init__(
            config=config,
            hybrid_stack_spec=ModuleSpec(
                module=NormedStack, params={"norm": norm}, submodules=_halves(layer, config.num_moe_experts is not None)
            ),
            hybrid_layer_pattern=layer_pattern(config),
            pg_collection=pg_collection,
            vp_stage=vp_stage,
            **options,
        )

    def sharded_state_dict(self, *args: Any, **options: Any) -> dict:
        """Return the weights under GPTModel's names, stacked over layers as GPTModel's are."""
        state = super().sharded_state_dict(*args, **options)
        retarget_sharded_state_dict_to_gpt_checkpoint(state, gpt_compatible_layer_maps(self.hybrid_layer_pattern))
        return state


def layer_pattern(config: TransformerConfig) -> str:
    """Return HybridModel's pattern of all stages, in the order in which a token passes them: `*-*-|*-`."""
    layer = "*-" if config.num_moe_experts is None else "*E"
    ranks, stages = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size or 1
    layout = config.pipeline_model_parallel_layout
    if layout is None:
        return "|".join([layer * (config.num_layers // (ranks * stages))] * (ranks * stages))
    # get_num_layers_to_build would answer for this rank alone.
    counts = [layout.layout[rank][stage].count(LayerType.decoder) for stage in range(stages) for rank in range(ranks)]
    return "|".join(layer * count for count in counts)


def _halves(layer: ModuleSpec, has_experts: bool) -> HybridStackSubmodules:
    """The layer's attention and its MLP, each as a layer that lacks the other."""
    parts = layer.submodules
    attention = TransformerLayerSubmodules(
        input_layernorm=parts.input_layernorm,
        self_attention=parts.self_attention,
        self_attn_bda=parts.self_attn_bda,
        sharded_state_dict_keys_map=parts.sharded_state_dict_keys_map,
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=parts.pre_mlp_layernorm,
        mlp=parts.mlp,
        mlp_bda=parts.mlp_bda,
        sharded_state_dict_keys_map=parts.sharded_state_dict_keys_map,
    )
    mlp_layer = ModuleSpec(module=layer.module, submodules=mlp)
    return HybridStackSubmodules(
        attention_layer=ModuleSpec(module=layer.module, submodules=attention),
        **{"moe_layer" if has_experts else "mlp_layer": mlp_layer},
    )
