"""Rollouts at every layout: greedy decoding with the cache against decoding without, sampled rationales against each
other, against the reference and against softmax, and the engine's ln p against the trainer's."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_jq.records import TrainingSequence
from megatron_jq.rollout.engine import RolloutRequest, SamplingOptions, share_of_replica
from megatron_jq.rollout.megatron import MegatronEngine
from megatron_jq.train.passes import BatchOptions, score, table_of_rollouts
from tests.distributed import generation, reference
from tests.distributed.cases import POLICIES, SMALL, build, build_options
from tests.distributed.ranks import run_apart, run_ranks

LAYOUTS = {
    "TP1": {},
    "TP2": {"tp": 2},
    "PP2": {"pp": 2},
    "TP2xPP2": {"tp": 2, "pp": 2},
    "DP2": {"dp": 2},
}
SAMPLE = SamplingOptions(
    rationale_budget=8, answer_budget=0, temperature=1.0, top_p=1.0, close_id=3, eos_id=4, seed=99, step=2
)


def weights_of(architecture):
    return reference.noisy_weights(architecture, embedding_scale=0.25)


def prompts(count: int, seed: int) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(70) for _ in range(rng.randint(1, 12))) for _ in range(count)]


# Greedy: cached = not cached

#: Ragged prompts, one token and upwards, with differing numbers of rationales.
GREEDY_REQUESTS = [
    RolloutRequest(b, ids, ((0, 1, 2), (4,), (1, 3))[b % 3], gold_ids=(7, 8, 9, 69)[: b % 4 + 1])
    for b, ids in enumerate(prompts(7, seed=41))
]


def _greedy_cases():
    """[(policy, requests, options, most rows at a time, expected rollouts)]; the close and end ids are chosen so that
    every way to end occurs.
    """
    cases = []
    for name, architecture in POLICIES.items():
        weights = weights_of(architecture)
        free = SamplingOptions(9, 0, 0.0, 1.0, close_id=-1, eos_id=-1, seed=0, step=0)
        traces = [r.rationale_ids[:-1] for r in generation.generate(weights, architecture, GREEDY_REQUESTS, free)]
        pairs = [(c, e) for c in set(sum(traces, ())) for e in set(sum(traces, ())) if c != e]
        for close, eos in sorted(pairs, key=lambda pair: min(_endings(traces, *pair)), reverse=True):
            options = replace(free, answer_budget=4, close_id=close, eos_id=eos)
            expected = generation.generate(weights, architecture, GREEDY_REQUESTS, options)
            lengths = {r.num_sampled for r in expected}, {len(r.answer_ids) for r in expected}
            if min(_endings([r.rationale_ids for r in expected], close, eos)) and min(map(len, lengths)) > 1:
                break
        else:
            raise AssertionError("no close and end ids give every way to end; choose another seed")
        cases += [(name, GREEDY_REQUESTS, options, max_rows, expected) for max_rows in (None, 4)]
    long = replace(free, rationale_budget=70, close_id=68, eos_id=69)  # beyond the cache's first room of 64
    few = GREEDY_REQUESTS[:3]
    expected = generation.generate(weights_of(SMALL), SMALL, few, long)
    assert max(r.num_sampled for r in expected) == 70
    return [*cases, ("tied, qk norm", few, long, None, expected)]


def _endings(rationales, close: int, eos: int) -> list[int]:
    """How many close themselves, how many end the text (or are cut there by force), how many spend their budget."""
    first = [next((token for token in z[:9] if token in (close, eos)), None) for z in rationales]
    return [first.count(close), first.count(eos), first.count(None)]


def _decode(runtime, cases, sequence_parallel):
    results = []
    for name, requests, options, max_rows, _ in cases:
        architecture = POLICIES[name]
        settings = build_options(architecture, sequence_parallel=sequence_parallel)
        policy, _ = build(runtime, architecture, weights_of(architecture), settings)
        results.append(MegatronEngine([policy], runtime, max_rows=max_rows).generate(requests, options))
    return results


@pytest.fixture(scope="module")
def greedy_cases():
    return run_apart(_greedy_cases)


@pytest.mark.parametrize(
    ("tp", "pp", "sequence_parallel"),
    [(1, 1, False), (2, 1, False), (2, 1, True), (1, 2, False), (2, 2, False), (2, 2, True)],
)
def test_greedy_decoding_with_the_cache_equals_decoding_without(greedy_cases, tp, pp, sequence_parallel):
    for rank in run_ranks(_decode, greedy_cases, sequence_parallel, tp=tp, pp=pp):
        for (*_, expected), found in zip(greedy_cases, rank, strict=True):
            tokens = [[replace(r, log_prob=0.0, log_w=0.0) for r in rollouts] for rollouts in (found, expected)]
            assert tokens[0] == tokens[1]
            for figure in ("log_prob", "log_w"):
                wanted = [getattr(r, figure) for r in expected]
                assert [getattr(r, figure) for r in found] == pytest.approx(wanted, abs=1e-4), figure


# Sampling: one rationale a slot, wherever it is drawn

PROMPTS, RATIONALES, GOLD = 26, 8, (5, 6, 69)  # 208 rationales
TEMPERED = replace(SAMPLE, temperature=0.8, top_p=0.9, step=3)


def _sample(runtime):
    """{options: ({slot: rollout}, the trainer's scores, the rollouts' own)}, and the draws in waves."""
    policy, model = build(runtime, SMALL, weights_of(SMALL), build_options(SMALL, head_chunk_tokens=512))
    x, dp = prompts(PROMPTS, seed=43), runtime.groups.dp
    share = share_of_replica(PROMPTS, RATIONALES, dp.rank(), dp.size())
    requests = [RolloutRequest(b, x[b], slots, GOLD) for b, slots in share]
    results = {}
    for options in (SAMPLE, TEMPERED):
        rollouts = MegatronEngine([policy], runtime).generate(requests, options)
        rows = [
            TrainingSequence(r.prompt_slot, r.rationale_slot, x[r.prompt_slot], r.rationale_ids, r.num_sampled, GOLD)
            for r in rollouts
        ]
        batch = BatchOptions(micro_batch_size=64, temperature=options.temperature, top_p=options.top_p)
        shape = (PROMPTS, RATIONALES)
        scores = score(model, rows, shape, runtime, batch, with_rationale=True)
        carried = table_of_rollouts(rollouts, shape, runtime)
        results[options] = by_slot(rollouts), scores, carried
    waves = MegatronEngine([policy], runtime, max_rows=60).generate(requests, SAMPLE)
    return results, by_slot(waves)


def by_slot(rollouts):
    return {(r.prompt_slot, r.rationale_slot): r for r in rollouts}


def _expected_samples():
    """The reference's rollouts of the first ten prompts."""
    some = list(enumerate(prompts(PROMPTS, seed=43)))[:10]
    requests = [RolloutRequest(b, ids, tuple(range(RATIONALES))) for b, ids in some]
    return {
        options: by_slot(generation.generate(weights_of(SMALL), SMALL, requests, options))
        for options in (SAMPLE, TEMPERED)
    }


