"""F2: softmax over a vocabulary that is split over tensor-parallel ranks: one shard's statistics, and their merging.

Rank r of a group of size n holds rows [r·V/n, (r+1)·V/n) of the (padded) output embedding. No function here gathers the
vocabulary: ranks exchange three numbers per token (largest logit, sum of exponentials, the target's logit).
Rows from `vocab_size` on are padding for an even split: they have probability zero, so that results do not depend on
the layout.

Shapes: T tokens, V this rank's shard of the vocabulary. A `group` of None means one process.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_jq.parallel.collectives import all_gather_flat

#: Logits that exist at one time, in elements, by device: bounds memory, and is large enough for efficient GEMMs.
_CHUNK_ELEMENTS = {"cpu": 3 << 24, "cuda": 1 << 27}


@dataclass(frozen=True)
class LogitOptions:
    """How a head makes its logits: over which group, how many tokens at a time, without which rows, how tempered."""

    group: dist.ProcessGroup | None
    chunk_tokens: int
    vocab_size: int | None = None
    inverse_temperature_T: Tensor | None = None


def default_chunk_tokens(shard_rows: int, device: torch.device) -> int:
    """Return the tokens per chunk for a shard of this many rows: 200 MB of float32 logits on CPU, 512 MB on CUDA."""
    return max(32, _CHUNK_ELEMENTS.get(device.type, 3 << 24) // shard_rows // 32 * 32)  # GEMMs favour multiples


def token_chunks(total: int, size: int) -> list[slice]:
    """Return slices of at most `size` that cover range(total); one empty slice for a total of 0."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)] or [slice(0, 0)]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def mask_vocabulary_padding(logits_TV: Tensor, group: dist.ProcessGroup | None, vocab_size: int | None) -> Tensor:
    """Set the logits of padding rows of the vocabulary to -inf, in place."""
    if vocab_size is not None:
        rank = 0 if group is None else group.rank()
        valid = vocab_size - rank * logits_TV.shape[-1]
        if valid < logits_TV.shape[-1]:
            logits_TV[..., max(valid, 0) :] = float("-inf")
    return logits_TV


def local_targets(targets_T: Tensor, shard_rows: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Return targets as columns of this rank's shard (0 where in another), and whether they lie in this shard."""
    rank = 0 if group is None else group.rank()
    column_T = targets_T - rank * shard_rows
    local_T = (column_T >= 0) & (column_T < shard_rows)
    return column_T.where(local_T, torch.zeros_like(column_T)), local_T


def partial_softmax(logits_TV: Tensor, column_T: Tensor, local_T: Tensor) -> Tensor:
    """Return this rank's largest logit, sum of exp(logit - largest) and target's logit (or 0): [3, T].

    Leaves the logits as they are. A shard of padding alone has largest = -inf and contributes a sum of zero.
    """
    return exponentials_(logits_TV.clone(), column_T, local_T)


def exponentials_(logits_TV: Tensor, column_T: Tensor, local_T: Tensor) -> Tensor:
    """Replace logits by exp(logit - largest), in place, and return the numbers of partial_softmax.

    A few rows at a time on CPU, whose caches hold them between the four operations.
    """
    target_T = logits_TV.gather(-1, column_T[:, None]).squeeze(-1)
    largest, total = [], []
    for rows_RV in logits_TV.split(_cached_rows(logits_TV)):
        largest_R = rows_RV.amax(dim=-1)
        shift_R = torch.where(largest_R == float("-inf"), torch.zeros_like(largest_R), largest_R)
        total.append(rows_RV.sub_(shift_R[:, None]).exp_().sum(dim=-1))
        largest.append(largest_R)
    return torch.stack([torch.cat(largest), torch.cat(total), target_T.where(local_T, torch.zeros_like(target_T))])


def exponentials_by_columns_(logits_VT: Tensor, column_T: Tensor, local_T: Tensor) -> Tensor:
    """exponentials_ where tokens lie innermost."""
    largest_T = logits_VT.amax(dim=0)
    target_T = logits_VT.gather(0, column_T[None]).squeeze(0)
    shift_T = torch.where(largest_T == float("-inf"), torch.zeros_like(largest_T), largest_T)
    sum_T = torch.zeros_like(largest_T)
    for rows_RT in logits_VT.split(_cached_rows(logits_VT)):
        sum_T += rows_RT.sub_(shift_T).exp_().sum(dim=0)
    return torch.stack([largest_T, sum_T, target_T.where(local_T, torch.zeros_like(target_T))])


def _cached_rows(logits_TV: Tensor) -> int:
    """Rows of logits that a CPU's caches hold (4 MB in float32); all of them on CUDA."""
    if logits_TV.device.type != "cpu":
        return max(1, len(logits_TV))
    return max(1, (1 << 20) // max(1, logits_TV.shape[-1]))


def exchange_statistics(statistics_3T: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, dist.Work | None]:
    """Start gathering every rank's three numbers per token, [ranks, 3, T]: one collective, not waited for."""
    if group is None or group.size() == 1:
        return statistics_3T[None], None
    gathered = statistics_3T.new_empty(group.size() * 3, statistics_3T.shape[1])
    work = all_gather_flat(gathered, statistics_3T, group, async_op=True)
    return gathered.view(group.size(), 3, -1), work


def merge_statistics(gathered_R3T: Tensor, work: dist.Work | None) -> tuple[Tensor, Tensor]:
    """Wait for the exchange and return log-normaliser and target logit over the full vocabulary, each [T]."""
    if work is not None:
        work.wait()
    largest_RT, sum_RT, target_RT = gathered_R3T.unbind(dim=1)
    largest_T = largest_RT.amax(dim=0)
    return largest_T + (sum_RT * (largest_RT - largest_T).exp()).sum(dim=0).log(), target_RT.sum(dim=0)


def logit_gradient_(
    logits_TV: Tensor, log_normaliser_T: Tensor, column_T: Tensor, local_T: Tensor, grad_T: Tensor
) -> Tensor:
    """d/dlogits of sum(grad · ln p[target]) = grad · (onehot - softmax), over this rank's columns, in place."""
    probability_TV = logits_TV.sub_(log_normaliser_T[:, None]).exp_()
    probability_TV.mul_(-grad_T[:, None])
    probability_TV.scatter_add_(-1, column_T[:, None], (grad_T * local_T)[:, None])
    return probability_TV
