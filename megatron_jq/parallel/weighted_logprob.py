"""F2: the training head: sum(coefficient · ln p[target]) over a split vocabulary, its gradient formed on the way.

The coefficients are known before the forward pass and the sum is linear in ln p, so each chunk's logits become their
own gradient at once. What a shard is and what ranks exchange: parallel/vocabulary.py.

Shapes: T tokens, H hidden, V this rank's shard of the vocabulary. A `group` of None means one process.
"""

from collections import deque
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_jq.objective.clipping import TokenRule
from megatron_jq.parallel.vocabulary import (
    LogitOptions,
    accumulation_dtype,
    default_chunk_tokens,
    exchange_statistics,
    exponentials_by_columns_,
    local_targets,
    mask_vocabulary_padding,
    merge_statistics,
    token_chunks,
)


class _Workspace:
    """Memory of one chunk's logits, [V, tokens], used again by the next chunk.

    Tokens lie innermost: weight · hiddenᵀ is the faster product on CPU (by a sixth at 320 tokens and 151,936 rows).
    """

    def __init__(self, weight_VH: Tensor, chunk_tokens: int):
        self._weight_VH = weight_VH
        self._product = weight_VH.new_empty(len(weight_VH) * chunk_tokens)
        wide = accumulation_dtype(weight_VH.dtype)
        self._wide = None if wide == weight_VH.dtype else torch.empty_like(self._product, dtype=wide)

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """Return weight · hiddenᵀ in the accumulation dtype."""
        product_VT = torch.mm(self._weight_VH, hidden_TH.t(), out=self._shaped(self._product, len(hidden_TH)))
        return product_VT if self._wide is None else self._shaped(self._wide, len(hidden_TH)).copy_(product_VT)

    def narrow(self, grad_VT: Tensor) -> Tensor:
        """Return the gradient of such logits in the weight's dtype."""
        return grad_VT if self._wide is None else self._shaped(self._product, grad_VT.shape[1]).copy_(grad_VT)

    def _shaped(self, memory: Tensor, tokens: int) -> Tensor:
        return memory[: len(self._weight_VH) * tokens].view(len(self._weight_VH), tokens)


def _logits_to_statistics_(
    logits_VT: Tensor, chunk: slice, column_T: Tensor, local_T: Tensor, options: LogitOptions
) -> Tensor:
    """Temper a chunk's logits and replace them by their exponentials, in place; return partial_softmax's numbers."""
    if options.inverse_temperature_T is not None:
        logits_VT.mul_(options.inverse_temperature_T[chunk])
    mask_vocabulary_padding(logits_VT.t(), options.group, options.vocab_size)
    return exponentials_by_columns_(logits_VT, column_T[chunk], local_T[chunk])


class _Started(NamedTuple):
    """A chunk whose statistics travel between ranks."""

    chunk: slice
    workspace: _Workspace
    exponentials_VT: Tensor
    largest_T: Tensor
    exchange: tuple[Tensor, dist.Work | None]


