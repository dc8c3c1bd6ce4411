"""Draws are a function of (seed, step, prompt, rationale, draw number), and follow the distribution they report."""

import math

import pytest
import torch

from megatron_jq.rollout import sampling
from megatron_jq.rollout.sampling import UniformStream, sample_tokens

V = 23


def uniforms(count: int) -> torch.Tensor:
    """One draw from each of `count` streams, as a batch of rationales has."""
    return torch.tensor([UniformStream(7, 3, i // 16, i % 16).at(0) for i in range(count)], dtype=torch.float64)


def test_a_stream_is_fixed_by_its_key_and_the_draws_number():
    stream, other = UniformStream(1, 2, 3, 4), UniformStream(1, 2, 3, 4)
    late = [stream.at(i) for i in (200, 0, 63, 64)]
    assert late == [other.at(i) for i in (200, 0, 63, 64)]
    keys = [(1, 2, 3, 4), (2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5), (4, 3, 2, 1)]
    assert len({UniformStream(*key).at(0) for key in keys}) == len(keys)
    assert all(0.0 <= stream.at(i) < 1.0 for i in range(300))


def test_streams_of_neighbouring_rationales_are_uniform_and_uncorrelated():
    table = torch.tensor([[UniformStream(0, s, 0, m).at(d) for d in range(4)] for s in range(40) for m in range(40)])
    assert table.mean(dim=0).sub(0.5).abs().max() < 4 / math.sqrt(12 * 1600)
    correlation = torch.corrcoef(table.t()) - torch.eye(4)
    neighbours = torch.corrcoef(torch.stack([table[:-1, 0], table[1:, 0]]))[0, 1]
    assert correlation.abs().max() < 4 / 40 and neighbours.abs() < 4 / 40


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7), (1.5, 0.9)])
def test_frequencies_and_reported_ln_p_are_those_of_the_tempered_nucleus(temperature, top_p):
    logits = torch.randn(V, generator=torch.Generator().manual_seed(9))
    p = (logits.double() / temperature).softmax(dim=-1)
    ordered, index = p.sort(descending=True)
    inside = torch.zeros(V, dtype=torch.bool)
    inside[index[(ordered.cumsum(0) - ordered) < top_p]] = True
    p = torch.where(inside, p, 0.0) / p[inside].sum()
    assert inside.all() == (top_p == 1.0) and inside.sum() > 5

    count = 8000
    ids, log_probs = sample_tokens(
        logits.expand(count, V), uniforms(count), temperature=temperature, top_p=top_p, group=None
    )
    torch.testing.assert_close(log_probs, p[ids].log(), rtol=1e-6, atol=1e-6)
    counts, expected = torch.bincount(ids, minlength=V).double(), count * p
    assert (counts[~inside] == 0).all()
    large = expected >= 5
    statistic = ((counts - expected)[large] ** 2 / expected[large]).sum().item()
    degrees = int(large.sum()) - 1
    assert abs(statistic - degrees) < 4 * math.sqrt(2 * degrees), (statistic, degrees)


def test_a_draw_inverts_the_cumulative_distribution():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().expand(6, 4)
    uniform = torch.tensor([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.9999], dtype=torch.float64)
    ids, _ = sample_tokens(logits, uniform, temperature=1.0, top_p=1.0, group=None)
    assert ids.tolist() == [0, 0, 1, 1, 2, 3]


def test_a_token_without_probability_is_never_drawn_even_at_the_ends():
    logits = torch.full((3, 6), -math.inf)
    logits[:, 2:4] = 0.0
    uniform = torch.tensor([0.0, 0.5, 1.0 - 2.0**-53], dtype=torch.float64)
    ids, log_probs = sample_tokens(logits, uniform, temperature=1.0, top_p=1.0, group=None)
    assert ids.tolist() == [2, 3, 3] and log_probs.tolist() == pytest.approx([-math.log(2)] * 3)


def test_temperature_zero_takes_the_largest_logit_and_the_lowest_id_among_equals():
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [5.0, 3.0, 1.0, 2.0]])
    ids, log_probs = sample_tokens(logits, torch.tensor([0.99, 0.99]).double(), temperature=0.0, top_p=0.5, group=None)
    assert ids.tolist() == [1, 0]
    torch.testing.assert_close(log_probs, logits.double().log_softmax(-1)[[0, 1], ids])


def test_rows_taken_in_parts_draw_the_same(monkeypatch):
    logits, uniform = torch.randn(50, V, generator=torch.Generator().manual_seed(4)), uniforms(50)
    at_once = sample_tokens(logits, uniform, temperature=0.9, top_p=0.9, group=None)
    monkeypatch.setattr(sampling, "_WORKSPACE_ELEMENTS", 3 * V)
    parts = sample_tokens(logits, uniform, temperature=0.9, top_p=0.9, group=None)
    assert torch.equal(at_once[0], parts[0]) and torch.equal(at_once[1], parts[1])


def test_no_rows_draw_nothing():
    ids, log_probs = sample_tokens(torch.empty(0, V), uniforms(0), temperature=1.0, top_p=1.0, group=None)
    assert ids.shape == log_probs.shape == (0,) and ids.dtype == torch.long
