"""F3: random initial weights that do not depend on the parallel layout.

Megatron-core draws each shard from its rank's own stream, so TP2 or PP2 start from other weights than one process does.
Here every parameter is drawn in full, from a generator seeded by (seed, global name), and the rank keeps its shard:
runs at two layouts are the same run.
"""

import hashlib
import math
import re

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_jq.architecture import Architecture
from megatron_jq.model.policy import Policy

#: Dimension along which a parameter is split over tensor-parallel ranks; what is not listed is replicated.
PARTITION_DIM = {
    "word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_proj.weight": 1,
    "linear_fc1.weight": 0,
    "linear_fc2.weight": 1,
}


#: What the names of experts' parameters contain.
EXPERTS = ".mlp.experts."


def partition_dim(name: str) -> int | None:
    return next((dim for suffix, dim in PARTITION_DIM.items() if name.endswith(suffix)), None)


def global_name(policy: Policy, name: str) -> str:
    """Return a parameter's name with layer and expert numbers counted over all stages; tied matrices have one name."""
    if name == "output_layer.weight" and policy.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    offset = get_transformer_layer_offset(policy.config, policy.vp_stage, policy.pg_collection.pp.rank())
    name = re.sub(r"(?<=decoder\.layers\.)\d+", lambda match: str(int(match.group()) // policy.MODULES + offset), name)
    if EXPERTS in name:
        ep = policy.pg_collection.ep
        name = expert_name(name, ep.rank() * policy.config.num_moe_experts // ep.size())
    return name


def expert_name(name: str, first: int) -> str:
    """Return the name with the expert's number counted over all ranks; `first` is this rank's first expert.

    Transformer Engine's grouped matrices (experts.linear_fc1.weight3) get the names that single experts have.
    """
    name = re.sub(r"experts\.(linear_fc[12])\.weight(\d+)$", r"experts.local_experts.\2.\1.weight", name)
    return re.sub(r"(?<=local_experts\.)\d+", lambda match: str(int(match.group()) + first), name)


def tensor_parallel_group(policy: Policy, name: str) -> dist.ProcessGroup:
    """Return the ranks that hold the shards of this parameter: experts may be split otherwise than the other layers."""
    return policy.pg_collection.expt_tp if EXPERTS in name else policy.pg_collection.tp


def local_slice(full: torch.Tensor, name: str, rank: int, size: int) -> torch.Tensor:
    """Return this tensor-parallel rank's shard of a full parameter, in Megatron-core's layout.

    linear_fc1 holds gate and up projection one after the other, each split by itself; full: [2·F, H], gate first.
    """
    dim = partition_dim(name)
    if dim is None or size == 1:
        return full
    if name.endswith("linear_fc1.weight"):
        gate, up = full.chunk(2, dim=0)
        return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
    return full.chunk(size, dim=dim)[rank]


def draw_parameter(name: str, shape: tuple[int, ...], architecture: Architecture, seed: int) -> torch.Tensor:
    """Return the full parameter, float32 on CPU: normal(0, std) for matrices (output projections std / sqrt(2·layers)),
    ones for norms, zeros for biases, zeros for vocabulary rows that are padding.
    """
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    std = architecture.init_method_std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2 * architecture.num_layers)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(shape, generator=generator) * std


def mark_partitions(policy: Policy) -> None:
    """Tell Megatron-core's gradient norm which parameters are split, and how (its own initialisation would)."""
    for name, parameter in policy.named_parameters():
        dim = partition_dim(global_name(policy, name))
        if dim is not None:
            parameter.tensor_model_parallel = True
            parameter.partition_dim = dim
            parameter.partition_stride = 2 if "linear_fc1.weight" in name else 1


@torch.no_grad()
def initialise(policy: Policy, architecture: Architecture, seed: int) -> None:
    """Fill this rank's parameters. Vocabulary rows beyond the true vocabulary are zero."""
    for name, parameter in policy.named_parameters():
        group, name = tensor_parallel_group(policy, name), global_name(policy, name)
        rank, size = group.rank(), group.size()
        dim = partition_dim(name)
        shape = list(parameter.shape)
        if dim is not None:
            shape[dim] *= size
        padding = 0
        if name.endswith(("word_embeddings.weight", "output_layer.weight")):
            padding, shape[0] = shape[0] - policy.true_vocab_size, policy.true_vocab_size
        full = draw_parameter(name, tuple(shape), architecture, seed)
        if padding:
            full = torch.cat([full, full.new_zeros(padding, shape[1])])
        parameter.copy_(local_slice(full, name, rank, size))