class _ChunkPass:
    """The forward pass over chunks, which leaves log_prob_T and both gradients filled."""

    def __init__(
        self, hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, coefficient_T: Tensor,
        rule: TokenRule | None, options: LogitOptions,
    ):  # fmt: skip
        self._hidden_TH, self._weight_VH, self._coefficient_T = hidden_TH, weight_VH, coefficient_T
        self._rule, self._options = rule, options
        self._column_T, self._local_T = local_targets(targets_T, weight_VH.shape[0], options.group)
        grad_weight: Tensor | None = getattr(weight_VH, "main_grad", None)
        if grad_weight is None:
            grad_weight = torch.zeros_like(weight_VH, dtype=accumulation_dtype(weight_VH.dtype))
        self.grad_weight: Tensor = grad_weight
        self.grad_hidden = torch.empty_like(hidden_TH)
        self.log_prob_T = torch.empty_like(targets_T, dtype=accumulation_dtype(hidden_TH.dtype))

    def run(self) -> None:
        # Over several ranks, one chunk's statistics travel while the next chunk's logits are made.
        group = self._options.group
        ahead = 0 if group is None or group.size() == 1 else 1
        started, chunks = deque(), token_chunks(len(self.log_prob_T), self._options.chunk_tokens)
        longest = max(chunk.stop - chunk.start for chunk in chunks)
        workspaces = [_Workspace(self._weight_VH, longest) for _ in chunks[: ahead + 1]]
        for number, chunk in enumerate(chunks):
            started.append(self._begin(chunk, workspaces[number % len(workspaces)]))
            if len(started) > ahead:
                self._finish(started.popleft())
        while started:
            self._finish(started.popleft())

    def _begin(self, chunk: slice, workspace: _Workspace) -> _Started:
        """GEMM 1 of a chunk, exponentials in the logits' place; start sending its statistics to the other ranks."""
        logits_VT = workspace.logits(self._hidden_TH[chunk])
        statistics_3T = _logits_to_statistics_(logits_VT, chunk, self._column_T, self._local_T, self._options)
        exchange = exchange_statistics(statistics_3T, self._options.group)
        return _Started(chunk, workspace, logits_VT, statistics_3T[0], exchange)

    def _finish(self, started: _Started) -> None:
        """The chunk's log-probabilities and its share of both gradients: GEMMs 2 and 3."""
        chunk, workspace, exponentials_VT, largest, exchange = started
        normaliser, target = merge_statistics(*exchange)
        self.log_prob_T[chunk] = target - normaliser
        coefficient = self._coefficient_T[chunk]
        if self._rule is not None:
            coefficient = self._rule.part(chunk).coefficients(coefficient, self.log_prob_T[chunk])
        coefficient = coefficient.to(exponentials_VT.dtype)
        if self._options.inverse_temperature_T is not None:
            coefficient = coefficient * self._options.inverse_temperature_T[chunk]
        # d/dlogits = coefficient · (onehot - softmax); softmax = exponentials · exp(this rank's largest - normaliser)
        grad_VT = exponentials_VT.mul_(-coefficient * (largest - normaliser).exp())
        grad_VT.scatter_add_(0, self._column_T[None, chunk], (coefficient * self._local_T[chunk])[None])
        grad_VT = workspace.narrow(grad_VT)
        hidden_TH = self._hidden_TH[chunk]
        torch.mm(grad_VT.t(), self._weight_VH, out=self.grad_hidden[chunk])
        if self.grad_weight.dtype == grad_VT.dtype:
            self.grad_weight.addmm_(grad_VT, hidden_TH)
        else:
            for rows in token_chunks(len(self._weight_VH), 1 << 14):  # the product exists in both formats: in portions
                self.grad_weight[rows].add_(grad_VT[rows] @ hidden_TH)


