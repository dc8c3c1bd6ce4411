"""Log-probabilities, nuclei and draws over a split vocabulary, on real groups of 2 and 4 ranks, against one process."""

import math

import pytest
import torch
import torch.distributed as dist

from megatron_jq.parallel.logprob import linear_log_probs, vocab_parallel_log_probs
from megatron_jq.parallel.nucleus import nucleus_threshold
from megatron_jq.parallel.weighted_logprob import weighted_log_probs
from megatron_jq.rollout.sampling import sample_tokens
from tests.distributed.ranks import run_apart, run_ranks

TOKENS, HIDDEN = 13, 24
#: (tokens of the vocabulary, rows after padding). 96 rows on 4 ranks and 128 on 2 leave a rank with padding alone.
VOCABULARIES = [(70, 96), (40, 128), (96, 96)]
CHUNKS = (1, 5, 1000)
COLLECTIVES = tuple(
    name
    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "broadcast", "reduce")
    if hasattr(dist, name)
)


def problem(vocab: int, rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Sharp float32 logits with loud padding, targets in every part of the vocabulary, and a linear layer."""
    g = torch.Generator().manual_seed(seed + vocab)
    logits = 6 * torch.randn(TOKENS, rows, generator=g)
    logits[3] *= 50  # one token takes nearly everything
    logits[:, vocab:] = 1e4
    weight = torch.randn(rows, HIDDEN, generator=g)
    weight[vocab:] = 1e3
    return {
        "logits": logits,
        "targets": torch.cat([torch.tensor([0, vocab - 1]), torch.randint(vocab, (TOKENS - 2,), generator=g)]),
        "upstream": torch.randn(TOKENS, generator=g),
        "hidden": torch.randn(TOKENS, HIDDEN, generator=g),
        "weight": weight,
        "inverse_temperature": torch.where(torch.arange(TOKENS) % 3 == 0, 1.0, 1.4),
        "top_p": torch.where(torch.arange(TOKENS) % 2 == 0, 1.0, 0.9),
    }


class CountCollectives:
    """Counts calls of torch.distributed's collectives while entered."""

    def __enter__(self):
        self.count, self._saved = 0, {name: getattr(dist, name) for name in COLLECTIVES}
        for name, function in self._saved.items():
            setattr(dist, name, self._counting(function))
        return self

    def __exit__(self, *_):
        for name, function in self._saved.items():
            setattr(dist, name, function)

    def _counting(self, function):
        def counted(*args, **kwargs):
            self.count += 1
            return function(*args, **kwargs)

        return counted


def _on_a_rank(runtime):
    group = runtime.groups.tp
    results = {}
    for vocab, rows in VOCABULARIES:
        p = problem(vocab, rows)
        shard = slice(group.rank() * rows // group.size(), (group.rank() + 1) * rows // group.size())
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            logits = p["logits"][:, shard].to(dtype).requires_grad_()
            before = logits.detach().clone()
            log_p = vocab_parallel_log_probs(logits, p["targets"], group, vocab_size=vocab)
            log_p.backward(p["upstream"].to(log_p.dtype))
            assert torch.equal(logits.detach(), before), "the caller's logits were changed"
            results[vocab, "logits", dtype] = log_p.detach(), logits.grad
        for name, extra in SETTINGS.items():
            for chunk in chunks_of(name):
                hidden, weight = p["hidden"].clone().requires_grad_(), p["weight"][shard].clone().requires_grad_()
                with CountCollectives() as forward:
                    log_p = linear_log_probs(
                        hidden, weight, p["targets"], group, chunk_tokens=chunk, vocab_size=vocab,
                        **{f"{key}_T": p[key] for key in extra},
                    )  # fmt: skip
                with CountCollectives() as backward:
                    log_p.backward(p["upstream"])
                dist.all_reduce(hidden.grad, group=group)  # as the caller's mapping does
                counts = forward.count, backward.count
                results[vocab, name, chunk] = log_p.detach(), hidden.grad, weight.grad, counts
                if "top_p" not in extra:
                    results[vocab, f"{name}, weighted", chunk] = _weighted(p, extra, chunk, shard, vocab, group)
        results[vocab, "draws"] = _draws(p, vocab, shard, group)
    return results


def _weighted(p, extra, chunk, shard, vocab, group):
    """The training head, whose gradient forms forward; once more with the weight's gradient going to main_grad."""
    results = []
    for to_main_grad in (False, True):
        hidden, weight = p["hidden"].clone().requires_grad_(), p["weight"][shard].clone().requires_grad_()
        if to_main_grad:
            weight.main_grad = torch.ones_like(weight)
        with CountCollectives() as forward:
            total, log_p = weighted_log_probs(
                hidden, weight, p["targets"], p["upstream"].double(), group, chunk_tokens=chunk, vocab_size=vocab,
                **{f"{key}_T": p[key] for key in extra},
            )  # fmt: skip
        with CountCollectives() as backward:
            total.backward()
        assert not log_p.requires_grad
        assert math.isclose(total.item(), (p["upstream"].double() * log_p).sum().item(), rel_tol=1e-12)
        dist.all_reduce(hidden.grad, group=group)
        if to_main_grad:
            assert weight.grad is None and weight.grad_added_to_main_grad
        weight_grad = weight.main_grad - 1.0 if to_main_grad else weight.grad
        results.append((log_p, hidden.grad, weight_grad, (forward.count, backward.count)))
    return results


SETTINGS = {
    "plain": (),
    "temperature": ("inverse_temperature",),
    "nucleus": ("top_p",),
    "both": ("inverse_temperature", "top_p"),
}
DRAWS = [(0.0, 1.0), (1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (1.3, 0.95)]
UNIFORMS = 600


def chunks_of(setting: str) -> tuple[int, ...]:
    """A nucleus takes 32 all-reduces a chunk: fewer chunks there."""
    return CHUNKS[1:] if "top_p" in SETTINGS[setting] else CHUNKS


def draw_problem(p, vocab):
    """Many rows: the problem's rows again and again, ties among the largest, and uniforms at both ends of [0, 1)."""
    logits = p["logits"].repeat(UNIFORMS // TOKENS + 1, 1)[:UNIFORMS] / 3
    logits[:, vocab:] = -math.inf
    logits[5, :] = torch.where(torch.arange(logits.shape[1]) < vocab, 0.0, -math.inf)  # all alike
    logits[6, [1, vocab - 1]] = 1e3  # the same largest value on two shards
    uniform = torch.rand(UNIFORMS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    uniform[:20], uniform[20:40] = 0.0, 1.0 - 2.0**-53
    return logits, uniform


def _draws(p, vocab, shard, group):
    logits, uniform = draw_problem(p, vocab)
    drawn = [
        sample_tokens(logits[:, shard].contiguous(), uniform, temperature=t, top_p=top_p, group=group)
        for t, top_p in DRAWS
    ]
    thresholds = nucleus_threshold(logits[:, shard].contiguous(), torch.full((UNIFORMS,), 0.8), group)
    return drawn, thresholds


def _alone():
    """The same from torch's own log_softmax over the unpadded vocabulary, in float64."""
    expected = {}
    for vocab, rows in VOCABULARIES:
        p = problem(vocab, rows)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            logits = p["logits"][:, :vocab].to(dtype).double().requires_grad_()
            log_p = logits.log_softmax(-1).gather(-1, p["targets"][:, None]).squeeze(-1)
            log_p.backward(p["upstream"].double())
            expected[vocab, "logits", dtype] = log_p.detach(), logits.grad
        for name, extra in SETTINGS.items():
            hidden, weight = p["hidden"].double().requires_grad_(), p["weight"][:vocab].double().requires_grad_()
            logits = hidden @ weight.t()
            if "inverse_temperature" in extra:
                logits = logits * p["inverse_temperature"].double()[:, None]
            if "top_p" in extra:
                logits = _nucleus(logits, p["top_p"], p["targets"])
            log_p = logits.log_softmax(-1).gather(-1, p["targets"][:, None]).squeeze(-1)
            log_p.backward(p["upstream"].double())
            expected[vocab, name] = log_p.detach(), hidden.grad, weight.grad
        logits, uniform = draw_problem(p, vocab)
        drawn = [sample_tokens(logits, uniform, temperature=t, top_p=top_p, group=None) for t, top_p in DRAWS]
        expected[vocab, "draws"] = drawn, nucleus_threshold(logits, torch.full((UNIFORMS,), 0.8), None)
    return expected


def _nucleus(logits, top_p, targets):
    """Cut to the nucleus, enlarged to the target where it lies outside (a drawn token is always inside)."""
    ordered, index = logits.detach().softmax(-1).sort(-1, descending=True)
    cut = (ordered.cumsum(-1) - ordered) >= top_p.double()[:, None]
    outside = torch.zeros_like(cut).scatter(-1, index, cut)
    return logits.masked_fill(outside & (logits < logits.gather(-1, targets[:, None])), -math.inf)


@pytest.fixture(scope="module")
def alone():
    return run_apart(_alone)


@pytest.fixture(scope="module", params=[2, 4], ids="{}-ranks".format)
def split(request):
    return run_ranks(_on_a_rank, tp=request.param)


def together(split, key, place, rows, dim):
    """The ranks' shards of one result side by side, and the padding cut off, which must hold zeros."""
    whole = torch.cat([rank[key][place] for rank in split], dim=dim)
    vocab = key[0]
    assert whole.shape[dim] == rows and (whole.narrow(dim, vocab, rows - vocab) == 0).all(), "padding has a gradient"
    return whole.narrow(dim, 0, vocab).double()


def close(found, expected, tolerance):
    difference = (found.double() - expected).norm() / expected.norm()
    assert difference < tolerance, difference


@pytest.mark.parametrize(("vocab", "rows"), VOCABULARIES)
def test_log_probs_of_a_split_vocabulary_equal_log_softmax_of_the_whole(split, alone, vocab, rows):
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13), (torch.bfloat16, 1e-6)):
        key = vocab, "logits", dtype
        for rank in split:
            assert torch.equal(rank[key][0], split[0][key][0])
            close(rank[key][0], alone[key][0], tolerance)
            assert rank[key][1].dtype == dtype
        close(together(split, key, 1, rows, 1), alone[key][1], max(tolerance, torch.finfo(dtype).eps))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("vocab", "rows"), VOCABULARIES)
def test_linear_log_probs_equal_log_softmax_whatever_the_chunk(split, alone, vocab, rows, name):
    log_p, hidden_grad, weight_grad = alone[vocab, name]
    for chunk in chunks_of(name):
        key = vocab, name, chunk
        for rank in split:
            close(rank[key][0], log_p, 1e-6)
            close(rank[key][1], hidden_grad, 2e-6)
        close(together(split, key, 2, rows, 0), weight_grad, 2e-6)


@pytest.mark.parametrize("name", ["plain", "temperature"])
@pytest.mark.parametrize(("vocab", "rows"), VOCABULARIES)
def test_the_training_heads_gradient_is_log_softmaxs_whatever_the_chunk(split, alone, vocab, rows, name):
    log_p, hidden_grad, weight_grad = alone[vocab, name]
    for chunk in CHUNKS:
        for way in (0, 1):
            results = [rank[vocab, f"{name}, weighted", chunk][way] for rank in split]
            for found, found_hidden_grad, _, (forward, backward) in results:
                close(found, log_p, 1e-6)
                close(found_hidden_grad, hidden_grad, 2e-6)
                assert forward == math.ceil(TOKENS / chunk) and backward == 0
            whole = torch.cat([weight for _, _, weight, _ in results])
            assert (whole[vocab:] == 0).all()
            close(whole[:vocab], weight_grad, 2e-6)


def test_a_head_pass_costs_the_same_two_collectives_at_most_whatever_the_chunk_and_none_backward(split):
    counts = {rank[key][3] for rank in split for key in rank if key[1] in ("plain", "temperature")}
    assert len(counts) == 1, counts
    forward, backward = counts.pop()
    assert 1 <= forward <= 2 and backward == 0


@pytest.mark.parametrize(("vocab", "rows"), VOCABULARIES)
def test_draws_from_a_split_vocabulary_are_those_of_one_process(split, alone, vocab, rows):
    expected, threshold = alone[vocab, "draws"]
    for rank in split:
        found, found_threshold = rank[vocab, "draws"]
        assert torch.equal(found_threshold, threshold)
        for (ids, log_probs), (expected_ids, expected_log_probs) in zip(found, expected, strict=True):
            assert torch.equal(ids, expected_ids) and (ids < vocab).all()
            torch.testing.assert_close(log_probs, expected_log_probs, rtol=1e-12, atol=1e-12)
