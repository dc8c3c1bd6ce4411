"""F3: one flash attention with its log-sum-exp, forward and backward, behind one interface for CPU and CUDA.

torch's public scaled_dot_product_attention does not hand out the log-sum-exp; the operators under it do. bfloat16 and
float16 on CUDA use the flash kernels; what these lack (other formats, heads whose width is no multiple of 8 or above
256, GPUs before Ampere) is computed plainly.

q [b, s, h, d]; k, v [b, t, g, d], h a multiple of g; lse [b, s, h] in float32 at least, nats.
"""

import torch
from torch import Tensor

_aten = torch.ops.aten


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
    score = _scores(q, k, causal, scale)
    lse = score.logsumexp(dim=-1)
    out = ((score - lse[..., None]).exp() @ _repeated(v, q).to(score.dtype)).to(q.dtype)
    return out.transpose(1, 2), lse.transpose(1, 2), ()


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, extra: tuple, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. out and lse may be those of a softmax over more keys than k: then these are this part's
    exact share of it.
    """
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad, q, k, v, out))
    lse, kind = lse.transpose(1, 2), _kind(q)
    if kind == "cpu":
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    elif kind == "flash":
        cum_q, cum_k, max_q, max_k, seed, offset = extra
        found = _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), cum_q, cum_k, max_q, max_k, 0.0, causal, seed, offset, scale=scale
        )
    else:
        weight = (_scores(q, k, causal, scale) - lse[..., None]).exp()
        grad, out, values, keys = (x.to(weight.dtype) for x in (grad, out, _repeated(v, q), _repeated(k, q)))
        slope = weight * (grad @ values.transpose(-1, -2) - (grad * out).sum(dim=-1, keepdim=True)) * scale
        groups = (k.shape[1], -1)
        found = (
            (slope @ keys).to(q.dtype),
            (slope.transpose(-1, -2) @ q.to(slope.dtype)).unflatten(1, groups).sum(dim=2).to(q.dtype),
            (weight.transpose(-1, -2) @ grad).unflatten(1, groups).sum(dim=2).to(q.dtype),
        )
    dq, dk, dv = (x.transpose(1, 2) for x in found)
    return dq, dk, dv


def _kind(q: Tensor) -> str:
    """Who computes it: cpu, flash (CUDA's kernels) or plain."""
    if q.device.type == "cpu":
        return "cpu"
    fits = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return "flash" if fits and torch.cuda.get_device_capability(q.device) >= (8, 0) else "plain"


def _repeated(k_bgtd: Tensor, q_bhsd: Tensor) -> Tensor:
    return k_bgtd.repeat_interleave(q_bhsd.shape[1] // k_bgtd.shape[1], dim=1)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    exact = torch.promote_types(q.dtype, torch.float32)
    score = scale * q.to(exact) @ _repeated(k, q).to(exact).transpose(-1, -2)
    if causal:
        hidden = torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        score = score.masked_fill(hidden, float("-inf"))
    return score
