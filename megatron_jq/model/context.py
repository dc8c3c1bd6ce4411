"""F3: Megatron's split of a row over context-parallel ranks: 2·n equal chunks, rank r takes chunks r and 2n-1-r.

So every rank has early and late tokens, and causal attention costs them alike.
"""

from dataclasses import replace

import torch

from megatron_jq.model.rows import ScoreHead


def zigzag_positions(length: int, rank: int, size: int) -> torch.Tensor:
    """Places of the row that context-parallel rank `rank` of `size` holds, in its order, [length / size]."""
    assert length % (2 * size) == 0, "rows are padded to a multiple of twice the context-parallel size"
    chunks = torch.arange(length).chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def head_of_rank(head: ScoreHead, length: int, rank: int, size: int) -> ScoreHead:
    """The head rows whose hidden state lies on this context-parallel rank, at their places in its part of the row."""
    held = zigzag_positions(length, rank, size).to(head.position_N.device)
    place = torch.full((length,), -1, dtype=torch.long, device=held.device)
    place[held] = torch.arange(len(held), device=held.device)
    mine = place[head.position_N] >= 0

    def part(tensor):
        return None if tensor is None else tensor[mine]

    return replace(
        head,
        position_N=place[head.position_N[mine]],
        target_N=part(head.target_N),
        cell_N=part(head.cell_N),
        inverse_temperature_N=part(head.inverse_temperature_N),
        top_p_N=part(head.top_p_N),
        coefficient_N=part(head.coefficient_N),
        rule=None if head.rule is None else head.rule.part(mine),
    )
