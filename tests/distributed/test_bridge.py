"""What a template puts between the close token and the answer is context: given, without weight, never drawn."""

import itertools
from dataclasses import replace

import pytest
import torch

from megatron_jq.architecture import Architecture
from megatron_jq.records import Example, TrainingSequence
from megatron_jq.rollout.engine import SamplingOptions, request_for, share_of_replica
from megatron_jq.rollout.megatron import MegatronEngine
from megatron_jq.train.passes import BatchOptions, score, table_of_rollouts
from tests.distributed import generation, reference
from tests.distributed.cases import SMALL, build, build_options
from tests.distributed.ranks import run_apart, run_ranks

# P by enumeration: 6 tokens, rationales of at most 2 of them

TINY = Architecture(
    num_layers=1, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, num_query_groups=1, kv_channels=8,
    max_position_embeddings=64, qk_layernorm=True, tie_embeddings=True, vocab_size=6,
)  # fmt: skip
CLOSE, END, BUDGET = 4, 5, 2
EXAMPLE = Example(0, "", "", (0, 3), (2, 1, END), bridge_ids=(1, CLOSE, 0))


def _rationales() -> list[tuple[tuple[int, ...], int]]:
    """Every z of at most BUDGET sampled tokens, its close token included, and how many of them were sampled."""
    found = []
    for length in range(1, BUDGET + 1):
        for z in itertools.product(range(TINY.vocab_size), repeat=length):
            if {CLOSE, END} & set(z[:-1]) or (length < BUDGET and z[-1] not in (CLOSE, END)):
                continue
            found.append((z if z[-1] == CLOSE else (*z, CLOSE), length))
    return found


def _scores(runtime, examples: list[Example]):
    """[(ln p(z|x), ln p(y*|x,z)) of every z] for each example, by the trainer's pass."""
    _, model = build(runtime, TINY, reference.noisy_weights(TINY), build_options(TINY))
    results = []
    for example in examples:
        rows = [
            TrainingSequence(0, m, example.prompt_ids, example.joined(z), num_sampled, example.answer_ids)
            for m, (z, num_sampled) in enumerate(_rationales())
        ]
        shape = (1, len(rows))
        scores = score(model, rows, shape, runtime, BatchOptions(16), with_rationale=True)
        results.append((scores.table.log_z_BM[0], scores.table.log_w_BM[0]))
    return results


def _p_by_hand(example: Example) -> float:
    """Σ_z p(z|x) p(y*|x, z, bridge), token by token, from logits of plain torch."""
    weights = {name: w.double() for name, w in reference.noisy_weights(TINY).items()}

    def p_of(token: int, context: tuple[int, ...]) -> float:
        return reference.token_logits(weights, TINY, context)[-1].softmax(-1)[token].item()

    def p_of_all(tokens: tuple[int, ...], context: tuple[int, ...]) -> float:
        product = 1.0
        for number, token in enumerate(tokens):
            product *= p_of(token, context + tokens[:number])
        return product

    x, total = example.prompt_ids, 0.0
    for z, num_sampled in _rationales():
        context = (*x, *z, *example.bridge_ids)
        total += p_of_all(z[:num_sampled], x) * p_of_all(example.answer_ids, context)
    return total


def test_p_is_the_sum_over_all_rationales_with_the_bridge_as_context():
    without = replace(EXAMPLE, bridge_ids=())
    one_token = [replace(EXAMPLE, answer_ids=(token,)) for token in range(TINY.vocab_size)]
    found = run_ranks(_scores, [EXAMPLE, without, *one_token])[0]
    p = [(log_z + log_y).exp().sum().item() for log_z, log_y in found]
    assert p[:2] == pytest.approx([run_apart(_p_by_hand, e) for e in (EXAMPLE, without)], rel=1e-5)
    assert p[0] / p[1] > 1.2 or p[1] / p[0] > 1.2, "the bridge changes nothing here: choose another one"
    # Nothing but z is in p(z|x), and nothing but y* in p(y*|x,z): each sums to 1.
    assert all(log_z.exp().sum().item() == pytest.approx(1.0, abs=1e-5) for log_z, _ in found)
    assert sum(p[2:]) == pytest.approx(1.0, abs=1e-5)


# The engine: what it feeds, what it draws behind it, and what it scores

BRIDGES = ((), (9,), (3, 17, 4))  # the last holds the close and end ids, which end nothing there
EXAMPLES = [
    Example(b, "", "", tuple(range(5 + b, 9 + 3 * b)), (11, 12 + b, 13, 2)[b % 4 :], bridge_ids=BRIDGES[b % 3])
    for b in range(6)
]
OPTIONS = SamplingOptions(7, 4, temperature=0.0, top_p=1.0, close_id=3, eos_id=4, seed=7, step=0)


