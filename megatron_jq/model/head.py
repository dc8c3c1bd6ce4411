"""F3: the J_Q head: from hidden states to per-sequence ln p(z|x) and ln p(y|x,z), and to the loss where training.

It sees only rows whose next token is scored, keeps the vocabulary split over tensor-parallel ranks and, where sequences
are split over context-parallel ranks, adds the ranks' partial sums. No power of a likelihood is taken here.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_jq.model.rows import ScoreHead
from megatron_jq.parallel.logprob import linear_log_probs
from megatron_jq.parallel.weighted_logprob import log_probs_as_trained, weighted_log_probs


def score_rows(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    head: ScoreHead,
    *,
    tp,
    cp=None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Table [n, 2] float64 of log-likelihoods; with head.coefficient_N (loss, table), the table without gradient. With
    head.by_token ln p of each token, [N], comes last: (loss, table, tokens), or (table, tokens) without gradient.

    hidden_NH: states at head.position_N, alike on all ranks of tp; weight_VH: this rank's shard. cp: the rows are split
    over this group and the table is summed over it; the loss stays this rank's part, whose gradients Megatron-core adds
    over data- and context-parallel ranks.
    """
    options = {
        "chunk_tokens": chunk_tokens,
        "vocab_size": vocab_size,
        "inverse_temperature_T": head.inverse_temperature_N,
    }
    coefficient_N = head.coefficient_N
    if head.by_token:
        return _by_token(hidden_NH, weight_VH, head, tp, cp, options)
    if coefficient_N is not None and head.top_p_N is None:
        loss, log_prob_N = weighted_log_probs(hidden_NH, weight_VH, head.target_N, coefficient_N, tp, **options)
        return loss, _table(log_prob_N, head, cp)
    log_prob_N = linear_log_probs(hidden_NH, weight_VH, head.target_N, tp, top_p_T=head.top_p_N, **options)
    if coefficient_N is not None:
        return (coefficient_N * log_prob_N).sum(), _table(log_prob_N.detach(), head, cp)
    return _table(log_prob_N, head, cp)


def _by_token(hidden_NH: Tensor, weight_VH: Tensor, head: ScoreHead, tp, cp, options) -> tuple[Tensor, ...]:
    """score_rows with ln p of each token."""
    assert head.top_p_N is None, "a token outside another policy's nucleus has probability zero there"
    if head.coefficient_N is None:
        log_prob_N = log_probs_as_trained(hidden_NH, weight_VH, head.target_N, tp, **options)
        return _table(log_prob_N, head, cp), log_prob_N
    loss, log_prob_N = weighted_log_probs(
        hidden_NH, weight_VH, head.target_N, head.coefficient_N, tp, rule=head.rule, **options
    )
    return loss, _table(log_prob_N, head, cp), log_prob_N


def _table(log_prob_N: Tensor, head: ScoreHead, cp) -> Tensor:
    """Sums by sequence and column. They run over hundreds of tokens and are exponentiated next: float64."""
    table = torch.zeros(2 * head.num_sequences, dtype=torch.float64, device=log_prob_N.device)
    # Not index_add: on CUDA its order of summation varies, and tensor-parallel ranks must find the same table.
    table = table.index_put((head.cell_N,), log_prob_N.double(), accumulate=True)
    if cp is not None and cp.size() > 1:
        assert not table.requires_grad, "under context parallelism gradients flow through the loss, not the table"
        dist.all_reduce(table, group=cp)
    return table.view(-1, 2)
