"""Policies with experts, at every layout, against the unsharded reference: gradients, the load-balancing loss, updates,
rollouts, and steps of a whole run."""

import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from megatron_jq.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TrainingConfig,
)
from megatron_jq.config_validate import derive
from megatron_jq.model.build import build_policies, wrap_for_training
from megatron_jq.model.initialise import expert_name
from megatron_jq.model.moe import balance_losses
from megatron_jq.records import Coefficients, TrainingSequence
from megatron_jq.rollout.engine import RolloutRequest, SamplingOptions, share_of_replica
from megatron_jq.rollout.megatron import MegatronEngine
from megatron_jq.train.assemble import assemble
from megatron_jq.train.optimizer import build_optimizer
from megatron_jq.train.passes import BatchOptions, score, train
from megatron_jq.train.setup import prepare_data
from tests.distributed import reference
from tests.distributed.cases import (
    SMALL,
    TABLE,
    Q,
    batch,
    build,
    build_options,
    gather_gradient_shards,
    score_and_train,
    share,
    train_with,
)
from tests.distributed.ranks import run_apart, run_ranks
from tests.distributed.shards import join, load_whole, named_tensors

TOLERANCE = 1e-5
COEFFICIENT = 0.05
POLICIES = {
    "top 2 of 4, tied": replace(
        SMALL, num_experts=4, moe_ffn_hidden_size=40, moe_router_topk=2, moe_aux_loss_coeff=COEFFICIENT
    ),
    "top 3 of 8, not normalised, untied": replace(
        SMALL, num_experts=8, moe_ffn_hidden_size=24, moe_router_topk=3, moe_norm_topk_prob=False,
        tie_embeddings=False, moe_aux_loss_coeff=COEFFICIENT,
    ),
}  # fmt: skip
FIRST = POLICIES["top 2 of 4, tied"]
LAYOUTS = {
    "one process": {},
    "DP2": {"dp": 2},
    "EP2": {"dp": 2, "ep": 2},
    "DP4 EP2": {"dp": 4, "ep": 2},
    "PP2": {"pp": 2},
    "PP2 EP2": {"pp": 2, "dp": 2, "ep": 2},
    "TP2": {"tp": 2},
    "TP2 EP2": {"tp": 2, "dp": 2, "ep": 2},
    "TP2 EP2 ETP1": {"tp": 2, "ep": 2, "etp": 1},
}
#: (micro-batch size, most tokens a micro-batch, every sequence padded to a multiple of)
BATCHES = [(4, None, 1), (1, None, 8), (1, 48, 1)]


def weights_of(architecture):
    return reference.noisy_weights(architecture, embedding_scale=0.25)


def coefficients_of(sequences, q: float) -> tuple:
    """GARL's coefficients with the reference's own ln w."""
    weights = {n: w.double() for n, w in weights_of(FIRST).items()}
    log_w = {(s.prompt_slot, s.rationale_slot): reference.score(weights, FIRST, s)[1].item() for s in sequences}
    return reference.garl([[log_w[b, m] for m in range(TABLE[1])] for b in range(TABLE[0])], q)


def balance_gradients(architecture, sequences) -> tuple[float, reference.Weights]:
    """Mean over the sequences of the sum over layers of E · Σ f·P, and its gradient."""
    leaves = {n: w.double().requires_grad_() for n, w in weights_of(architecture).items()}
    layers: list[torch.Tensor] = []
    for s in sequences:
        reference.token_logits(leaves, architecture, (*s.prompt_ids, *s.rationale_ids, *s.answer_ids), layers)
    assert len(layers) == len(sequences) * architecture.num_layers
    mean = sum(layers) / len(sequences)
    gradients = torch.autograd.grad(mean, list(leaves.values()), allow_unused=True)
    found = zip(leaves.items(), gradients, strict=True)
    return mean.item(), {n: torch.zeros_like(w) if g is None else g for (n, w), g in found}