def _by_the_reference():
    """(options with close and end ids that make rationales end in every way, what the reference makes of them)."""
    weights = reference.noisy_weights(SMALL, embedding_scale=0.25)
    requests = [request_for(e, e.index, (0,), score=True) for e in EXAMPLES]
    free = generation.generate(weights, SMALL, requests, replace(OPTIONS, close_id=-1, eos_id=-1, answer_budget=0))
    for close, end in itertools.permutations(sorted({token for r in free for token in r.rationale_ids[:3]} - {-1}), 2):
        options = replace(OPTIONS, close_id=close, eos_id=end)
        rollouts = generation.generate(weights, SMALL, requests, options)
        endings = {(r.rationale_ids[r.num_sampled - 1] in (close, end), r.forced) for r in rollouts}
        if len(endings) == 3 and len({len(r.answer_ids) for r in rollouts}) > 1:
            return options, rollouts
    raise AssertionError("no close and end ids give every way to end; choose another seed")


def _generated(runtime, options: SamplingOptions, max_rows: int | None):
    weights = reference.noisy_weights(SMALL, embedding_scale=0.25)
    policy, _ = build(runtime, SMALL, weights, build_options(SMALL))
    requests = [request_for(e, e.index, (0,), score=True) for e in EXAMPLES]
    return MegatronEngine([policy], runtime, max_rows=max_rows).generate(requests, options)


@pytest.fixture(scope="module")
def by_the_reference():
    return run_apart(_by_the_reference)


@pytest.mark.parametrize(("layout", "max_rows"), [({}, None), ({"tp": 2, "pp": 2}, 4)])
def test_greedy_answers_and_ln_w_equal_step_by_step_decoding_with_the_bridge_fed(by_the_reference, layout, max_rows):
    options, expected = by_the_reference
    for found in run_ranks(_generated, options, max_rows, **layout):
        tokens = [[replace(r, log_prob=0.0, log_w=0.0) for r in rollouts] for rollouts in (found, expected)]
        assert tokens[0] == tokens[1]
        for figure in ("log_prob", "log_w"):
            wanted = [getattr(r, figure) for r in expected]
            assert [getattr(r, figure) for r in found] == pytest.approx(wanted, abs=1e-4), figure


def _closed_by_the_end():
    """Options with one id that closes rationales and ends answers, and what the reference makes of them."""
    weights = reference.noisy_weights(SMALL, embedding_scale=0.25)
    requests = [request_for(e, e.index, (0,), score=True) for e in EXAMPLES]
    free = generation.generate(weights, SMALL, requests, replace(OPTIONS, close_id=-1, eos_id=-1, answer_budget=0))
    for end in sorted({token for r in free for token in r.rationale_ids[:3]} - {-1}):
        options = replace(OPTIONS, close_id=end, eos_id=end)
        rollouts = generation.generate(weights, SMALL, requests, options)
        if {r.forced for r in rollouts} == {False, True} and any(r.answer_ids[-1] == end for r in rollouts):
            return options, rollouts
    raise AssertionError("no id closes a rationale, ends an answer and lets another run on; choose another seed")


def test_one_token_can_close_a_rationale_and_end_the_answer():
    """A model without thinking tokens: it ends its turn, another turn is opened, and it ends that too."""
    options, expected = run_apart(_closed_by_the_end)
    [found] = run_ranks(_generated, options, None)
    tokens = [[replace(r, log_prob=0.0, log_w=0.0) for r in rollouts] for rollouts in (found, expected)]
    assert tokens[0] == tokens[1]
    assert [r.log_w for r in found] == pytest.approx([r.log_w for r in expected], abs=1e-4)


TABLE = (len(EXAMPLES), 5)


def _both(runtime, answer_budget: int):
    """ln w of drawn rationales by the engine and by the trainer, [B, M] each, and how long they are."""
    policy, model = build(runtime, SMALL, reference.noisy_weights(SMALL), build_options(SMALL))
    dp = runtime.groups.dp
    share = share_of_replica(*TABLE, dp.rank(), dp.size())
    requests = [request_for(EXAMPLES[b], b, slots, score=True) for b, slots in share]
    options = replace(OPTIONS, temperature=4.0, answer_budget=answer_budget)
    rollouts = MegatronEngine([policy], runtime).generate(requests, options)
    rows = []
    for r in rollouts:
        e = EXAMPLES[r.prompt_slot]
        z = e.joined(r.rationale_ids)
        rows.append(TrainingSequence(r.prompt_slot, r.rationale_slot, e.prompt_ids, z, r.num_sampled, e.answer_ids))
    shared, alone = (score(model, rows, TABLE, runtime, BatchOptions(8, share_prompts=s)) for s in (True, False))
    engine = table_of_rollouts(rollouts, TABLE, runtime)
    lengths = [len(r.rationale_ids) for r in rollouts]
    return engine.table.log_w_BM, shared.table.log_w_BM, alone.table.log_w_BM, lengths


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}, {"dp": 2}])
@pytest.mark.parametrize("answer_budget", [0, 4])
def test_the_engine_s_ln_w_equals_the_trainer_s_with_and_without_shared_prompts(layout, answer_budget):
    seen = set()
    for engine, shared, alone, lengths in run_ranks(_both, answer_budget, **layout):
        assert torch.isfinite(engine).all()
        assert (engine - shared).abs().max() < 1e-4 and (engine - alone).abs().max() < 1e-4
        seen |= set(lengths)
    assert len(seen) > 2, "rationales end early and late"
