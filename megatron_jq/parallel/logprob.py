"""F2: log-probabilities of given tokens from a vocabulary that is split over tensor-parallel ranks.

Rank r of a group of size n holds rows [r·V/n, (r+1)·V/n) of the (padded) output embedding. No function here gathers the
vocabulary: ranks exchange three numbers a token (largest logit, sum of exponentials, the target's logit).
Rows at and beyond `vocab_size` are padding for an even split: they have probability zero, so that results do not depend
on the layout.

Shapes: T tokens, H hidden, V this rank's share of the vocabulary. A `group` of None means one process.
"""

from collections import deque

import torch
import torch.distributed as dist

from megatron_jq.objective.clipping import TokenRule
from megatron_jq.parallel.collectives import all_gather_flat
from megatron_jq.parallel.transfers import to_device

#: Logits that exist at one time, in elements, by device: bounds memory, and is large enough for efficient GEMMs.
_CHUNK_ELEMENTS = {"cpu": 3 << 24, "cuda": 1 << 27}


def default_chunk_tokens(shard: int, device: torch.device) -> int:
    """Tokens a chunk for a vocabulary shard of this many rows: 200 MB of float32 logits on CPU, 512 MB on CUDA."""
    return max(32, _CHUNK_ELEMENTS.get(device.type, 3 << 24) // shard // 32 * 32)  # GEMMs favour multiples


def _rank_size(group) -> tuple[int, int]:
    return (0, 1) if group is None else (group.rank(), group.size())


def _all_reduce(tensor: torch.Tensor, group, op=dist.ReduceOp.SUM) -> torch.Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def mask_vocabulary_padding(logits_TV: torch.Tensor, group, vocab_size: int | None) -> torch.Tensor:
    """Set the logits of padding rows of the vocabulary to -inf, in place."""
    if vocab_size is not None:
        rank, _ = _rank_size(group)
        valid = vocab_size - rank * logits_TV.shape[-1]
        if valid < logits_TV.shape[-1]:
            logits_TV[..., max(valid, 0) :] = float("-inf")
    return logits_TV


def _local_targets(targets_T: torch.Tensor, shard: int, group) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets as columns of this rank's shard (0 where they lie elsewhere), and whether they lie here."""
    rank, _ = _rank_size(group)
    column_T = targets_T - rank * shard
    here_T = (column_T >= 0) & (column_T < shard)
    return column_T.where(here_T, torch.zeros_like(column_T)), here_T


def _partial_softmax(logits_TV, column_T, here_T) -> torch.Tensor:
    """This rank's largest logit, sum of exp(logit - largest), target's logit (or 0): [3, T]; leaves logits as they are.

    A shard of padding alone has largest = -inf and contributes a sum of zero.
    """
    return _exponentials_(logits_TV.clone(), column_T, here_T)


def _exponentials_(logits_TV, column_T, here_T) -> torch.Tensor:
    """Replace logits by exp(logit - largest), in place; returns the numbers of _partial_softmax.

    A few rows at a time on CPU, whose caches hold them between the four operations.
    """
    target_T = logits_TV.gather(-1, column_T[:, None]).squeeze(-1)
    largest, total = [], []
    for rows_RV in logits_TV.split(_cached_rows(logits_TV)):
        largest_R = rows_RV.amax(dim=-1)
        shift_R = torch.where(largest_R == float("-inf"), torch.zeros_like(largest_R), largest_R)
        total.append(rows_RV.sub_(shift_R[:, None]).exp_().sum(dim=-1))
        largest.append(largest_R)
    return torch.stack([torch.cat(largest), torch.cat(total), target_T.where(here_T, torch.zeros_like(target_T))])


def _cached_rows(logits_TV: torch.Tensor) -> int:
    """Rows of logits that a CPU's caches hold (4 MB in float32); all of them on CUDA."""
    if logits_TV.device.type != "cpu":
        return max(1, len(logits_TV))
    return max(1, (1 << 20) // max(1, logits_TV.shape[-1]))


def _exchange(statistics_3T: torch.Tensor, group) -> tuple[torch.Tensor, dist.Work | None]:
    """Start gathering every rank's three numbers a token, [ranks, 3, T]: one collective, not waited for."""
    if group is None or group.size() == 1:
        return statistics_3T[None], None
    everyones = statistics_3T.new_empty(group.size() * 3, statistics_3T.shape[1])
    work = all_gather_flat(everyones, statistics_3T, group, async_op=True)
    return everyones.view(group.size(), 3, -1), work


def _merge(everyones_R3T: torch.Tensor, work: dist.Work | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-normaliser and target logit over the whole vocabulary, each [T]."""
    if work is not None:
        work.wait()
    largest_RT, sum_RT, target_RT = everyones_R3T.unbind(dim=1)
    largest_T = largest_RT.amax(dim=0)
    return largest_T + (sum_RT * (largest_RT - largest_T).exp()).sum(dim=0).log(), target_RT.sum(dim=0)


def _logit_gradient(logits_TV, log_normaliser_T, column_T, here_T, grad_T):
    """d/dlogits of sum(grad · ln p[target]) = grad · (onehot - softmax), over this rank's columns, in place."""
    probability_TV = logits_TV.sub_(log_normaliser_T[:, None]).exp_()
    probability_TV.mul_(-grad_T[:, None])
    probability_TV.scatter_add_(-1, column_T[:, None], (grad_T * here_T)[:, None])
    return probability_TV


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TV, targets_T, group, vocab_size):
        logits_TV = logits_TV.to(_accumulation_dtype(logits_TV.dtype), copy=True)
        mask_vocabulary_padding(logits_TV, group, vocab_size)
        column_T, here_T = _local_targets(targets_T, logits_TV.shape[-1], group)
        normaliser_T, target_T = _merge(*_exchange(_partial_softmax(logits_TV, column_T, here_T), group))
        ctx.save_for_backward(logits_TV, normaliser_T, column_T, here_T)
        return target_T - normaliser_T

    @staticmethod
    def backward(ctx, grad_T):
        logits_TV, normaliser_T, column_T, here_T = ctx.saved_tensors
        return _logit_gradient(logits_TV.clone(), normaliser_T, column_T, here_T, grad_T), None, None, None


def vocab_parallel_log_probs(
    logits_TV: torch.Tensor, targets_T: torch.Tensor, group, *, vocab_size: int | None = None
) -> torch.Tensor:
    """ln softmax(logits)[target] in nats, [T], differentiable in this rank's logits.

    logits_TV: this rank's shard, any float dtype, left unchanged; computed in float32 (float64 stays). targets_T:
    global ids, int64. Equals torch.log_softmax over the gathered vocabulary. Cost: one all-gather of 3T numbers a
    rank in the forward pass, none in the backward pass.
    """
    return _VocabParallelLogProbs.apply(logits_TV, targets_T, group, vocab_size)


class _LinearLogProbs(torch.autograd.Function):
    """hidden · weightᵀ → ln p[target], `chunk` tokens at a time; the backward pass makes each chunk's logits again."""

    @staticmethod
    def forward(ctx, hidden_TH, weight_VH, targets_T, group, chunk, vocab_size, inverse_temperature_T, top_p):
        column_T, here_T = _local_targets(targets_T, weight_VH.shape[0], group)
        threshold_T = has_nucleus_T = None
        if top_p is not None:
            threshold_T = hidden_TH.new_full((len(targets_T),), float("-inf"), dtype=torch.float32)
            has_nucleus_T = (top_p < 1).cpu()  # waits for the device once; a nucleus takes 32 passes over its logits
        partial = []
        for part in _chunks(len(targets_T), chunk):
            logits = _chunk_logits(hidden_TH, weight_VH, part, group, vocab_size, inverse_temperature_T)
            if top_p is not None:
                tokens = has_nucleus_T[part].nonzero().squeeze(1)
                _cut_to_nucleus_(logits, tokens, top_p[part], column_T[part], here_T[part], threshold_T[part], group)
            partial.append(_exponentials_(logits, column_T[part], here_T[part]))
        normaliser_T, target_T = _merge(*_exchange(torch.cat(partial, dim=1), group))
        ctx.save_for_backward(hidden_TH, weight_VH, column_T, here_T, normaliser_T, inverse_temperature_T, threshold_T)
        ctx.group, ctx.chunk, ctx.vocab_size = group, chunk, vocab_size
        return target_T - normaliser_T

    @staticmethod
    def backward(ctx, grad_T):
        hidden_TH, weight_VH, column_T, here_T, normaliser_T, inverse_temperature_T, threshold_T = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_TH)
        grad_weight = torch.zeros_like(weight_VH, dtype=_accumulation_dtype(weight_VH.dtype))
        for part in _chunks(len(grad_T), ctx.chunk):
            logits = _chunk_logits(hidden_TH, weight_VH, part, ctx.group, ctx.vocab_size, inverse_temperature_T)
            if threshold_T is not None:
                logits.masked_fill_(logits < threshold_T[part, None], float("-inf"))
            grad = _logit_gradient(logits, normaliser_T[part], column_T[part], here_T[part], grad_T[part])
            if inverse_temperature_T is not None:
                grad.mul_(inverse_temperature_T[part, None])
            grad = grad.to(hidden_TH.dtype)
            torch.mm(grad, weight_VH, out=grad_hidden[part])
            grad_weight += grad.t() @ hidden_TH[part]
        return grad_hidden, grad_weight.to(weight_VH.dtype), None, None, None, None, None, None


def _chunks(total: int, chunk: int):
    return [slice(start, min(start + chunk, total)) for start in range(0, total, chunk)] or [slice(0, 0)]


def _chunk_logits(hidden_TH, weight_VH, part, group, vocab_size, inverse_temperature_T):
    logits = hidden_TH[part] @ weight_VH.t()
    logits = logits.to(_accumulation_dtype(logits.dtype))
    if inverse_temperature_T is not None:
        logits.mul_(inverse_temperature_T[part, None])
    return mask_vocabulary_padding(logits, group, vocab_size)


def linear_log_probs(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    group,
    *,
    chunk_tokens: int | None = None,
    vocab_size: int | None = None,
    inverse_temperature_T: torch.Tensor | None = None,
    top_p_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """ln p[target] of softmax(hidden · weightᵀ · inverse temperature), in nats, [T]; logits live for one chunk at a
    time.

    hidden_TH is alike on all ranks of the group; weight_VH is this rank's shard. Differentiable in both: the gradient
    of hidden_TH is this rank's share and must be summed over the group by the caller's mapping (Megatron-core's
    copy_to / gather_from regions do so). With top_p_T the distribution is first cut to its nucleus, whose membership is
    a constant for the gradient; 1.0 keeps all tokens and costs nothing. Cost without top-p: one all-gather of 3T
    numbers a rank in the forward pass, whatever the chunk is; none in the backward pass. Of tokens with a nucleus:
    another such all-gather and 33 all-reduces of one number a token for each chunk that has some.
    """
    chunk_tokens = chunk_tokens or default_chunk_tokens(weight_VH.shape[0], weight_VH.device)
    return _LinearLogProbs.apply(
        hidden_TH, weight_VH, targets_T, group, chunk_tokens, vocab_size, inverse_temperature_T, top_p_T
    )


class _Workspace:
    """Memory of one chunk's logits, [V, tokens], used again by the next chunk.

    Tokens lie innermost: weight · hiddenᵀ is the faster product on CPU (by a sixth at 320 tokens and 151,936 rows).
    """

    def __init__(self, weight_VH: torch.Tensor, chunk: int):
        self._weight_VH = weight_VH
        self._product = weight_VH.new_empty(len(weight_VH) * chunk)
        wide = _accumulation_dtype(weight_VH.dtype)
        self._wide = None if wide == weight_VH.dtype else torch.empty_like(self._product, dtype=wide)

    def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """weight · hiddenᵀ in the accumulation dtype."""
        product_VT = torch.mm(self._weight_VH, hidden_TH.t(), out=self._shaped(self._product, len(hidden_TH)))
        return product_VT if self._wide is None else self._shaped(self._wide, len(hidden_TH)).copy_(product_VT)

    def narrow(self, grad_VT: torch.Tensor) -> torch.Tensor:
        """The gradient of such logits in the weight's dtype."""
        return grad_VT if self._wide is None else self._shaped(self._product, grad_VT.shape[1]).copy_(grad_VT)

    def _shaped(self, memory: torch.Tensor, tokens: int) -> torch.Tensor:
        return memory[: len(self._weight_VH) * tokens].view(len(self._weight_VH), tokens)


def _exponentials_by_columns_(logits_VT, column_T, here_T) -> torch.Tensor:
    """_exponentials_ where tokens lie innermost."""
    largest_T = logits_VT.amax(dim=0)
    target_T = logits_VT.gather(0, column_T[None]).squeeze(0)
    shift_T = torch.where(largest_T == float("-inf"), torch.zeros_like(largest_T), largest_T)
    sum_T = torch.zeros_like(largest_T)
    for rows_RT in logits_VT.split(_cached_rows(logits_VT)):
        sum_T += rows_RT.sub_(shift_T).exp_().sum(dim=0)
    return torch.stack([largest_T, sum_T, target_T.where(here_T, torch.zeros_like(target_T))])


def _logits_to_statistics_(logits_VT, part, column_T, here_T, group, vocab_size, inverse_temperature_T):
    """A chunk's logits, tempered, to their exponentials in place; the numbers of _partial_softmax."""
    if inverse_temperature_T is not None:
        logits_VT.mul_(inverse_temperature_T[part])
    mask_vocabulary_padding(logits_VT.t(), group, vocab_size)
    return _exponentials_by_columns_(logits_VT, column_T[part], here_T[part])


class _WeightedLogProbs(torch.autograd.Function):
    """sum(coefficient · ln p[target]), its gradient formed during the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx, hidden_TH, weight_VH, targets_T, coefficient_T, group, chunk, vocab_size, inverse_temperature_T, rule
    ):
        column_T, here_T = _local_targets(targets_T, weight_VH.shape[0], group)
        main_grad = getattr(weight_VH, "main_grad", None)
        grad_weight = main_grad
        if main_grad is None:
            grad_weight = torch.zeros_like(weight_VH, dtype=_accumulation_dtype(weight_VH.dtype))
        grad_hidden = torch.empty_like(hidden_TH)
        log_prob_T = torch.empty_like(targets_T, dtype=_accumulation_dtype(hidden_TH.dtype))

        def begin(part, workspace):
            """GEMM 1 of a chunk, exponentials in the logits' place; its statistics set out for the other ranks."""
            logits_VT = workspace.logits(hidden_TH[part])
            statistics_3T = _logits_to_statistics_(
                logits_VT, part, column_T, here_T, group, vocab_size, inverse_temperature_T
            )
            return part, workspace, logits_VT, statistics_3T[0], _exchange(statistics_3T, group)

        def finish(part, workspace, exponentials_VT, largest, exchange):
            """The chunk's log-probabilities and its share of both gradients: GEMMs 2 and 3."""
            normaliser, target = _merge(*exchange)
            log_prob_T[part] = target - normaliser
            coefficient = coefficient_T[part]
            if rule is not None:
                coefficient = rule.part(part).coefficients(coefficient, log_prob_T[part])
            coefficient = coefficient.to(exponentials_VT.dtype)
            if inverse_temperature_T is not None:
                coefficient = coefficient * inverse_temperature_T[part]
            # d/dlogits = coefficient · (onehot - softmax); softmax = exponentials · exp(largest here - normaliser)
            grad_VT = exponentials_VT.mul_(-coefficient * (largest - normaliser).exp())
            grad_VT.scatter_add_(0, column_T[None, part], (coefficient * here_T[part])[None])
            grad_VT = workspace.narrow(grad_VT)
            torch.mm(grad_VT.t(), weight_VH, out=grad_hidden[part])
            if grad_weight.dtype == grad_VT.dtype:
                grad_weight.addmm_(grad_VT, hidden_TH[part])
            else:
                for rows in _chunks(len(weight_VH), 1 << 14):  # the product exists in both formats: a part at a time
                    grad_weight[rows].add_(grad_VT[rows] @ hidden_TH[part])

        # Over several ranks, one chunk's statistics travel while the next chunk's logits are made.
        ahead = 0 if group is None or group.size() == 1 else 1
        started, parts = deque(), _chunks(len(targets_T), chunk)
        longest = max(part.stop - part.start for part in parts)
        workspaces = [_Workspace(weight_VH, longest) for _ in parts[: ahead + 1]]
        for number, part in enumerate(parts):
            started.append(begin(part, workspaces[number % len(workspaces)]))
            if len(started) > ahead:
                finish(*started.popleft())
        while started:
            finish(*started.popleft())
        ctx.save_for_backward(grad_hidden, grad_weight if main_grad is None else None)
        ctx.weight = weight_VH
        ctx.mark_non_differentiable(log_prob_T)
        if rule is not None:
            return rule.loss(coefficient_T, log_prob_T), log_prob_T
        return (coefficient_T * log_prob_T).sum(), log_prob_T

    @staticmethod
    def backward(ctx, grad_total, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is None:
            # The weight's gradient is in main_grad already, for a loss that is this sum itself.
            torch._assert_async(grad_total == 1)
            ctx.weight.grad_added_to_main_grad = True
            return grad_hidden, _unused_gradient(ctx.weight), None, None, None, None, None, None, None
        scale = grad_total.to(grad_weight.dtype)
        grad_weight = (grad_weight * scale).to(ctx.weight.dtype)
        return (grad_hidden * scale).to(grad_hidden.dtype), grad_weight, None, None, None, None, None, None, None


def _unused_gradient(weight: torch.Tensor) -> torch.Tensor | None:
    """What autograd gets for a weight whose gradient went to main_grad.

    Megatron-core's overlapped reduction wants some gradient to arrive; without overlap, nothing need be allocated.
    Where the embedding shares the weight its own gradient arrives, and this one has to be zero or absent.
    """
    if getattr(weight, "zero_out_wgrad", False) or not getattr(weight, "needs_gradient_arrival", False):
        return None
    return torch.empty_like(weight)


def weighted_log_probs(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    coefficient_T: torch.Tensor,
    group,
    *,
    chunk_tokens: int | None = None,
    vocab_size: int | None = None,
    inverse_temperature_T: torch.Tensor | None = None,
    rule: TokenRule | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum over tokens of coefficient · ln p[target], ln p[target] in nats [T]); only the sum is differentiable.

    The coefficients are known before the forward pass and the sum is linear in ln p, so each chunk's logits become
    their own gradient at once: three GEMMs, no logits kept, nothing recomputed, two chunks of logits alive at most. The
    gradient of hidden_TH is this rank's share, as for linear_log_probs. Where weight_VH has Megatron-core's `main_grad`
    its gradient is added there during this call; the sum must then be the loss itself, unscaled, and be differentiated
    exactly once. Cost: one all-gather of 3 numbers a token and rank for each chunk, overlapped with the next chunk.

    rule: the loss is not linear in ln p; each chunk's coefficients follow from coefficient_T and its ln p, which are
    known when its gradient is formed. The sum, whose gradient is that loss's, is then its value.
    """
    chunk_tokens = chunk_tokens or default_chunk_tokens(weight_VH.shape[0], weight_VH.device)
    return _WeightedLogProbs.apply(
        hidden_TH, weight_VH, targets_T, coefficient_T, group, chunk_tokens, vocab_size, inverse_temperature_T, rule
    )


@torch.no_grad()
def log_probs_as_trained(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    group,
    *,
    chunk_tokens: int | None = None,
    vocab_size: int | None = None,
    inverse_temperature_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """ln p[target] in nats, [T], bit for bit as weighted_log_probs finds it: policies that agree differ by exactly 0,
    where an optimizer would make updates of full size from the rounding of two ways to compute the same.
    """
    chunk_tokens = chunk_tokens or default_chunk_tokens(weight_VH.shape[0], weight_VH.device)
    column_T, here_T = _local_targets(targets_T, weight_VH.shape[0], group)
    log_prob_T = torch.empty_like(targets_T, dtype=_accumulation_dtype(hidden_TH.dtype))
    parts = _chunks(len(targets_T), chunk_tokens)
    workspace = _Workspace(weight_VH, max(part.stop - part.start for part in parts))
    for part in parts:
        logits_VT = workspace.logits(hidden_TH[part])
        statistics_3T = _logits_to_statistics_(
            logits_VT, part, column_T, here_T, group, vocab_size, inverse_temperature_T
        )
        normaliser, target = _merge(*_exchange(statistics_3T, group))
        log_prob_T[part] = target - normaliser
    return log_prob_T


def _cut_to_nucleus_(logits_TV, tokens, top_p_T, column_T, here_T, threshold_T, group) -> None:
    """Set logits outside the nucleus to -inf, in place, and write down its threshold. tokens: those of the chunk that
    have a nucleus, on the host and alike on all ranks; nothing is computed for the others, such as gold answers'.

    A sampled token stays in the nucleus even when rounding puts it a hair outside the one it was drawn from.
    """
    if not len(tokens):
        return
    n = to_device(tokens, logits_TV.device)
    logits_NV = logits_TV if len(tokens) == len(logits_TV) else logits_TV[n]
    target_N = torch.where(here_T[n], logits_NV.gather(-1, column_T[n][:, None]).squeeze(-1), float("-inf"))
    _all_reduce(target_N, group, dist.ReduceOp.MAX)
    threshold_T[n] = torch.minimum(nucleus_threshold(logits_NV, top_p_T[n], group), target_N)
    logits_TV.masked_fill_(logits_TV < threshold_T[:, None], float("-inf"))


def nucleus_threshold(logits_TV: torch.Tensor, top_p_T: torch.Tensor, group) -> torch.Tensor:
    """The smallest logit inside each row's nucleus, [T] float32: the highest t with P(logit >= t) >= top_p.

    Exact: bisects over the 2^32 float32 values themselves, one all-reduce of T numbers a halving. Ties at the threshold
    are all inside. Rows with top_p = 1 get -inf.
    """
    logits_TV = logits_TV.float()
    any_column_T = torch.zeros_like(logits_TV[:, 0], dtype=torch.long)
    normaliser_T, _ = _merge(*_exchange(_partial_softmax(logits_TV, any_column_T, any_column_T > 0), group))
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


def _float_order(x: torch.Tensor) -> torch.Tensor:
    """float32 → int64 with the same order."""
    bits = x.contiguous().view(torch.int32).long()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _order_float(order: torch.Tensor) -> torch.Tensor:
    bits = torch.where(order < 0, order ^ 0x7FFFFFFF, order).int()
    value = bits.view(torch.float32)
    return torch.where(value.isnan(), float("-inf"), value)