def _expected(name):
    """ln p tables, mean balance a layer, and the gradient of GARL's surrogate plus the load-balancing loss."""
    architecture, sequences = POLICIES[name], batch()
    weights = {n: w.double() for n, w in weights_of(architecture).items()}
    scored = [[x.item() for x in reference.score(weights, architecture, s)] for s in sequences]
    log_w = [[scored[3 * b + m][1] for m in range(TABLE[1])] for b in range(TABLE[0])]
    surrogate = reference.surrogate_gradients(weights, architecture, sequences, *reference.garl(log_w, Q))[1]
    value, balance = balance_gradients(architecture, sequences)
    total = {n: surrogate[n] + COEFFICIENT * balance[n] for n in surrogate}
    return scored, value / architecture.num_layers, {"both": total, "surrogate": surrogate}


@pytest.fixture(scope="module")
def expected():
    return {name: run_apart(_expected, name) for name in POLICIES}


# Gradients


def _passes(runtime, sharded):
    """{(policy, loss, batch): Pass} of this rank."""
    results = {}
    for name, architecture in POLICIES.items():
        for loss, coefficient in (("both", COEFFICIENT), ("surrogate", 0.0)):
            architecture = replace(architecture, moe_aux_loss_coeff=coefficient)
            options = build_options(
                architecture,
                sequence_parallel=runtime.groups.tp.size() > 1,
                use_distributed_optimizer=sharded,
            )
            policy, model = build(runtime, architecture, weights_of(architecture), options)
            for size, tokens, padding in BATCHES if loss == "both" else BATCHES[:1]:
                options = BatchOptions(micro_batch_size=size, max_tokens=tokens, sequence_multiple=padding)
                results[name, loss, size, tokens] = score_and_train(
                    runtime, policy, model, share(batch(), runtime), options, "garl"
                )
    return results


def check(ranks, expected):
    worst = {}
    for case in ranks[0]:
        scored, balance, gradients = expected[case[0]]
        for rank in ranks:
            for scores in (rank[case].scores, rank[case].trained):
                log_p_n2 = torch.stack([scores.table.log_z_BM.flatten(), scores.table.log_w_BM.flatten()], dim=1)
                torch.testing.assert_close(log_p_n2, torch.tensor(scored).double(), rtol=1e-6, atol=1e-5)
            if case[1] == "both":
                assert rank[case].trained.expert_balance == pytest.approx(balance, rel=1e-5)
            else:
                assert rank[case].trained.expert_balance is None
        found = join([rank[case].gradients for rank in ranks], 70, padding=0.0)
        for name, difference in reference.norm_difference(found, gradients[case[1]]).items():
            worst[difference] = (case, name)
    return max(worst), worst[max(worst)]


@pytest.mark.parametrize(
    ("layout", "sharded"), [*((layout, False) for layout in LAYOUTS), ("EP2", True), ("DP4 EP2", True)]
)
def test_scores_and_gradients_equal_the_unsharded_model(expected, layout, sharded):
    largest, where = check(run_ranks(_passes, sharded, **LAYOUTS[layout]), expected)
    print(f"\n{layout}{', distributed optimizer' if sharded else ''}: {largest:.2e} at {where}")
    assert largest < TOLERANCE, where


# In float64, against one process: the reference takes cosines in float64, models take them in float32

DEEP = replace(FIRST, num_layers=4)
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
#: (layout, build options, micro-batches)
SETTINGS = {
    "EP2": (LAYOUTS["EP2"], {}, BatchOptions(2)),
    "DP4 EP2": (LAYOUTS["DP4 EP2"], {"use_distributed_optimizer": True}, BatchOptions(2)),
    "PP2 EP2, token budget": (LAYOUTS["PP2 EP2"], {}, BatchOptions(1, max_tokens=48)),
    "TP2 EP2": (LAYOUTS["TP2 EP2"], {}, BatchOptions(2)),
    "TP2 EP2 ETP1": (LAYOUTS["TP2 EP2 ETP1"], {}, BatchOptions(2)),
    "interleaved PP2 EP2": ({**LAYOUTS["PP2 EP2"], "virtual_stages": 2}, {"virtual_stages": 2}, BatchOptions(2)),
    "full recompute, TP2 EP2": (LAYOUTS["TP2 EP2"], FULL_RECOMPUTE, BatchOptions(2)),
    "selective recompute, EP2": (LAYOUTS["EP2"], {"recompute_granularity": "selective"}, BatchOptions(2)),
    "overlapped reduction, EP2": (LAYOUTS["EP2"], {"overlap_grad_reduce": True}, BatchOptions(2)),
}


