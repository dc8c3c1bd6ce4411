"""The head's arithmetic in one process: values, gradients and the size of what it holds. Groups: tests/distributed."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_jq.parallel import nucleus
from megatron_jq.parallel.logprob import linear_log_probs, vocab_parallel_log_probs
from megatron_jq.parallel.nucleus import nucleus_threshold
from megatron_jq.parallel.vocabulary import mask_vocabulary_padding
from megatron_jq.parallel.weighted_logprob import weighted_log_probs

T, H, V, PADDED = 11, 6, 37, 48


@pytest.fixture
def layer():
    """(hidden, weight with loud padding rows, targets, upstream gradient), float64."""
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(PADDED, H, generator=g, dtype=torch.float64)
    weight[V:] = 50.0
    hidden = torch.randn(T, H, generator=g, dtype=torch.float64)
    return hidden, weight, torch.randint(V, (T,), generator=g), torch.randn(T, generator=g, dtype=torch.float64)


def test_vocab_parallel_log_probs_equal_log_softmax_in_value_and_gradient(layer):
    hidden, weight, targets, upstream = layer
    logits = (hidden @ weight.t()).requires_grad_()
    found = vocab_parallel_log_probs(logits, targets, None, vocab_size=V)
    expected = torch.log_softmax(logits[:, :V], dim=-1)[torch.arange(T), targets]
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    mine, theirs = (torch.autograd.grad(x, logits, upstream)[0] for x in (found, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("tempered", [False, True])
def test_linear_log_probs_pass_a_finite_difference_check(layer, chunk, tempered):
    hidden, weight, targets, _ = layer
    inverse = torch.where(torch.arange(T) % 2 == 0, 1.0, 1.5).double() if tempered else None

    def head(hidden, weight):
        return linear_log_probs(
            hidden, weight, targets, None, chunk_tokens=chunk, vocab_size=V, inverse_temperature_T=inverse
        )

    assert torch.autograd.gradcheck(head, (hidden.requires_grad_(), weight.requires_grad_()))
    scale = 1.0 if inverse is None else inverse[:, None]
    expected = torch.log_softmax(hidden @ weight[:V].t() * scale, dim=-1)[torch.arange(T), targets]
    torch.testing.assert_close(head(hidden, weight), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("tempered", [False, True])
def test_the_training_heads_sum_and_gradient_are_those_of_the_log_probs(layer, chunk, tempered):
    hidden, weight, targets, coefficients = layer
    inverse = torch.where(torch.arange(T) % 2 == 0, 1.0, 1.5).double() if tempered else None
    options = {"chunk_tokens": chunk, "vocab_size": V, "inverse_temperature_T": inverse}

    def head(hidden, weight):
        return weighted_log_probs(hidden, weight, targets, coefficients, None, **options)[0]

    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(head, (hidden, weight))
    total, log_prob = weighted_log_probs(hidden, weight, targets, coefficients, None, **options)
    expected = linear_log_probs(hidden, weight, targets, None, **options)
    torch.testing.assert_close(log_prob, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total, (coefficients * expected).sum(), rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(3 * total, (hidden, weight)),
        torch.autograd.grad(3 * (coefficients * expected).sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_the_training_head_adds_the_weights_gradient_to_main_grad(layer):
    hidden, weight, targets, coefficients = layer
    plain, fused = (weight.clone().requires_grad_() for _ in range(2))
    fused.main_grad = torch.full_like(fused, 0.25)
    for w in (plain, fused):
        weighted_log_probs(hidden, w, targets, coefficients, None, chunk_tokens=4, vocab_size=V)[0].backward()
    assert fused.grad is None and fused.grad_added_to_main_grad
    torch.testing.assert_close(fused.main_grad - 0.25, plain.grad, rtol=1e-12, atol=1e-12)


def test_no_tokens_give_no_log_probs_and_zero_gradients():
    nothing = torch.empty(0, dtype=torch.long)
    for training in (False, True):
        hidden, weight = torch.empty(0, H, requires_grad=True), torch.randn(PADDED, H, requires_grad=True)
        if training:
            total, found = weighted_log_probs(hidden, weight, nothing, torch.empty(0).double(), None, vocab_size=V)
        else:
            found = linear_log_probs(hidden, weight, nothing, None, vocab_size=V)
            total = found.sum()
        total.backward()
        assert total == 0 and found.shape == (0,) and hidden.grad.shape == (0, H) and (weight.grad == 0).all()


class _Largest(TorchDispatchMode):
    """Remembers the most elements that any tensor made while entered has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("training", [False, True])
def test_logits_exist_for_one_chunk_at_a_time_forward_and_backward(training):
    tokens, hidden_size, vocab, chunk = 256, 8, 2048, 16
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, requires_grad=True)
    with _Largest() as largest:
        if training:
            ones = torch.ones(tokens, dtype=torch.float64)
            total, _ = weighted_log_probs(hidden, weight, torch.arange(tokens), ones, None, chunk_tokens=chunk)
        else:
            total = linear_log_probs(hidden, weight, torch.arange(tokens), None, chunk_tokens=chunk).sum()
        total.backward()
    assert largest.elements == chunk * vocab  # the logits of all tokens would be 16 times that