@pytest.fixture(scope="module")
def samples():
    """{layout: results by rank}"""
    return {name: run_ranks(_sample, **layout) for name, layout in LAYOUTS.items()}


@pytest.fixture(scope="module")
def expected_samples():
    return run_apart(_expected_samples)


def drawn(ranks, options):
    """{slot: rollout} of all replicas together; asserts that ranks of one replica report the same."""
    together = {}
    for results, _ in ranks:
        for slot, rollout in results[options][0].items():
            assert together.setdefault(slot, rollout) == rollout
    assert len(together) == PROMPTS * RATIONALES
    return together


def agreement(found, expected) -> float:
    same = sum(found[slot].rationale_ids == rollout.rationale_ids for slot, rollout in expected.items())
    return same / len(expected)


@pytest.mark.parametrize("options", [SAMPLE, TEMPERED], ids=["plain", "tempered"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rationales_are_those_of_one_process_and_of_the_reference(samples, expected_samples, layout, options):
    found, alone = drawn(samples[layout], options), drawn(samples["TP1"], options)
    shares = agreement(found, alone), agreement(found, expected_samples[options])
    print(f"{layout}: {shares[0]:.1%} as at TP1, {shares[1]:.1%} as the reference")
    assert min(shares) >= 0.99, shares
    assert len({r.rationale_ids for r in found.values()}) > 150  # the draws differ from each other
    assert 0 < sum(r.forced for r in found.values()) < len(found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rationales_do_not_depend_on_the_wave_they_are_drawn_in(samples, layout):
    for results, waves in samples[layout]:
        assert agreement(waves, results[SAMPLE][0]) >= 0.99


@pytest.mark.parametrize("options", [SAMPLE, TEMPERED], ids=["plain", "tempered"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rollouts_ln_p_and_ln_w_are_the_trainers(samples, layout, options):
    found = drawn(samples[layout], options)
    for results, _ in samples[layout]:
        _, scores, carried = results[options]
        assert scores.table.valid_BM.all() and carried.table.valid_BM.all()
        rationale_gap = max(abs(r.log_prob - scores.table.log_z_BM[slot].item()) for slot, r in found.items())
        answer_gap = max(abs(r.log_w - scores.table.log_w_BM[slot].item()) for slot, r in found.items())
        assert rationale_gap < 1e-4 and answer_gap < 1e-4
        torch.testing.assert_close(carried.table.log_w_BM, scores.table.log_w_BM, rtol=0, atol=1e-4)
        assert len({round(x, 6) for x in scores.table.log_z_BM.flatten().tolist()}) > 150
    print(f"{layout}: ln p(z|x) within {rationale_gap:.1e}, ln w within {answer_gap:.1e}")


# Frequencies

DRAWS = 4000
FREQUENCIES = [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (0.7, 0.8)]


def _first_tokens(runtime):
    policy, _ = build(runtime, SMALL, weights_of(SMALL), build_options(SMALL))
    request = RolloutRequest(0, prompts(1, seed=47)[0], tuple(range(DRAWS)))
    results = []
    for temperature, top_p in FREQUENCIES:
        options = replace(SAMPLE, rationale_budget=1, temperature=temperature, top_p=top_p)
        rollouts = MegatronEngine([policy], runtime).generate([request], options)
        results.append([r.rationale_ids[0] for r in rollouts])
    return results


def _first_token_distributions():
    ids = prompts(1, seed=47)[0]
    return [generation.draws(weights_of(SMALL), SMALL, ids, *setting) for setting in FREQUENCIES]


@pytest.mark.parametrize("tp", [1, 2])
def test_first_tokens_follow_softmax_with_temperature_and_nucleus(tp):
    distributions = run_apart(_first_token_distributions)
    for rank in run_ranks(_first_tokens, tp=tp):
        for (temperature, top_p), tokens, p in zip(FREQUENCIES, rank, distributions, strict=True):
            counts = torch.bincount(torch.tensor(tokens), minlength=70).tolist()
            deviation, outside = generation.chi_square(counts, p)
            support = sum(x > 0 for x in p)
            print(f"temperature {temperature} top-p {top_p}: chi-square {deviation:+.1f} deviations, {support} tokens")
            assert outside == 0 and abs(deviation) < 3.5
            assert 4 <= support <= 70 and (support < 70) == (top_p < 1)


# Memory

#: Prompts of one length: nothing is padded.
EQUAL_REQUESTS = [replace(r, prompt_ids=(r.prompt_ids * 9)[:9]) for r in GREEDY_REQUESTS]


def _cache_bytes(runtime):
    """The most keys and values at a time, of rationales that use their room of 64 tokens to the last."""
    policy, _ = build(runtime, SMALL, weights_of(SMALL), build_options(SMALL))
    engine = MegatronEngine([policy], runtime)
    options = replace(SAMPLE, rationale_budget=65, close_id=-1, eos_id=-1)  # the last token is drawn, never fed
    engine.generate([replace(r, gold_ids=None) for r in EQUAL_REQUESTS], options)
    return engine.cache_bytes_peak


@pytest.mark.parametrize("layout", ["TP1", "TP2", "PP2"])
def test_the_cache_holds_a_prompt_once_for_all_its_rationales(layout):
    prompt_tokens = 9 * len(EQUAL_REQUESTS)
    rationale_tokens = 64 * sum(len(r.rationale_slots) for r in EQUAL_REQUESTS)
    vector = 2 * 4 * SMALL.num_query_groups * SMALL.kv_channels  # key and value of a token in a layer, float32
    whole = SMALL.num_layers * vector * (prompt_tokens + rationale_tokens)
    ranks = run_ranks(_cache_bytes, **LAYOUTS[layout])
    assert ranks == [whole // len(ranks)] * len(ranks)


# Overhead


class _Work(TorchDispatchMode):
    """Counts messages, waits of the host for a result, and matrix products while entered."""

    KINDS = {"aten::bmm": "attention", "aten::mm": "weights", "aten::_local_scalar_dense": "waits"}

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func._schema.name.split("::")
        self.counts[name.strip("_") if namespace == "c10d" else self.KINDS.get(func._schema.name)] += 1
        return func(*args, **(kwargs or {}))


def _work_per_token(runtime):
    """What one token more of every rationale adds, where eleven prompts have eleven lengths."""
    policy, _ = build(runtime, SMALL, weights_of(SMALL), build_options(SMALL))
    requests = [RolloutRequest(b, tuple(range(10 + b)), tuple(range(1 + b % 3))) for b in range(11)]

    def work(budget: int) -> Counter:
        options = replace(SAMPLE, rationale_budget=budget, close_id=-1, eos_id=-1)
        with _Work() as mode, pytest.MonkeyPatch.context() as patch:
            to_list = torch.Tensor.tolist
            patch.setattr(torch.Tensor, "tolist", lambda x: mode.counts.update(["waits"]) or to_list(x))
            MegatronEngine([policy], runtime).generate(requests, options)
        del mode.counts[None]
        return mode.counts

    return dict(work(9) - work(8))


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("TP1", [{"weights": 9}]),
        ("TP2", [{"weights": 9, "allreduce": 6, "allgather": 1}] * 2),
        ("PP2", [{"weights": 4, "send": 1, "broadcast": 1}, {"weights": 5, "recv": 1, "broadcast": 1}]),
    ],
)
def test_a_token_costs_one_wait_few_messages_and_four_products_a_layer_in_attention(layout, expected):
    # weights: four a layer and the head's. all-reduces: two a layer, the embedding's, the draw's.
    attention = 4 * SMALL.num_layers // LAYOUTS[layout].get("pp", 1)
    found = run_ranks(_work_per_token, **LAYOUTS[layout])
    assert found == [{**rank, "waits": 1, "attention": attention} for rank in expected]
