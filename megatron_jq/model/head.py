"""F3: the J_Q head: from hidden states to per-sequence ln p(z|x) and ln p(y|x,z), and to the loss where training.

It sees only rows whose next token is scored, keeps the vocabulary split over tensor-parallel ranks and, where sequences
are split over context-parallel ranks, adds the ranks' partial sums. No power of a likelihood is taken here.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_jq.model.rows import ScoreHead
from megatron_jq.parallel.logprob import linear_log_probs
from megatron_jq.parallel.weighted_logprob import log_probs_as_trained, weighted_log_probs


@dataclass(frozen=True)
class HeadOutput:
    """What the head returns for a micro-batch of n sequences; float64, nats, [n]. N scored tokens.

    log_z_n: ln p(z|x) over the sampled tokens (0 where they are not scored). log_w_n: ln p(y|x,z) of the answer that
    the sequence holds. Both without gradient where there is a loss. loss: the sum over tokens of coefficient · ln p, or
    what head.rule makes of it; None where the head has no coefficients. log_prob_N: with head.by_token. rule_sums: with
    head.rule (TokenRule.figures).
    """

    log_z_n: Tensor
    log_w_n: Tensor
    loss: Tensor | None = None
    log_prob_N: Tensor | None = None
    rule_sums: Tensor | None = None


def score_rows(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    head: ScoreHead,
    *,
    tp: dist.ProcessGroup | None,
    cp: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> HeadOutput:
    """Return the log-likelihoods of each sequence, and with head.coefficient_N the loss.

    hidden_NH: states at head.position_N, alike on all ranks of tp; weight_VH: this rank's shard. cp: the rows are split
    over this group and the sums are added over it; the loss stays this rank's share, whose gradients Megatron-core adds
    over data- and context-parallel ranks.
    """
    options: dict[str, Any] = {
        "chunk_tokens": chunk_tokens,
        "vocab_size": vocab_size,
        "inverse_temperature_T": head.inverse_temperature_N,
    }
    targets = (hidden_NH, weight_VH, head.target_N)
    if head.by_token:
        assert head.top_p_N is None, "a token outside another policy's nucleus has probability zero there"
    if head.coefficient_N is None and head.by_token:
        log_prob_N = log_probs_as_trained(*targets, tp, **options)
        return HeadOutput(*_by_sequence(log_prob_N, head, cp), log_prob_N=log_prob_N)
    if head.coefficient_N is not None and head.top_p_N is None:
        rule = head.rule
        loss, log_prob_N = weighted_log_probs(*targets, head.coefficient_N, tp, rule=rule, **options)
        table = _by_sequence(log_prob_N, head, cp)
        if rule is None:
            return HeadOutput(*table, loss)
        return HeadOutput(*table, loss, log_prob_N, rule.figures(head.coefficient_N, log_prob_N))
    log_prob_N = linear_log_probs(*targets, tp, top_p_T=head.top_p_N, **options)
    if head.coefficient_N is None:
        return HeadOutput(*_by_sequence(log_prob_N, head, cp))
    return HeadOutput(*_by_sequence(log_prob_N.detach(), head, cp), (head.coefficient_N * log_prob_N).sum())


def _by_sequence(log_prob_N: Tensor, head: ScoreHead, cp: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Return sums by sequence, (ln p(z|x), ln p(y|x,z)), in float64: of hundreds of tokens, exponentiated next."""
    sum_2n = torch.zeros(2 * head.num_sequences, dtype=torch.float64, device=log_prob_N.device)
    # Not index_add: on CUDA its order of summation varies, and tensor-parallel ranks must find the same sums.
    sum_2n = sum_2n.index_put((head.cell_N,), log_prob_N.double(), accumulate=True)
    if cp is not None and cp.size() > 1:
        assert not sum_2n.requires_grad, "under context parallelism gradients flow through the loss, not these sums"
        dist.all_reduce(sum_2n, group=cp)
    log_z_n, log_w_n = sum_2n.view(-1, 2).t().contiguous()
    return log_z_n, log_w_n
