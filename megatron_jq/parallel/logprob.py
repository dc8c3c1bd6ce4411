"""F2: log-probabilities of target tokens from a vocabulary that is split over tensor-parallel ranks, by autograd.

What a shard is and what ranks exchange: parallel/vocabulary.py. The training head, whose gradient is formed in the
forward pass: parallel/weighted_logprob.py.

Shapes: T tokens, H hidden, V this rank's shard of the vocabulary. A `group` of None means one process.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_jq.parallel.nucleus import mask_outside_nucleus_
from megatron_jq.parallel.vocabulary import (
    LogitOptions,
    accumulation_dtype,
    default_chunk_tokens,
    exchange_statistics,
    exponentials_,
    local_targets,
    logit_gradient_,
    mask_vocabulary_padding,
    merge_statistics,
    partial_softmax,
    token_chunks,
)


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, targets_T: Tensor, group: dist.ProcessGroup | None, vocab_size: int | None
    ) -> Tensor:
        logits_TV = logits_TV.to(accumulation_dtype(logits_TV.dtype), copy=True)
        mask_vocabulary_padding(logits_TV, group, vocab_size)
        column_T, local_T = local_targets(targets_T, logits_TV.shape[-1], group)
        statistics_3T = partial_softmax(logits_TV, column_T, local_T)
        normaliser_T, target_T = merge_statistics(*exchange_statistics(statistics_3T, group))
        ctx.save_for_backward(logits_TV, normaliser_T, column_T, local_T)
        return target_T - normaliser_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None, None]:
        logits_TV, normaliser_T, column_T, local_T = ctx.saved_tensors
        return logit_gradient_(logits_TV.clone(), normaliser_T, column_T, local_T, grad_T), None, None, None


def vocab_parallel_log_probs(
    logits_TV: Tensor, targets_T: Tensor, group: dist.ProcessGroup | None, *, vocab_size: int | None = None
) -> Tensor:
    """Return ln softmax(logits)[target] in nats, [T], differentiable in this rank's logits.

    logits_TV: this rank's shard, any float dtype, left unchanged; computed in float32 (float64 stays). targets_T:
    global ids, int64. Equals torch.log_softmax over the gathered vocabulary. Cost: one all-gather of 3T numbers a
    rank in the forward pass, none in the backward pass.
    """
    return _VocabParallelLogProbs.apply(logits_TV, targets_T, group, vocab_size)


class _LinearLogProbs(torch.autograd.Function):
    """hidden · weightᵀ → ln p[target], chunk by chunk; the backward pass makes each chunk's logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, top_p: Tensor | None, options: LogitOptions
    ) -> Tensor:
        group = options.group
        column_T, local_T = local_targets(targets_T, weight_VH.shape[0], group)
        threshold_T = has_nucleus_T = None
        if top_p is not None:
            threshold_T = hidden_TH.new_full((len(targets_T),), float("-inf"), dtype=torch.float32)
            has_nucleus_T = (top_p < 1).cpu()  # waits for the device once; a nucleus takes 32 passes over its logits
        partial = []
        for chunk in token_chunks(len(targets_T), options.chunk_tokens):
            logits = _chunk_logits(hidden_TH, weight_VH, chunk, options)
            column, local = column_T[chunk], local_T[chunk]
            if top_p is not None and threshold_T is not None and has_nucleus_T is not None:
                tokens = has_nucleus_T[chunk].nonzero().squeeze(1)
                mask_outside_nucleus_(logits, tokens, top_p[chunk], column, local, threshold_T[chunk], group)
            partial.append(exponentials_(logits, column, local))
        normaliser_T, target_T = merge_statistics(*exchange_statistics(torch.cat(partial, dim=1), group))
        ctx.save_for_backward(hidden_TH, weight_VH, column_T, local_T, normaliser_T, threshold_T)
        ctx.options = options
        return target_T - normaliser_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_TH, weight_VH, column_T, local_T, normaliser_T, threshold_T = ctx.saved_tensors
        inverse_temperature_T = ctx.options.inverse_temperature_T
        grad_hidden = torch.empty_like(hidden_TH)
        grad_weight = torch.zeros_like(weight_VH, dtype=accumulation_dtype(weight_VH.dtype))
        for chunk in token_chunks(len(grad_T), ctx.options.chunk_tokens):
            logits = _chunk_logits(hidden_TH, weight_VH, chunk, ctx.options)
            if threshold_T is not None:
                logits.masked_fill_(logits < threshold_T[chunk, None], float("-inf"))
            grad = logit_gradient_(logits, normaliser_T[chunk], column_T[chunk], local_T[chunk], grad_T[chunk])
            if inverse_temperature_T is not None:
                grad.mul_(inverse_temperature_T[chunk, None])
            grad = grad.to(hidden_TH.dtype)
            torch.mm(grad, weight_VH, out=grad_hidden[chunk])
            grad_weight += grad.t() @ hidden_TH[chunk]
        return grad_hidden, grad_weight.to(weight_VH.dtype), None, None, None


def _chunk_logits(hidden_TH: Tensor, weight_VH: Tensor, chunk: slice, options: LogitOptions) -> Tensor:
    logits = hidden_TH[chunk] @ weight_VH.t()
    logits = logits.to(accumulation_dtype(logits.dtype))
    if options.inverse_temperature_T is not None:
        logits.mul_(options.inverse_temperature_T[chunk, None])
    return mask_vocabulary_padding(logits, options.group, options.vocab_size)


def linear_log_probs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    group: dist.ProcessGroup | None,
    *,
    chunk_tokens: int | None = None,
    vocab_size: int | None = None,
    inverse_temperature_T: Tensor | None = None,
    top_p_T: Tensor | None = None,
) -> Tensor:
    """Return ln p[target] of softmax(hidden · weightᵀ · inverse temperature), in nats, [T].

    Logits live for one chunk at a time. hidden_TH is alike on all ranks of the group; weight_VH is this rank's shard.
    Differentiable in both: the gradient of hidden_TH is this rank's share and must be summed over the group by the
    caller's mapping (Megatron-core's copy_to / gather_from regions do so). With top_p_T the distribution is first
    limited to its nucleus, whose membership is a constant for the gradient; 1.0 keeps all tokens and costs nothing.
    Cost without top-p: one all-gather of 3T numbers a rank in the forward pass, whatever the chunk is; none in the
    backward pass. Of tokens with a nucleus: another such all-gather and 33 all-reduces of one number a token for each
    chunk that has some.
    """
    chunk_tokens = chunk_tokens or default_chunk_tokens(weight_VH.shape[0], weight_VH.device)
    options = LogitOptions(group, chunk_tokens, vocab_size, inverse_temperature_T)
    return _LinearLogProbs.apply(hidden_TH, weight_VH, targets_T, top_p_T, options)
