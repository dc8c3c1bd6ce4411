"""F3: draw next tokens from vocabulary-parallel logits, reproducibly at any layout.

A token is drawn by inverting the cumulative distribution at one uniform number. Ranks exchange the mass of their shard
and the chosen id, never the vocabulary. The uniforms come from a counter-based generator keyed by (seed, step, prompt,
rationale), so every rank makes the same ones without communication.
"""

import numpy as np
import torch
import torch.distributed as dist

from megatron_jq.parallel.nucleus import nucleus_threshold

#: Rows whose float64 distribution exists at one time, in elements: bounds the workspace at some 0.25 GB.
_WORKSPACE_ELEMENTS = 16_000_000


class UniformStream:
    """Uniforms in [0, 1) of one rationale, by draw number, from Philox keyed by (seed, step, prompt, rationale)."""

    BLOCK = 64

    def __init__(self, seed: int, step: int, prompt_slot: int, rationale_slot: int):
        sequence = np.random.SeedSequence([seed, step, prompt_slot, rationale_slot])
        self._generator = np.random.Generator(np.random.Philox(sequence))
        self._drawn = np.empty(0)

    def at(self, draw: int) -> float:
        while draw >= len(self._drawn):
            self._drawn = np.concatenate([self._drawn, self._generator.random(self.BLOCK)])
        return float(self._drawn[draw])


def sample_tokens(
    logits_NV: torch.Tensor, uniform_N: torch.Tensor, *, temperature: float, top_p: float, group
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [N] int64 and their ln p [N] float64 under the distribution they were drawn from, alike on all ranks.

    logits_NV: this rank's shard, float32, padding already at -inf. uniform_N: float64, alike on all ranks. temperature
    0 takes the largest logit, the lowest id among equals, and gives ln p at temperature 1. Cost: an all-gather of N
    numbers and an all-reduce of 2N; with top-p one all-reduce more for each bit of float32.
    """
    rows = max(1, _WORKSPACE_ELEMENTS // logits_NV.shape[1])
    parts = [
        _sample_rows(logits_NV[i : i + rows], uniform_N[i : i + rows], temperature, top_p, group)
        for i in range(0, len(logits_NV), rows)
    ]
    if not parts:
        return uniform_N.new_empty(0, dtype=torch.long), uniform_N.new_empty(0)
    return torch.cat([ids for ids, _ in parts]), torch.cat([log_prob for _, log_prob in parts])


def _sample_rows(logits_NV, uniform_N, temperature, top_p, group):
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    if temperature > 0:
        if temperature != 1:
            logits_NV = logits_NV * (1.0 / temperature)  # as the head scales them, so that both see one distribution
        if top_p < 1:
            threshold_N = nucleus_threshold(logits_NV, torch.full_like(uniform_N, top_p), group)
            logits_NV = logits_NV.masked_fill(logits_NV < threshold_N[:, None], float("-inf"))
    best_N, column_N = logits_NV.max(dim=-1)
    shift_N = torch.where(best_N == float("-inf"), 0.0, best_N).double()  # a shard may have no mass at all
    cumulative_NV = (logits_NV - shift_N[:, None]).exp_().cumsum_(dim=-1)  # in float64
    sum_N = cumulative_NV[:, -1].contiguous()
    mass_RN = _gather(sum_N.log() + shift_N, group)
    total_N = mass_RN.logsumexp(dim=0)
    shard = logits_NV.shape[1]
    if temperature > 0:
        edge_RN = (mass_RN - total_N).exp().cumsum(dim=0)
        owner_N = (edge_RN <= uniform_N).sum(dim=0).clamp(max=size - 1)
        # Rounding may leave the last edge below the uniform, or the owner without mass: step back to a shard that has
        # some.
        has_mass_RN = mass_RN > float("-inf")
        rank_R1 = torch.arange(size, device=owner_N.device)[:, None]
        owner_N = torch.where(has_mass_RN & (rank_R1 <= owner_N), rank_R1, -1).amax(dim=0)
        before_N = (
            torch.cat([torch.zeros_like(edge_RN[:1]), edge_RN[:-1]]).gather(0, owner_N.clamp(min=0)[None]).squeeze(0)
        )
        wanted_N = (uniform_N - before_N) * (total_N - shift_N).exp()
        # Rounding may also ask for more than the shard has: its last token with mass is where the sum is complete.
        column_N = torch.minimum(_first(cumulative_NV, wanted_N, above=True), _first(cumulative_NV, sum_N))
        column_N = column_N.clamp(max=shard - 1)  # where logits are not numbers; the scores will tell
    else:
        owner_N = _gather(best_N, group).argmax(dim=0)  # argmax takes the lowest rank among equals
    mine_N = owner_N == rank
    id_N = torch.where(mine_N, column_N + rank * shard, 0)
    log_prob_N = torch.where(mine_N, logits_NV.gather(-1, column_N[:, None]).squeeze(-1).double() - total_N, 0.0)
    drawn_2N = _sum(torch.stack([id_N.double(), log_prob_N]), group)  # one message; ids are exact in float64
    return drawn_2N[0].long(), drawn_2N[1]


def _first(cumulative_NV: torch.Tensor, wanted_N: torch.Tensor, *, above: bool = False) -> torch.Tensor:
    """The first column that reaches what is wanted, or lies above it."""
    return torch.searchsorted(cumulative_NV, wanted_N[:, None], right=above).squeeze(-1)


def _gather(tensor_N: torch.Tensor, group) -> torch.Tensor:
    if group is None or group.size() == 1:
        return tensor_N[None]
    gathered = [torch.empty_like(tensor_N) for _ in range(group.size())]
    dist.all_gather(gathered, tensor_N.contiguous(), group=group)
    return torch.stack(gathered)


def _sum(tensor_N: torch.Tensor, group) -> torch.Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor_N, group=group)
    return tensor_N