def _exact(runtime, settings, options):
    tp = runtime.groups.tp.size()
    settings = build_options(DEEP, params_dtype=torch.float64, sequence_parallel=tp > 1, **settings)
    policies = build_policies(DEEP, settings, runtime)
    for policy in policies:
        load_whole(policy, runtime, weights_of(DEEP))
    model = wrap_for_training(policies, settings, runtime)
    table = (torch.tensor(t, dtype=torch.float64) for t in coefficients_of(batch(), Q))
    model.zero_grad_buffer()
    trained = train(model, share(batch(), runtime), Coefficients(*table), runtime, options)
    gather_gradient_shards(model)
    return trained, [named_tensors(policy, runtime, lambda p: p.main_grad) for policy in policies]


@pytest.fixture(scope="module")
def exact_alone():
    return run_ranks(_exact, {}, BatchOptions(9, share_prompts=False))[0]


@pytest.mark.parametrize("name", SETTINGS)
def test_float64_gradients_are_those_of_one_process(exact_alone, name):
    layout, settings, options = SETTINGS[name]
    ranks = run_ranks(_exact, settings, options, **layout)
    trained, expected = exact_alone
    for rank in ranks:
        assert rank[0].expert_balance == pytest.approx(trained.expert_balance, rel=1e-10)
        assert (rank[0].table.log_w_BM - trained.table.log_w_BM).norm() < 1e-10 * trained.table.log_w_BM.norm()
    found = join([chunk for rank in ranks for chunk in rank[1]], 70, padding=0.0)
    gap = reference.norm_difference(found, join(expected, 70, padding=0.0))
    print(f"\n{name}: {max(gap.values()):.1e}")
    assert max(gap.values()) < 1e-10, gap


# The load-balancing loss


def test_even_use_of_experts_has_balance_one_and_one_expert_for_all_has_their_number():
    even = torch.full((8, 4), 0.25)
    routed = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]] * 4).bool()
    member = torch.ones(1, 8).bool()
    alone = type("Group", (), {"size": lambda self: 1})()
    assert balance_losses(even, routed, member, 2, alone).tolist() == pytest.approx([1.0])
    first = torch.eye(4)[[0] * 8]
    assert balance_losses(first, first.bool(), member, 1, alone).tolist() == pytest.approx([4.0])
    halves = torch.stack([torch.arange(8) < 6, torch.arange(8) >= 6])
    both = balance_losses(torch.cat([first[:6], even[6:]]), routed | first.bool(), halves, 2, alone)
    assert both[1].item() == pytest.approx(1.0, abs=0.6) and both[0] > both[1]


def _balances(runtime):
    """Gradients by coefficients: none at all, and GARL's at three q."""
    policy, model = build(
        runtime,
        FIRST,
        weights_of(FIRST),
        build_options(FIRST, sequence_parallel=runtime.groups.tp.size() > 1),
    )
    zero = torch.zeros(TABLE, dtype=torch.float64)
    tables = {"none": (zero, zero)}
    tables |= {q: tuple(torch.tensor(t, dtype=torch.float64) for t in coefficients_of(batch(), q)) for q in (0.0, 1.0)}
    mine, options = share(batch(), runtime), BatchOptions(micro_batch_size=2)
    return {
        case: train_with(runtime, policy, model, mine, options, Coefficients(*table)) for case, table in tables.items()
    }


def _expected_balances():
    sequences = batch()
    tables = {q: coefficients_of(sequences, q) for q in (0.0, 1.0)}
    balance = balance_gradients(FIRST, sequences)[1]
    surrogates = {
        q: reference.surrogate_gradients(weights_of(FIRST), FIRST, sequences, *t)[1] for q, t in tables.items()
    }
    return balance, surrogates, {q: max(abs(x) for t in table for row in t for x in row) for q, table in tables.items()}


