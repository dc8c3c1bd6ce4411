"""F3: one flash attention with its log-sum-exp, forward and backward, with one interface for CPU and CUDA.

torch's public scaled_dot_product_attention does not hand out the log-sum-exp; the operators under it do. bfloat16 and
float16 on CUDA use the flash kernels; what these lack (other formats, heads whose width is no multiple of 8 or above
256, GPUs before Ampere) is computed plainly, some queries at a time: a whole matrix of scores would be 13 GB for one
layer and one prompt of 8,192 tokens.

q [b, s, h, d]; k, v [b, t, g, d], h a multiple of g; lse [b, s, h] in float32 at least, nats.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention

_aten = torch.ops.aten

#: Scores that exist at one time where they are computed plainly, in elements: 128 MB in float32.
SCORE_ELEMENTS = 1 << 25


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v [b, s, h, d] over each token and those before it, differentiable, through torch's kernels
    where they need no whole matrix of scores. On CUDA in float32, torch's kernel takes no grouped keys and values: they
    are repeated for it.
    """
    if _kind(q) not in ("cpu", "flash"):
        q_bhsd = q.transpose(1, 2)
        keys, values = (_repeated(x.transpose(1, 2), q_bhsd).transpose(1, 2) for x in (k, v))
        if not _has_kernel(q, keys, values):
            return _PlainCausal.apply(q, k, v, scale)
        k, v = keys, values
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return output.transpose(1, 2)


def _has_kernel(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch has a kernel without a matrix of scores for these; it would fall back to one in silence."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return can_use_efficient_attention(SDPAParams(q, k, v, None, 0.0, True, False))


class _PlainCausal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, lse, _ = flash(q, k, v, causal=True, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        return *flash_backward(grad, q, k, v, out, lse, (), causal=True, scale=ctx.scale), None


def flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor, tuple]:
    """softmax(scale · q kᵀ) v [b, s, h, d], its lse, and what flash_backward wants to see again. causal: s = t."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    kind = _kind(q)
    if kind == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out.transpose(1, 2), lse.transpose(1, 2), ()
    if kind == "flash":
        out, lse, *extra = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return out.transpose(1, 2), lse.transpose(1, 2), tuple(extra[:6])
    out, lse = _plain(q, k, v, causal, scale)
    return out.transpose(1, 2), lse.transpose(1, 2), ()


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, extra: tuple, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v. out and lse may be those of a softmax over more keys than k: then these are
    the exact share of the given keys.
    """
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad, q, k, v, out))
    lse, kind = lse.transpose(1, 2), _kind(q)
    if kind == "cpu":
        gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    elif kind == "flash":
        cum_q, cum_k, max_q, max_k, seed, offset = extra
        gradients = _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), cum_q, cum_k, max_q, max_k, 0.0, causal, seed, offset, scale=scale
        )
    else:
        gradients = _plain_backward(grad, q, k, v, out, lse, causal, scale)
    dq, dk, dv = (x.transpose(1, 2) for x in gradients)
    return dq, dk, dv


def _kind(q: Tensor) -> str:
    """Who computes it: cpu, flash (CUDA's kernels) or plain."""
    if q.device.type == "cpu":
        return "cpu"
    fits = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return "flash" if fits and torch.cuda.get_device_capability(q.device) >= (8, 0) else "plain"


def _repeated(k_bgtd: Tensor, q_bhsd: Tensor) -> Tensor:
    return k_bgtd.repeat_interleave(q_bhsd.shape[1] // k_bgtd.shape[1], dim=1)


def _query_chunks(q_bhsd: Tensor, k_bhtd: Tensor, causal: bool) -> list[tuple[slice, slice]]:
    """(queries, the keys that they may attend to): as many queries at a time as SCORE_ELEMENTS allow, one at least."""
    b, h, s, _ = q_bhsd.shape
    t = k_bhtd.shape[2]
    step = max(1, SCORE_ELEMENTS // max(1, b * h * t))
    chunks = [slice(start, min(start + step, s)) for start in range(0, s, step)]
    return [(chunk, slice(0, chunk.stop if causal else t)) for chunk in chunks]


def _scores(q_bhsd: Tensor, k_bhtd: Tensor, first: int | None, scale: float) -> Tensor:
    """scale · q kᵀ. first: the first query's place among the keys, where a query attends to none after its own."""
    score = scale * q_bhsd @ k_bhtd.transpose(-1, -2)
    if first is not None:
        hidden = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).triu(1 + first)
        score.masked_fill_(hidden, float("-inf"))
    return score


def _plain(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output [b, h, s, d] in q's format and log-sum-exp [b, h, s]."""
    exact = torch.promote_types(q.dtype, torch.float32)
    keys, values = (_repeated(x, q).to(exact) for x in (k, v))
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=exact, device=q.device)
    for rows, seen in _query_chunks(q, keys, causal):
        score = _scores(q[:, :, rows].to(exact), keys[:, :, seen], rows.start if causal else None, scale)
        lse[:, :, rows] = score.logsumexp(dim=-1)
        out[:, :, rows] = (score.sub_(lse[:, :, rows, None]).exp_() @ values[:, :, seen]).to(q.dtype)
    return out, lse


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    exact = torch.promote_types(q.dtype, torch.float32)
    keys, values = (_repeated(x, q).to(exact) for x in (k, v))
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
    for rows, seen in _query_chunks(q, keys, causal):
        queries, upstream, result = (x[:, :, rows].to(exact) for x in (q, grad, out))
        score = _scores(queries, keys[:, :, seen], rows.start if causal else None, scale)
        weight = score.sub_(lse[:, :, rows, None]).exp_()
        dv[:, :, seen] += weight.transpose(-1, -2) @ upstream
        slope = upstream @ values[:, :, seen].transpose(-1, -2)
        slope.sub_((upstream * result).sum(dim=-1, keepdim=True)).mul_(weight).mul_(scale)
        dq[:, :, rows] = (slope @ keys[:, :, seen]).to(q.dtype)
        dk[:, :, seen] += slope.transpose(-1, -2) @ queries
    dk, dv = (x.unflatten(1, (k.shape[1], -1)).sum(dim=2).to(q.dtype) for x in (dk, dv))
    return dq, dk, dv
