"""The unsharded model that every layout is held against: plain torch, float64, one sequence at a time.

It shares no code with the package but the records. Weights come as {global name: whole tensor} in Megatron-core's
layout: linear_qkv rows are, a key/value group after another, its query heads, then its key, then its value; linear_fc1
holds the gate's rows, then the up projection's. Vocabulary padding does not exist here.
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_jq.architecture import Architecture
from megatron_jq.records import TrainingSequence

Weights = dict[str, Tensor]


def parameter_shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """Global name → shape of every parameter; a.vocab_size must be set."""
    heads, groups, d = a.num_attention_heads, a.num_query_groups, a.kv_channels
    shapes = {"embedding.word_embeddings.weight": (a.vocab_size, a.hidden_size)}
    for layer in range(a.num_layers):
        block = {
            "input_layernorm.weight": (a.hidden_size,),
            "self_attention.linear_qkv.weight": ((heads + 2 * groups) * d, a.hidden_size),
            "self_attention.linear_proj.weight": (a.hidden_size, heads * d),
            "pre_mlp_layernorm.weight": (a.hidden_size,),
        }
        width, blocks = a.ffn_hidden_size, ["mlp"]
        if a.num_experts is not None:
            width, blocks = a.moe_ffn_hidden_size, [f"mlp.experts.local_experts.{e}" for e in range(a.num_experts)]
            block["mlp.router.weight"] = (a.num_experts, a.hidden_size)
        for name in blocks:
            block[f"{name}.linear_fc1.weight"] = (2 * width, a.hidden_size)
            block[f"{name}.linear_fc2.weight"] = (a.hidden_size, width)
        if a.add_qkv_bias:
            block["self_attention.linear_qkv.bias"] = ((heads + 2 * groups) * d,)
        if a.qk_layernorm:
            block["self_attention.q_layernorm.weight"] = (d,)
            block["self_attention.k_layernorm.weight"] = (d,)
        shapes.update({f"decoder.layers.{layer}.{name}": shape for name, shape in block.items()})
    shapes["decoder.final_layernorm.weight"] = (a.hidden_size,)
    if not a.tie_embeddings:
        shapes["output_layer.weight"] = (a.vocab_size, a.hidden_size)
    return shapes


def noisy_weights(a: Architecture, *, scale: float = 0.2, embedding_scale: float = 0.35, seed: int = 7) -> Weights:
    """Float32 weights without a symmetric value anywhere: norm weights are off one, biases off zero."""
    weights = {}
    for name, shape in parameter_shapes(a).items():
        digest = hashlib.sha256(f"noise {seed} {name}".encode()).digest()
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:4], "big")))
        if name.endswith("layernorm.weight"):
            weights[name] = 1.0 + 0.3 * noise
        elif name.endswith(("word_embeddings.weight", "output_layer.weight")):
            weights[name] = embedding_scale * noise
        else:
            weights[name] = scale * noise
    return weights


def token_logits(
    weights: Weights, a: Architecture, ids: list[int] | tuple[int, ...], balance: list[Tensor] | None = None
) -> Tensor:
    """Logits [T, V] of the next token at every place of one sequence, in the weights' dtype.

    balance gets, for each layer with experts, E · sum of f_e · P_e: how unevenly the sequence visits them.
    """
    x = weights["embedding.word_embeddings.weight"][torch.tensor(ids)]
    for layer in range(a.num_layers):
        w = {
            name.removeprefix(f"decoder.layers.{layer}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"decoder.layers.{layer}.")
        }
        x = x + _attention(w, a, _rms_norm(x, w["input_layernorm.weight"], a.norm_epsilon))
        normed = _rms_norm(x, w["pre_mlp_layernorm.weight"], a.norm_epsilon)
        x = x + (_swiglu(w, "mlp", normed) if a.num_experts is None else _experts(w, a, normed, balance))
    x = _rms_norm(x, weights["decoder.final_layernorm.weight"], a.norm_epsilon)
    return x @ weights["embedding.word_embeddings.weight" if a.tie_embeddings else "output_layer.weight"].T


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + epsilon) * weight


def _swiglu(w: Weights, name: str, x: Tensor) -> Tensor:
    gate, up = (x @ w[f"{name}.linear_fc1.weight"].T).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up) @ w[f"{name}.linear_fc2.weight"].T


#: A choice of experts this close to another one could fall otherwise in float32: such rows make no test.
CLEAR_CHOICE = 1e-5


def _experts(w: Weights, a: Architecture, x: Tensor, balance: list[Tensor] | None) -> Tensor:
    """Every expert on every token, weighted; most weights are zero."""
    probability = (x @ w["mlp.router.weight"].T).softmax(dim=-1)
    k = a.moe_router_topk
    ordered, expert = probability.sort(dim=-1, descending=True)
    if k < a.num_experts:
        assert (ordered[:, k - 1] - ordered[:, k]).min() > CLEAR_CHOICE, "choose other weights: rounding decides here"
    visits = torch.zeros_like(probability).scatter(1, expert[:, :k], 1.0)
    weight = probability * visits
    if a.moe_norm_topk_prob:
        weight = weight / weight.sum(dim=-1, keepdim=True)
    if balance is not None:
        balance.append(a.num_experts * (visits.mean(dim=0) / k * probability.mean(dim=0)).sum())
    outputs = [_swiglu(w, f"mlp.experts.local_experts.{e}", x) for e in range(a.num_experts)]
    return sum(weight[:, e, None] * outputs[e] for e in range(a.num_experts))


def _attention(w: Weights, a: Architecture, x: Tensor) -> Tensor:
    per_group, d, T = a.num_attention_heads // a.num_query_groups, a.kv_channels, x.shape[0]
    qkv = x @ w["self_attention.linear_qkv.weight"].T
    if a.add_qkv_bias:
        qkv = qkv + w["self_attention.linear_qkv.bias"]
    qkv = qkv.view(T, a.num_query_groups, per_group + 2, d)
    heads = []
    for group in range(a.num_query_groups):
        key, value = qkv[:, group, per_group], qkv[:, group, per_group + 1]
        if a.qk_layernorm:
            key = _rms_norm(key, w["self_attention.k_layernorm.weight"], a.norm_epsilon)
        key = rotate(key, a.rotary_base)
        for head in range(per_group):
            query = qkv[:, group, head]
            if a.qk_layernorm:
                query = _rms_norm(query, w["self_attention.q_layernorm.weight"], a.norm_epsilon)
            score = rotate(query, a.rotary_base) @ key.T / math.sqrt(d)
            future = torch.ones(T, T, dtype=torch.bool).triu(1)
            heads.append(score.masked_fill(future, -torch.inf).softmax(dim=-1) @ value)
    return torch.cat(heads, dim=-1) @ w["self_attention.linear_proj.weight"].T


def rotate(x_Td: Tensor, base: float) -> Tensor:
    """Rotary positions 0..T-1: channels i and i + d/2 are a pair, turned by position · base^(-2i/d)."""
    T, d = x_Td.shape
    # Angles in float32, as the models that we are compatible with were trained: float64 would be another function.
    frequency = 1.0 / base ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
    angle = (torch.arange(T, dtype=torch.float32)[:, None] * frequency).to(x_Td.dtype)
    first, second = x_Td[:, : d // 2], x_Td[:, d // 2 :]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def tempered_log_probs(logits_TV: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """ln p of the sampling distribution: softmax(logits / temperature) cut to its nucleus and renormalised.

    The nucleus is the fewest most likely tokens whose mass reaches top_p; which tokens those are is a constant.
    """
    logits_TV = logits_TV / temperature
    if top_p < 1.0:
        ordered, index = logits_TV.detach().softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        mass_before = ordered.cumsum(dim=-1) - ordered
        outside = torch.zeros_like(ordered, dtype=torch.bool).scatter(-1, index, mass_before >= top_p)
        logits_TV = logits_TV.masked_fill(outside, -torch.inf)
    return F.log_softmax(logits_TV, dim=-1)


def score(
    weights: Weights,
    a: Architecture,
    sequence: TrainingSequence,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    tempered_answers: bool = False,
) -> tuple[Tensor, Tensor]:
    """(ln p(z|x) over the sampled tokens alone, ln p(y|x,z)). A gold answer was not sampled: it is not tempered."""
    ids = (*sequence.prompt_ids, *sequence.rationale_ids, *sequence.answer_ids)
    logits = token_logits(weights, a, ids)
    z, y = len(sequence.prompt_ids), len(sequence.prompt_ids) + len(sequence.rationale_ids)
    tempered = tempered_log_probs(logits, temperature, top_p)
    plain = F.log_softmax(logits, dim=-1)
    rationale = sum((tempered[t - 1, ids[t]] for t in range(z, z + sequence.num_sampled)), logits.new_zeros(()))
    of_answer = tempered if tempered_answers else plain
    return rationale, sum((of_answer[t - 1, ids[t]] for t in range(y, len(ids))), logits.new_zeros(()))


def garl(log_w: list[list[float | None]], q: float) -> tuple[list, list]:
    """Algorithm 1 on plain numbers: ((1/B)(1/M_b)(1/M_b^q)) × (c_m, w_m / w̄^q); None is a rationale that failed."""
    kept = [b for b, row in enumerate(log_w) if sum(x is not None for x in row) >= 2]
    rationale, answer = ([[0.0] * len(row) for row in log_w] for _ in range(2))
    for b in kept:
        w = {m: math.exp(x) for m, x in enumerate(log_w[b]) if x is not None}
        mean = sum(w.values()) / len(w)
        factor = 1.0 / (len(kept) * len(w) * len(w) ** q)
        for m in w:
            others = sum(value for j, value in w.items() if j != m) / (len(w) - 1)
            answer[b][m] = factor * w[m] / mean**q
            rationale[b][m] = factor * (w[m] / mean**q - others ** (1 - q))
    return rationale, answer


def paft(log_w: list[list[float | None]], q: float, uniform_BK: Tensor) -> list:
    """Algorithm 2 on plain numbers: (1/B)(1/K) × w̄^(1-q)/M_b^q × how often m was drawn by the given uniforms."""
    kept = [b for b, row in enumerate(log_w) if any(x is not None for x in row)]
    joint = [[0.0] * len(row) for row in log_w]
    for b in kept:
        w = [0.0 if x is None else math.exp(x) for x in log_w[b]]
        count = sum(x is not None for x in log_w[b])
        attenuation = (sum(w) / count) ** (1 - q) / count**q
        for u in uniform_BK[b].tolist():
            m = next(m for m in range(len(w)) if u * sum(w) < sum(w[: m + 1]))
            joint[b][m] += attenuation / (len(kept) * uniform_BK.shape[1])
    return joint


def surrogate_gradients(
    weights: Weights, a: Architecture, sequences: list[TrainingSequence], rationale, answer, **sampling: float
) -> tuple[float, Weights]:
    """Loss -sum(rationale · ln p(z|x) + answer · ln p(y|x,z)) and its gradient by every weight, in float64.

    rationale, answer: [B][M] numbers, denominators included.
    """
    leaves = {name: tensor.double().requires_grad_() for name, tensor in weights.items()}
    loss = torch.zeros((), dtype=torch.float64)
    for s in sequences:
        log_rationale, log_answer = score(leaves, a, s, **sampling)
        b, m = s.prompt_slot, s.rationale_slot
        loss = loss - rationale[b][m] * log_rationale - answer[b][m] * log_answer
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = zip(leaves.items(), gradients, strict=True)
    return loss.item(), {name: torch.zeros_like(w) if g is None else g for (name, w), g in found}


def norm_difference(found: Weights, expected: Weights) -> dict[str, float]:
    """|found - expected| / |expected| by name; 0 where both are zero, inf where the reference alone is."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    result = {}
    for name, reference in expected.items():
        gap, size = (found[name].double() - reference).norm().item(), reference.norm().item()
        result[name] = gap / size if size else (math.inf if gap else 0.0)
    return result
