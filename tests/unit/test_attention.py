"""Packed attention equals attention segment by segment, in value and gradient."""

import random

import pytest
import torch

from megatron_jq.model.attention import FILL, CausalSegments

CPU, D, SCALE = torch.device("cpu"), 8, 0.3
LENGTHS = {
    "ragged": [1, 17, 16, 3, 40, 2, 12, 13, 1],
    "equal": [9, 9, 9],
    "one": [25],
    "padding last": [30, 29, 4],
    "two lengths": [8, 6, 8, 6],
    "random": random.Random(8).choices(range(1, 60), k=25),
}


def inputs(lengths, heads, groups, dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    total = sum(lengths)
    return [torch.randn(total, n, D, generator=g, dtype=dtype, requires_grad=True) for n in (heads, groups, groups)]


def segment_by_segment(lengths, q, k, v):
    """softmax(scale · q kᵀ + causal mask) v, one segment and one head at a time."""
    outputs, start, per_group = [], 0, q.shape[1] // k.shape[1]
    for length in lengths:
        segment = slice(start, start + length)
        heads = []
        for head in range(q.shape[1]):
            score = SCALE * q[segment, head] @ k[segment, head // per_group].t()
            score = score.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
            heads.append(score.softmax(dim=-1) @ v[segment, head // per_group])
        outputs.append(torch.stack(heads, dim=1))
        start += length
    return torch.cat(outputs)


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("name", LENGTHS)
def test_packed_attention_equals_attention_segment_by_segment(name, heads, groups):
    lengths, (q, k, v) = LENGTHS[name], inputs(LENGTHS[name], heads, groups)
    upstream = torch.randn(sum(lengths), heads, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    actual = CausalSegments(lengths, CPU).attend(1, q, k, v, SCALE)
    expected = segment_by_segment(lengths, q, k, v)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    got, wanted = (torch.autograd.grad(x, (q, k, v), upstream) for x in (actual, expected))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_segment_sees_nothing_of_its_neighbours():
    lengths = LENGTHS["ragged"]
    q, k, v = inputs(lengths, 4, 2)
    start = sum(lengths[:4])
    middle = slice(start, start + lengths[4])
    plan = CausalSegments(lengths, CPU)
    before = plan.attend(1, q, k, v, SCALE)
    changed = [torch.where(_inside(x, middle), x, torch.full_like(x, float("nan"))) for x in (q, k, v)]
    torch.testing.assert_close(plan.attend(1, *changed, SCALE)[middle], before[middle], rtol=0, atol=0)


def _inside(x, place):
    mask = torch.zeros(len(x), 1, 1, dtype=torch.bool)
    mask[place] = True
    return mask.expand_as(x)


def test_buckets_bound_the_padded_work():
    lengths = LENGTHS["random"]
    plan = CausalSegments(lengths, CPU)
    assert sorted(plan.place_T.tolist()) == sorted(set(plan.place_T.tolist())) and len(plan.place_T) == sum(lengths)
    work = sum(b.token_nS.shape[0] * b.token_nS.shape[1] ** 2 for b in plan.buckets)
    assert work <= sum(n * n for n in lengths) / FILL**2