def test_ln_p_of_minus_a_thousand_is_exact():
    logits = torch.zeros(1, 5)
    logits[0, 2] = -1000.0
    found = vocab_parallel_log_probs(logits, torch.tensor([2]), None)
    assert found.item() == pytest.approx(-1000.0 - math.log(4), rel=1e-7)


def test_padding_of_the_vocabulary_has_probability_zero():
    logits = mask_vocabulary_padding(torch.zeros(2, 8), None, 5)
    assert torch.isneginf(logits[:, 5:]).all() and (logits[:, :5] == 0).all()
    assert (mask_vocabulary_padding(torch.zeros(2, 8), None, None) == 0).all()


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_nucleus_threshold_is_the_least_likely_token_of_the_smallest_set_that_reaches_top_p(top_p):
    logits = 4 * torch.randn(200, 50, generator=torch.Generator().manual_seed(6))
    found = nucleus_threshold(logits, torch.full((200,), top_p), None)
    ordered, _ = logits.double().sort(dim=-1, descending=True)
    size = (ordered.softmax(dim=-1).cumsum(dim=-1) < top_p).sum(dim=-1)
    assert torch.equal(found.double(), ordered[torch.arange(200), size])


def test_nucleus_keeps_ties_together_and_everything_at_one():
    logits = torch.tensor([[2.0, 1.0, 1.0, -3.0], [2.0, 1.0, 1.0, -3.0], [-0.0, 0.0, -5.0, -5.0]])
    found = nucleus_threshold(logits, torch.tensor([0.6, 1.0, 0.9]), None)
    assert found.tolist() == [1.0, -math.inf, 0.0]


def test_nucleus_membership_is_a_constant_and_the_rest_is_renormalised(layer):
    hidden, weight, _, upstream = (x.float() if x.is_floating_point() else x for x in layer)
    hidden, weight = hidden.requires_grad_(), weight[:V].clone().requires_grad_()
    logits = hidden @ weight.t()
    top_p = torch.where(torch.arange(T) % 3 == 0, 1.0, 0.7)
    targets = logits.argsort(dim=-1, descending=True)[:, 0]
    cut = logits.masked_fill(logits < nucleus_threshold(logits.detach(), top_p, None)[:, None], -math.inf)
    assert torch.isneginf(cut).sum(dim=-1).gt(0).tolist() == (top_p < 1).tolist()
    expected = torch.log_softmax(cut, dim=-1)[torch.arange(T), targets]
    found = linear_log_probs(hidden, weight, targets, None, chunk_tokens=4, vocab_size=V, top_p_T=top_p)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(
        torch.autograd.grad(found, (hidden, weight), upstream),
        torch.autograd.grad(expected, (hidden, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [4, 7, 1000])
def test_only_tokens_that_have_a_nucleus_are_searched_and_nothing_else_changes(layer, monkeypatch, share, chunk):
    """Values and gradients equal those of a search over every token; the rows that were searched are counted."""
    hidden, weight, targets, upstream = (x.float() if x.is_floating_point() else x for x in layer)
    drawn = torch.arange(T) % 10 < 10 * share
    top_p, searched = torch.where(drawn, 0.7, 1.0), []

    def counting(logits, top_p_T, group):
        searched.append(len(logits))
        assert (top_p_T < 1).all()
        return nucleus_threshold(logits, top_p_T, group)

    def scored(h, w):
        return linear_log_probs(h, w, targets, None, chunk_tokens=chunk, vocab_size=V, top_p_T=top_p)

    monkeypatch.setattr(nucleus, "nucleus_threshold", counting)
    found = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    values = scored(*found)
    gradients = torch.autograd.grad(values, found, upstream)
    chunks = drawn.split(chunk)
    assert searched == [int(part.sum()) for part in chunks if part.any()]

    logits = (hidden @ weight.t())[:, :V]
    thresholds = torch.minimum(nucleus_threshold(logits, top_p, None), logits[torch.arange(T), targets])
    cut = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    masked = (cut[0] @ cut[1].t())[:, :V].masked_fill(drawn[:, None] & (logits < thresholds[:, None]), -math.inf)
    expected = masked.log_softmax(dim=-1)[torch.arange(T), targets]
    torch.testing.assert_close(values, expected)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, cut, upstream), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_drawn_token_stays_in_its_nucleus_where_rounding_would_drop_it():
    logits = torch.tensor([[3.0, 1.0, 0.0, -2.0]])
    found = linear_log_probs(torch.ones(1, 1), logits.t(), torch.tensor([1]), None, top_p_T=torch.tensor([0.5]))
    assert found.item() == pytest.approx(math.log(math.exp(1) / (math.exp(3) + math.exp(1))), rel=1e-6)
