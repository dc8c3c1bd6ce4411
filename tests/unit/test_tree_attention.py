"""Attention over trees equals attention over every branch's plain sequence, in value and in every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_jq.model import flash as flash_module
from megatron_jq.model.attention import CausalSegments
from megatron_jq.model.tree_attention import Tree, TreeSegments

CPU, D, SCALE = torch.device("cpu"), 8, 0.3
TREES = {
    "one": [Tree(7, (3, 5, 1))],
    "equal branches": [Tree(9, (4, 4, 4))],
    "several, ragged": [Tree(7, (3, 5, 1)), Tree(1, (2,)), Tree(12, (1, 9, 8, 2)), Tree(5)],
    "no branches": [Tree(6), Tree(6), Tree(2)],
    "empty branches": [Tree(4, (0, 3, 0)), Tree(3, (0,))],
    "empty trunk": [Tree(0, (2, 3)), Tree(4, (1, 1))],
    "sixteen": [Tree(20, tuple(range(1, 17)))],
}


def inputs(trees, heads, groups, dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    total = sum(tree.tokens for tree in trees)
    return [torch.randn(total, n, D, generator=g, dtype=dtype, requires_grad=True) for n in (heads, groups, groups)]


def rows(trees):
    """For every plain sequence (trunk and one branch, or a bare trunk): row indices of its tokens, and its own part."""
    trunk, branch, result = 0, sum(tree.trunk for tree in trees), []
    for tree in trees:
        stem = list(range(trunk, trunk + tree.trunk))
        result.append((stem, stem))
        for length in tree.branches:
            branch_positions = list(range(branch, branch + length))
            result.append((stem + branch_positions, branch_positions))
            branch += length
        trunk += tree.trunk
    return result


def one_by_one(trees, q, k, v):
    """Every sequence by itself, with an explicit mask; of its output the part that is its own."""
    out, per_group = torch.zeros_like(q), q.shape[1] // k.shape[1]
    for sequence, positions in rows(trees):
        if not positions:
            continue
        score = SCALE * torch.einsum("shd,thd->hst", q[sequence], k[sequence].repeat_interleave(per_group, 1))
        hidden = torch.ones(len(sequence), len(sequence), dtype=torch.bool).triu(1)
        weight = score.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        result = torch.einsum("hst,thd->shd", weight, v[sequence].repeat_interleave(per_group, 1))
        out = out.index_copy(0, torch.tensor(positions), result[-len(positions) :])
    return out


def assert_same(trees, heads, groups):
    q, k, v = inputs(trees, heads, groups)
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    actual, expected = TreeSegments(trees, CPU).attend(1, q, k, v, SCALE), one_by_one(trees, q, k, v)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    got, wanted = (torch.autograd.grad(x, (q, k, v), upstream) for x in (actual, expected))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("name", TREES)
def test_trees_equal_their_sequences(name, heads, groups):
    assert_same(TREES[name], heads, groups)


trees = st.lists(
    st.builds(Tree, st.integers(1, 40), st.lists(st.integers(0, 20), max_size=6).map(tuple)), min_size=1, max_size=4
)


@settings(max_examples=25, deadline=None)
@given(trees)
def test_random_trees_equal_their_sequences(trees):
    assert_same(trees, 4, 2)


def test_the_plain_kernel_equals_the_flash_one(monkeypatch):
    """What runs on CUDA in float32 and float64."""
    trees = TREES["several, ragged"]
    q, k, v = inputs(trees, 4, 2)

    def run():
        out = TreeSegments(trees, CPU).attend(1, q, k, v, SCALE)
        return [out, *torch.autograd.grad(out.sin().sum(), (q, k, v))]

    expected = run()
    monkeypatch.setattr(flash_module, "_kind", lambda tensor: "another device")
    for a, b in zip(run(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class _Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, list | tuple) else (result,):
            self.elements = max(self.elements, x.numel() if isinstance(x, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("heads", [4, 2], ids=["grouped", "each its own"])
@pytest.mark.parametrize("plan", ["trees", "segments"])
@pytest.mark.parametrize("elements", [1, 700, 1 << 25])
def test_plain_attention_holds_no_whole_matrix_of_scores_and_is_the_same(monkeypatch, plan, heads, elements):
    """Values and gradients in blocks of queries, from one query to all, are those of the flash kernel. What the kernels
    of a GPU do, this does not exercise.
    """
    tokens = 96
    q, k, v = inputs([Tree(tokens)], heads, 2)

    def run():
        trees = TreeSegments([Tree(tokens - 32, (20, 12))], CPU)
        actual = (trees if plan == "trees" else CausalSegments([tokens], CPU)).attend(1, q, k, v, SCALE)
        return [actual, *torch.autograd.grad(actual.sin().sum(), (q, k, v))]

    expected = run()
    monkeypatch.setattr(flash_module, "_kind", lambda tensor: "another device")
    monkeypatch.setattr(flash_module, "SCORE_ELEMENTS", elements, raising=False)
    with _Largest() as largest:
        actual = run()
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    allowed = max(elements, heads * tokens, heads * tokens * D)  # scores of one query; keys and values
    assert largest.elements <= allowed or elements > heads * tokens * tokens


def test_a_row_without_branches_is_plain_packed_attention():
    lengths = [9, 30, 1]
    q, k, v = inputs([Tree(n) for n in lengths], 4, 2)
    actual = TreeSegments([Tree(n) for n in lengths], CPU).attend(1, q, k, v, SCALE)
    torch.testing.assert_close(actual, CausalSegments(lengths, CPU).attend(1, q, k, v, SCALE), rtol=1e-12, atol=1e-12)


def test_masked_pairs_are_not_computed():
    shared = TreeSegments([Tree(512, (64,) * 16)], CPU).attended
    assert shared == 512 * 513 // 2 + 16 * 64 * 512 + 16 * 64 * 65 // 2
    assert shared < 0.32 * 16 * 576 * 577 // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_near_double(dtype):
    trees = TREES["several, ragged"]
    q, k, v = inputs(trees, 4, 2)
    expected = TreeSegments(trees, CPU).attend(1, q, k, v, SCALE)
    actual = TreeSegments(trees, CPU).attend(1, *(x.to(dtype) for x in (q, k, v)), SCALE)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 3e-2)