@pytest.mark.parametrize("layout", ["one process", "EP2", "TP2 EP2"])
def test_the_load_balancing_gradient_does_not_depend_on_q_or_coefficients(layout):
    balance, surrogates, size = run_apart(_expected_balances)
    assert size[1.0] > 20 * size[0.0]  # the coefficients do differ
    ranks = run_ranks(_balances, **LAYOUTS[layout])
    alone = join([rank["none"].gradients for rank in ranks], 70, padding=0.0)
    scaled = {n: COEFFICIENT * g for n, g in balance.items()}
    gap = reference.norm_difference(alone, scaled)
    assert max(gap.values()) < TOLERANCE, gap
    for q, surrogate in surrogates.items():
        found = join([rank[q].gradients for rank in ranks], 70, padding=0.0)
        gap = reference.norm_difference(found, {n: surrogate[n] + scaled[n] for n in surrogate})
        print(f"{layout} q {q}: {max(gap.values()):.1e}, coefficients up to {size[q]:.1e}")
        assert max(gap.values()) < TOLERANCE, gap


# Replicas with unequal work

SPLITS = {"7 and 2": 7, "all and none": 9, "none and all": 0}


def _unequal(runtime):
    policy, model = build(runtime, FIRST, weights_of(FIRST), build_options(FIRST))
    results = {}
    for name, first in SPLITS.items():
        mine = batch()[:first] if runtime.groups.dp.rank() == 0 else batch()[first:]
        options = BatchOptions(micro_batch_size=1)
        results["top 2 of 4, tied", "both", name] = score_and_train(runtime, policy, model, mine, options, "garl")
    return results


@pytest.mark.parametrize("layout", ["EP2", "PP2 EP2"])
def test_replicas_with_unequal_numbers_of_sequences_share_experts(expected, layout):
    largest, where = check(run_ranks(_unequal, **LAYOUTS[layout]), expected)
    print(f"\n{layout}: {largest:.2e} at {where}")
    assert largest < TOLERANCE, where


# Updates and initial weights

CLIP = 0.01
#: by use of the distributed optimizer, which Megatron-core has for Adam alone; and the tolerance of an update: Adam
#: divides by |g|, so where g is rounding noise the update is noise too
OPTIMIZERS = {
    False: (OptimizerConfig(optimizer="sgd", lr=5.0, clip_grad=CLIP, sgd_momentum=0.9), 1e-4),
    True: (OptimizerConfig(lr=5e-3, clip_grad=CLIP), 2e-3),
}


def _updates(runtime):
    """{distributed optimizer: (gradient norms, parameters)} after two clipped steps."""
    results = {}
    for sharded in (False, True):
        tp = runtime.groups.tp.size()
        options = build_options(FIRST, sequence_parallel=tp > 1, use_distributed_optimizer=sharded)
        policy, model = build(runtime, FIRST, weights_of(FIRST), options)
        config = Config(optimizer=OPTIMIZERS[sharded][0], parallel=ParallelConfig(use_distributed_optimizer=sharded))
        optimizer, norms = build_optimizer(model, config, runtime), []
        for _ in range(2):
            optimizer.zero_grad()
            score_and_train(runtime, policy, model, share(batch(), runtime), BatchOptions(2), "garl")
            with runtime.megatron():
                succeeded, norm, _ = optimizer.step()
            assert succeeded
            norms.append(float(norm))
        results[sharded] = norms, named_tensors(policy, runtime, lambda p: p)
    return results


@pytest.fixture(scope="module")
def updated_alone():
    return run_ranks(_updates)