class _WeightedLogProbs(torch.autograd.Function):
    """sum(coefficient · ln p[target]), its gradient formed during the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, coefficient_T: Tensor,
        rule: TokenRule | None, options: LogitOptions,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        chunks = _ChunkPass(hidden_TH, weight_VH, targets_T, coefficient_T, rule, options)
        chunks.run()
        in_main_grad = getattr(weight_VH, "main_grad", None) is not None
        ctx.save_for_backward(chunks.grad_hidden, None if in_main_grad else chunks.grad_weight)
        ctx.weight = weight_VH
        log_prob_T = chunks.log_prob_T
        ctx.mark_non_differentiable(log_prob_T)
        if rule is not None:
            return rule.loss(coefficient_T, log_prob_T), log_prob_T
        return (coefficient_T * log_prob_T).sum(), log_prob_T

    @staticmethod
    def backward(
        ctx: Any, grad_total: Tensor, _: Tensor | None
    ) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is None:
            # The weight's gradient is in main_grad already, for a loss that is this sum itself.
            torch._assert_async(grad_total == 1)  # pyright: ignore[reportPrivateImportUsage]
            ctx.weight.grad_added_to_main_grad = True
            return grad_hidden, _unused_gradient(ctx.weight), None, None, None, None
        scale = grad_total.to(grad_weight.dtype)
        grad_weight = (grad_weight * scale).to(ctx.weight.dtype)
        return (grad_hidden * scale).to(grad_hidden.dtype), grad_weight, None, None, None, None


def mark_gradient_arrival(weight: Tensor) -> None:
    """Have the backward pass hand Megatron-core a gradient of this weight though it is in main_grad already."""
    weight.needs_gradient_arrival = True  # pyright: ignore[reportAttributeAccessIssue]


def _unused_gradient(weight: Tensor) -> Tensor | None:
    """What autograd gets for a weight whose gradient went to main_grad.

    Megatron-core's overlapped reduction wants some gradient to arrive; without overlap, nothing need be allocated.
    Where the embedding shares the weight its own gradient arrives, and this one has to be zero or absent.
    """
    if getattr(weight, "zero_out_wgrad", False) or not getattr(weight, "needs_gradient_arrival", False):
        return None
    return torch.empty_like(weight)


def weighted_log_probs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    coefficient_T: Tensor,
    group: dist.ProcessGroup | None,
    *,
    chunk_tokens: int | None = None,
    vocab_size: int | None = None,
    inverse_temperature_T: Tensor | None = None,
    rule: TokenRule | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (sum over tokens of coefficient · ln p[target], ln p[target] in nats [T]); only the sum is differentiable.

    The coefficients are known before the forward pass and the sum is linear in ln p, so each chunk's logits become
    their own gradient at once: three GEMMs, no logits kept, nothing recomputed, two chunks of logits alive at most. The
    gradient of hidden_TH is this rank's share, as for linear_log_probs. Where weight_VH has Megatron-core's `main_grad`
    its gradient is added there during this call; the sum must then be the loss itself, unscaled, and be differentiated
    exactly once. Cost: one all-gather of 3 numbers per token and rank for each chunk, overlapped with the next chunk.

    rule: the loss is not linear in ln p; each chunk's coefficients follow from coefficient_T and its ln p, which are
    known when its gradient is formed. The sum, whose gradient is that loss's, is then its value.
    """
    chunk_tokens = chunk_tokens or default_chunk_tokens(weight_VH.shape[0], weight_VH.device)
    options = LogitOptions(group, chunk_tokens, vocab_size, inverse_temperature_T)
    return _WeightedLogProbs.apply(hidden_TH, weight_VH, targets_T, coefficient_T, rule, options)


@torch.no_grad()
def log_probs_as_trained(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    group: dist.ProcessGroup | None,
    *,
    chunk_tokens: int | None = None,
    vocab_size: int | None = None,
    inverse_temperature_T: Tensor | None = None,
) -> Tensor:
    """Return ln p[target] in nats, [T], bit for bit as weighted_log_probs computes it.

    Policies that agree then differ by exactly 0, where an optimizer would make updates of full size from the rounding
    of two ways to compute the same.
    """
    chunk_tokens = chunk_tokens or default_chunk_tokens(weight_VH.shape[0], weight_VH.device)
    options = LogitOptions(group, chunk_tokens, vocab_size, inverse_temperature_T)
    column_T, local_T = local_targets(targets_T, weight_VH.shape[0], group)
    log_prob_T = torch.empty_like(targets_T, dtype=accumulation_dtype(hidden_TH.dtype))
    chunks = token_chunks(len(targets_T), chunk_tokens)
    workspace = _Workspace(weight_VH, max(chunk.stop - chunk.start for chunk in chunks))
    for chunk in chunks:
        statistics_3T = _logits_to_statistics_(workspace.logits(hidden_TH[chunk]), chunk, column_T, local_T, options)
        normaliser, target = merge_statistics(*exchange_statistics(statistics_3T, group))
        log_prob_T[chunk] = target - normaliser
    return log_prob_T
