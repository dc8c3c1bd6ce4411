"""Put whole weights onto a layout and whole gradients together again, by slicing rules written out for the tests."""

import re

import torch

from megatron_jq.model.policy import Policy
from megatron_jq.parallel.runtime import Runtime

SPLIT_ROWS = ("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_qkv.bias")
SPLIT_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


def whole_name(policy: Policy, runtime: Runtime, name: str) -> str:
    """The name in the unsharded model: layers of earlier stages and experts of earlier ranks come first, tied matrices
    have one name.
    """
    if name == "output_layer.weight" and policy.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    ep = runtime.groups.collection.ep
    if "local_experts" in name:
        here = policy.config.num_moe_experts // ep.size()
        name = re.sub(r"experts\.(\d+)", lambda match: f"experts.{ep.rank() * here + int(match[1])}", name)
    layers = policy.decoder.layers
    return re.sub(r"layers\.(\d+)", lambda match: f"layers.{layers[int(match[1])].layer_number - 1}", name)


def shard(whole: torch.Tensor, name: str, rank: int, size: int, rows: int | None = None) -> torch.Tensor:
    """Rank's part of size parts. rows: vocabulary rows this rank must hold; what is missing is padding."""
    if rows is not None:
        filler = torch.full((rows * size - len(whole), whole.shape[1]), 1e3)  # padding must not matter: make it loud
        whole = torch.cat([whole, filler])
    if name.endswith("linear_fc1.weight"):
        half = len(whole) // 2
        part = half // size
        gate, up = whole[rank * part : (rank + 1) * part], whole[half + rank * part : half + (rank + 1) * part]
        return torch.cat([gate, up])
    if name.endswith(SPLIT_ROWS):
        part = len(whole) // size
        return whole[rank * part : (rank + 1) * part]
    if name.endswith(SPLIT_COLUMNS):
        part = whole.shape[1] // size
        return whole[:, rank * part : (rank + 1) * part]
    return whole


@torch.no_grad()
def load_whole(policy: Policy, runtime: Runtime, weights: dict[str, torch.Tensor]) -> None:
    """Overwrite every parameter of this rank. Vocabulary padding gets a large value: it must not be seen."""
    for name, parameter in policy.named_parameters():
        name = whole_name(policy, runtime, name)
        group = runtime.groups.collection.expt_tp if "local_experts" in name else runtime.groups.tp
        rank, size = group.rank(), group.size()
        vocabulary = name.endswith(("word_embeddings.weight", "output_layer.weight"))
        part = shard(weights[name], name, rank, size, len(parameter) if vocabulary else None)
        assert part.shape == parameter.shape, f"{name}: {tuple(part.shape)} for {tuple(parameter.shape)}"
        parameter.copy_(part)


def named_tensors(policy: Policy, runtime: Runtime, of) -> tuple[tuple[int, int, int], dict[str, torch.Tensor]]:
    """((tp, pp, dp) rank, {whole name: of(parameter)}): what `join` puts together."""
    groups = runtime.groups
    place = (groups.tp.rank(), groups.pp.rank(), groups.dp.rank())
    local = {name: of(parameter).detach().clone() for name, parameter in policy.named_parameters()}
    return place, {whole_name(policy, runtime, name): tensor for name, tensor in local.items()}


def join(parts: list[tuple[tuple[int, int, int], dict]], vocab_size: int, *, padding: float | None):
    """{whole name: tensor} from all ranks' named_tensors.

    Asserts what a layout promises: replicas agree bit for bit, so do tensor-parallel ranks on what is not split and the
    two pipeline stages on tied weights, and vocabulary padding holds `padding` throughout (None: whatever it may).
    """
    by_name: dict[str, dict[tuple[int, int, int], torch.Tensor]] = {}
    for place, tensors in parts:
        for name, tensor in tensors.items():
            by_name.setdefault(name, {})[place] = tensor
    whole = {}
    for name, placed in by_name.items():
        by_tp: dict[int, torch.Tensor] = {}
        for (tp, pp, dp), tensor in sorted(placed.items()):
            assert torch.equal(by_tp.setdefault(tp, tensor), tensor), f"{name} differs at pp {pp}, dp {dp}"
        whole[name] = _concatenate(name, [by_tp[tp] for tp in sorted(by_tp)])
        if name.endswith(("word_embeddings.weight", "output_layer.weight")):
            untouched = padding is None or (whole[name][vocab_size:] == padding).all()
            assert untouched, f"{name}: vocabulary padding was touched"
            whole[name] = whole[name][:vocab_size]
    return whole


def _concatenate(name: str, shards: list[torch.Tensor]) -> torch.Tensor:
    if name.endswith("linear_fc1.weight"):
        halves = [part.chunk(2) for part in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    if name.endswith(SPLIT_ROWS):
        return torch.cat(shards)
    if name.endswith(SPLIT_COLUMNS):
        return torch.cat(shards, dim=1)
    for part in shards[1:]:
        assert torch.equal(part, shards[0]), f"{name} is not split, yet tensor-parallel ranks differ"
    return shards[0]