@pytest.mark.parametrize("layout", ["EP2", "DP4 EP2", "PP2 EP2", "TP2", "TP2 EP2", "TP2 EP2 ETP1"])
def test_clipped_updates_and_gradient_norms_equal_those_of_one_process(expected, updated_alone, layout):
    start = weights_of(FIRST)
    gradients = expected["top 2 of 4, tied"][2]["both"]
    total = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    ranks = run_ranks(_updates, **LAYOUTS[layout])
    for sharded, (_, tolerance) in OPTIMIZERS.items():
        norms = updated_alone[0][sharded][0]
        assert norms[0] == pytest.approx(total, rel=1e-5) and min(norms) > CLIP
        before = join([updated_alone[0][sharded][1]], 70, padding=None)
        assert all(rank[sharded][0] == pytest.approx(norms, rel=1e-5) for rank in ranks), sharded
        final = join([rank[sharded][1] for rank in ranks], 70, padding=None)
        moved = {n: final[n].double() - start[n] for n in final}
        gap = reference.norm_difference(moved, {n: before[n].double() - start[n] for n in before})
        print(f"{layout} sharded {sharded}: updates within {max(gap.values()):.1e}")
        assert max(gap.values()) < tolerance, gap


def _initial(runtime):
    options = build_options(FIRST, sequence_parallel=runtime.groups.tp.size() > 1)
    [policy] = build_policies(FIRST, options, runtime)
    return named_tensors(policy, runtime, lambda p: p)


def test_initial_weights_are_the_same_at_every_layout():
    layouts = ("one process", "EP2", "PP2 EP2", "TP2 EP2", "TP2 EP2 ETP1")
    first, *others = (join(run_ranks(_initial, **LAYOUTS[layout]), 70, padding=0.0) for layout in layouts)
    assert {n: tuple(t.shape) for n, t in first.items()} == reference.parameter_shapes(FIRST)
    for other in others:
        assert other.keys() == first.keys() and all(torch.equal(other[n], first[n]) for n in first)
    experts = [first[f"decoder.layers.1.mlp.experts.local_experts.{e}.linear_fc1.weight"] for e in range(4)]
    assert not any(torch.equal(experts[0], other) for other in experts[1:])


def test_grouped_matrices_have_the_names_of_single_experts():
    single = "decoder.layers.3.mlp.experts.local_experts.{}.linear_fc2.weight"
    assert expert_name(single.format(1), 4) == single.format(5)
    assert expert_name("decoder.layers.3.mlp.experts.linear_fc2.weight1", 4) == single.format(5)


# Rollouts

PROMPTS, RATIONALES = 6, 4
SAMPLE = SamplingOptions(
    rationale_budget=12, answer_budget=3, temperature=1.5, top_p=1.0, close_id=3, eos_id=4, seed=99, step=2
)
ROLLOUT_SPLITS = ("even", "7 and 17", "all and none")


def _prompts() -> list[tuple[int, ...]]:
    rng = random.Random(43)
    return [tuple(rng.randrange(70) for _ in range(rng.randint(1, 12))) for _ in range(PROMPTS)]


