"""F2: the exact threshold of a nucleus (top-p) over a vocabulary that is split over tensor-parallel ranks."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_jq.parallel.transfers import to_device
from megatron_jq.parallel.vocabulary import exchange_statistics, merge_statistics, partial_softmax


def mask_outside_nucleus_(
    logits_TV: Tensor,
    tokens: Tensor,
    top_p_T: Tensor,
    column_T: Tensor,
    local_T: Tensor,
    threshold_T: Tensor,
    group: dist.ProcessGroup | None,
) -> None:
    """Set logits outside the nucleus to -inf and threshold_T to its least logit, both in place.

    tokens: those of the chunk that have a nucleus, on the host and alike on all ranks; nothing is computed for the
    others, such as gold answers'. A sampled token stays in the nucleus even when rounding puts it a hair outside the
    one it was drawn from.
    """
    if not len(tokens):
        return
    n = to_device(tokens, logits_TV.device)
    logits_NV = logits_TV if len(tokens) == len(logits_TV) else logits_TV[n]
    target_N = torch.where(local_T[n], logits_NV.gather(-1, column_T[n][:, None]).squeeze(-1), float("-inf"))
    _all_reduce(target_N, group, dist.ReduceOp.MAX)
    threshold_T[n] = torch.minimum(nucleus_threshold(logits_NV, top_p_T[n], group), target_N)
    logits_TV.masked_fill_(logits_TV < threshold_T[:, None], float("-inf"))


def nucleus_threshold(logits_TV: Tensor, top_p_T: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the smallest logit in each row's nucleus, [T] float32: the highest t with P(logit >= t) >= top_p.

    Exact: bisects over the 2^32 float32 values themselves, one all-reduce of T numbers per halving. Ties at the
    threshold are all in the nucleus. Rows with top_p = 1 get -inf.
    """
    logits_TV = logits_TV.float()
    any_column_T = torch.zeros_like(logits_TV[:, 0], dtype=torch.long)
    statistics_3T = partial_softmax(logits_TV, any_column_T, any_column_T > 0)
    normaliser_T, _ = merge_statistics(*exchange_statistics(statistics_3T, group))
    probability_TV = (logits_TV - normaliser_T[:, None]).double().exp_()
    order_TV = _float_order(logits_TV)
    low_T = torch.full_like(top_p_T, -(2**31), dtype=torch.int64)  # always inside
    high_T = torch.full_like(top_p_T, 2**31 - 1, dtype=torch.int64)  # above every finite float
    for _ in range(32):
        middle_T = (low_T + high_T) >> 1
        mass_T = (probability_TV * (order_TV >= middle_T[:, None])).sum(dim=-1)
        inside_T = _all_reduce(mass_T, group) >= top_p_T
        low_T, high_T = low_T.where(~inside_T, middle_T), high_T.where(inside_T, middle_T)
    threshold_T = _order_float(low_T)
    return torch.where(top_p_T >= 1.0, float("-inf"), threshold_T)


def _all_reduce(
    tensor: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def _float_order(x: Tensor) -> Tensor:
    """float32 → int64 with the same order."""
    bits = x.contiguous().view(torch.int32).long()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _order_float(order: Tensor) -> Tensor:
    bits = torch.where(order < 0, order ^ 0x7FFFFFFF, order).int()
    value = bits.view(torch.float32)
    return torch.where(value.isnan(), float("-inf"), value)
