"""An engine that draws elsewhere with the weights that it is sent: the unsharded reference, on one rank."""

import torch
from torch import Tensor

from megatron_jq.architecture import Architecture
from megatron_jq.config_validate import resolve_architecture
from megatron_jq.records import Rollout
from megatron_jq.rollout.engine import Capabilities, EngineSetup, NamedWeights, RolloutRequest, SamplingOptions
from megatron_jq.rollout.engines import EngineRow
from tests.distributed import generation
from tests.distributed.reference import Weights

ELSEWHERE = EngineRow(
    name="elsewhere",
    description="the reference, fed by update_weights alone",
    build="tests.distributed.elsewhere:Elsewhere",
    capabilities=Capabilities(
        draws=True, scores_gold=True, samples_answers=True, gives_log_prob=True, shares_weights=False, every_rank=False
    ),
)


class Elsewhere:
    """The rationales of the in-process engine, drawn without it. An architecture of the Qwen3 family, tied."""

    def __init__(self, setup: EngineSetup):
        assert setup.runtime.groups.tp.rank() == setup.runtime.groups.pp.rank() == 0, "built on one rank alone"
        self.version: int | None = None
        self.architecture = resolve_architecture(setup.config)
        self.weights: Weights = {}

    def update_weights(self, version: int, named_weights: NamedWeights) -> None:
        self.weights = megatron_layout(dict(named_weights()), self.architecture)
        self.version = version

    def generate(self, requests: list[RolloutRequest], options: SamplingOptions) -> list[Rollout]:
        return generation.generate(self.weights, self.architecture, requests, options)

    def close(self) -> None:
        self.weights = {}


def megatron_layout(tensors: dict[str, Tensor], a: Architecture) -> Weights:
    """Hugging Face's tensors of Qwen3, tied, as the reference has them."""
    weights = {
        "embedding.word_embeddings.weight": tensors["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": tensors["model.norm.weight"],
    }
    for layer in range(a.num_layers):
        hf = {name.removeprefix(f"model.layers.{layer}."): x for name, x in tensors.items() if f".{layer}." in name}
        q, k, v = (hf[f"self_attn.{x}_proj.weight"].unflatten(0, (a.num_query_groups, -1)) for x in "qkv")
        block = {
            "input_layernorm.weight": hf["input_layernorm.weight"],
            "self_attention.linear_qkv.weight": torch.cat([q, k, v], dim=1).flatten(0, 1),
            "self_attention.linear_proj.weight": hf["self_attn.o_proj.weight"],
            "self_attention.q_layernorm.weight": hf["self_attn.q_norm.weight"],
            "self_attention.k_layernorm.weight": hf["self_attn.k_norm.weight"],
            "pre_mlp_layernorm.weight": hf["post_attention_layernorm.weight"],
            "mlp.linear_fc1.weight": torch.cat([hf["mlp.gate_proj.weight"], hf["mlp.up_proj.weight"]]),
            "mlp.linear_fc2.weight": hf["mlp.down_proj.weight"],
        }
        weights |= {f"decoder.layers.{layer}.{name}": tensor for name, tensor in block.items()}
    return weights
