"""F3: Megatron's split of a row over context-parallel ranks: 2·n equal chunks, rank r takes chunks r and 2n-1-r.

So every rank has early and late tokens, and causal attention costs them alike.
"""

from dataclasses import replace

import torch

from megatron_jq.model.rows import ScoreHead


def zigzag_positions(length: int, rank: int, size: int) -> torch.Tensor:
    """Return the places of the row that context-parallel rank `rank` of `size` holds, in its order, [length / size]."""
    assert length % (2 * size) == 0, "rows are padded to a multiple of twice the context-parallel size"
    chunks = torch.arange(length).chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def head_of_rank(head: ScoreHead, length: int, rank: int, size: int) -> ScoreHead:
    """Return the head rows whose hidden state lies on this context-parallel rank, at their places in its share."""
    position_L = zigzag_positions(length, rank, size).to(head.position_N.device)
    place_T = torch.full((length,), -1, dtype=torch.long, device=position_L.device)
    place_T[position_L] = torch.arange(len(position_L), device=position_L.device)
    local_N = place_T[head.position_N] >= 0

    def local(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[local_N]

    return replace(
        head,
        position_N=place_T[head.position_N[local_N]],
        target_N=head.target_N[local_N],
        cell_N=head.cell_N[local_N],
        inverse_temperature_N=local(head.inverse_temperature_N),
        top_p_N=local(head.top_p_N),
        coefficient_N=local(head.coefficient_N),
        rule=None if head.rule is None else head.rule.part(local_N),
    )