def _requests(runtime, split: str) -> list[RolloutRequest]:
    dp, total = runtime.groups.dp, PROMPTS * RATIONALES
    if split == "even":
        mine = share_of_replica(PROMPTS, RATIONALES, dp.rank(), dp.size())
    else:
        cut = 7 if split == "7 and 17" else total
        edges = [0, *[cut] * (dp.size() - 1), total] if dp.size() > 1 else [0, total]
        slots = range(edges[dp.rank()], edges[dp.rank() + 1])
        by_prompt = {b: tuple(i % RATIONALES for i in slots if i // RATIONALES == b) for b in range(PROMPTS)}
        mine = [(b, part) for b, part in by_prompt.items() if part]
    return [RolloutRequest(b, _prompts()[b], slots, gold_ids=(5, 6, 4)) for b, slots in mine]


def _rollouts(runtime):
    """{split: ({slot: rollout}, the trainer's table for these rollouts)}, with waves of at most 8 rows."""
    options = build_options(FIRST, sequence_parallel=runtime.groups.tp.size() > 1)
    policy, model = build(runtime, FIRST, weights_of(FIRST), options)
    results = {}
    for split in ROLLOUT_SPLITS:
        rollouts = MegatronEngine([policy], runtime, max_rows=8).generate(_requests(runtime, split), SAMPLE)
        x = _prompts()
        batching = BatchOptions(8, temperature=SAMPLE.temperature)
        rows = [
            TrainingSequence(
                r.prompt_slot, r.rationale_slot, x[r.prompt_slot], r.rationale_ids, r.num_sampled, (5, 6, 4)
            )
            for r in rollouts
        ]
        scores = score(model, rows, (PROMPTS, RATIONALES), runtime, batching, with_rationale=True)
        results[split] = {(r.prompt_slot, r.rationale_slot): r for r in rollouts}, scores
    return results


@pytest.fixture(scope="module")
def sampled_alone():
    return run_ranks(_rollouts)[0]["even"]


@pytest.mark.parametrize("layout", ["one process", "EP2", "DP4 EP2", "PP2 EP2", "TP2 EP2"])
def test_rollouts_are_those_of_one_process_however_the_work_is_split(sampled_alone, layout):
    alone, table = sampled_alone
    assert len({r.rationale_ids for r in alone.values()}) > 18 and len({r.num_sampled for r in alone.values()}) > 3
    ranks = run_ranks(_rollouts, **LAYOUTS[layout])
    for split in ROLLOUT_SPLITS:
        found = {}
        for rank in ranks:
            for slot, rollout in rank[split][0].items():
                assert found.setdefault(slot, rollout) == rollout
        assert found.keys() == alone.keys()
        for slot, rollout in found.items():
            ids = (rollout.rationale_ids, rollout.num_sampled, rollout.answer_ids)
            assert ids == (alone[slot].rationale_ids, alone[slot].num_sampled, alone[slot].answer_ids), (split, slot)
            assert rollout.log_prob == pytest.approx(table.table.log_z_BM[slot].item(), abs=1e-4)
            assert rollout.log_w == pytest.approx(table.table.log_w_BM[slot].item(), abs=1e-4)


# A run


def _run_steps(runtime, config):
    derived = derive(config, runtime.world_size)
    data = prepare_data(config, derived.architecture, runtime, Path(config.training.run_dir))
    loop = assemble(config, derived, data, runtime)
    steps = [loop.step(step) for step in range(2)]
    evaluated = loop.with_evaluation(steps[-1])
    return steps, (evaluated.eval_exact_match, evaluated.eval_pass_at_k, evaluated.eval_maj_at_k)


def _config(folder: Path, ep: int, tp: int) -> Config:
    folder.mkdir()
    return Config(
        model=ModelConfig(model="tiny-moe", moe_aux_loss_coeff=COEFFICIENT),
        parallel=ParallelConfig(
            expert_model_parallel_size=ep, tensor_model_parallel_size=tp, sequence_parallel=tp > 1, device="cpu"
        ),
        rollout=RolloutConfig(num_rationales=3, prompts_per_step=3, rationale_budget=8),
        data=DataConfig(train_examples=32, eval_examples=5),
        training=TrainingConfig(train_iters=2, micro_batch_size=2, run_dir=str(folder)),
    )


FIGURES = ("loss", "log_p_mean", "effective_reward_max", "ess_mean", "grad_norm", "expert_balance", "forced_fraction")


def test_steps_of_a_run_are_the_same_with_shared_out_experts(tmp_path):
    (alone, evaluation), *_ = run_ranks(_run_steps, _config(tmp_path / "alone", 1, 1))
    assert alone[0].expert_balance > 1 and alone[0].grad_norm > 0 and alone[1].loss != alone[0].loss
    for tp, dp, ep in [(1, 2, 2), (2, 2, 2)]:
        for steps, found in run_ranks(_run_steps, _config(tmp_path / f"tp{tp}", ep, tp), tp=tp, dp=dp, ep=ep):
            assert found == evaluation
            for mine, theirs in zip(steps, alone, strict=True):
                for name in FIGURES:
                    assert asdict(mine)[name] == pytest.approx(asdict(theirs)[name], rel=1e-3, abs=1e-6), name
                assert mine.tokens_trained == theirs.tokens_trained and mine.log_prob_mismatch_max < 1e-4
