"""Parameters after three Adam steps, gradient norms and clipping, and bf16, against the unsharded reference."""

import itertools
from dataclasses import replace

import pytest
import torch

from megatron_jq.config import Config, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_jq.model.build import build_policies
from megatron_jq.train.optimizer import build_optimizer, build_schedule
from megatron_jq.train.passes import BatchOptions
from tests.distributed import reference
from tests.distributed.cases import (
    POLICIES,
    SMALL,
    TABLE,
    Q,
    batch,
    build,
    build_options,
    score_and_train,
    share,
    train_with,
)
from tests.distributed.ranks import run_apart, run_ranks
from tests.distributed.shards import join, named_tensors
from tests.distributed.test_training_pass import plain_coefficients

STEPS = 3
#: The clip is below every step's norm, so that a wrong norm shows in the parameters.
ADAM = OptimizerConfig(lr=5e-3, weight_decay=0.1, clip_grad=0.02)
OPTIONS = BatchOptions(micro_batch_size=2)


def _steps(runtime, sequence_parallel):
    """{(policy, distributed optimizer): (norms, first gradient, parameters)} of this rank after STEPS GARL steps."""
    results = {}
    for (name, architecture), sharded in itertools.product(POLICIES.items(), (False, True)):
        options = build_options(
            architecture, sequence_parallel=sequence_parallel, use_distributed_optimizer=sharded, seed=1
        )
        policy, model = build(runtime, architecture, reference.noisy_weights(architecture), options)
        config = Config(optimizer=ADAM, parallel=ParallelConfig(use_distributed_optimizer=sharded))
        optimizer, norms, gradient = build_optimizer(model, config, runtime), [], None
        schedule = build_schedule(optimizer, config)
        for _ in range(STEPS):
            optimizer.zero_grad()
            done = _garl_pass(runtime, policy, model)
            gradient = gradient or done.gradients
            with runtime.megatron():
                schedule.step(increment=1)
                succeeded, norm, _ = optimizer.step()
            assert succeeded
            norms.append(float(norm))
        results[name, sharded] = norms, gradient, named_tensors(policy, runtime, lambda p: p)
    return results


def _garl_pass(runtime, policy, model):
    return score_and_train(runtime, policy, model, share(batch(), runtime), OPTIONS, "garl")


def _expected_steps(name):
    architecture, sequences = POLICIES[name], batch()
    weights = {n: w.double() for n, w in reference.noisy_weights(architecture).items()}
    matrices = [w for w in weights.values() if w.ndim == 2]
    vectors = [w for w in weights.values() if w.ndim == 1]  # norms and biases are not decayed
    groups = [{"params": matrices, "weight_decay": ADAM.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=ADAM.lr, betas=(ADAM.adam_beta1, ADAM.adam_beta2), eps=ADAM.adam_eps)
    norms = []
    for _ in range(STEPS):
        scored = [reference.score(weights, architecture, s)[1].item() for s in sequences]
        table = [scored[3 * b : 3 * b + 3] for b in range(TABLE[0])]
        gradients = reference.surrogate_gradients(weights, architecture, sequences, *reference.garl(table, Q))[1]
        norms.append(torch.stack([g.norm() for g in gradients.values()]).norm().item())
        for n, w in weights.items():
            w.grad = gradients[n] * min(1.0, ADAM.clip_grad / (norms[-1] + 1e-6))
        adam.step()
    return norms, weights


@pytest.fixture(scope="module")
def expected_steps():
    return {name: run_apart(_expected_steps, name) for name in POLICIES}


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "sequence_parallel"),
    [(1, 1, 1, False), (1, 1, 2, False), (2, 1, 1, True), (1, 2, 1, False), (2, 2, 2, False), (2, 2, 2, True)],
)
def test_three_adam_steps_equal_the_unsharded_ones_with_either_optimizer(expected_steps, tp, pp, dp, sequence_parallel):
    ranks = run_ranks(_steps, sequence_parallel, tp=tp, pp=pp, dp=dp)
    for name, architecture in POLICIES.items():
        norms, weights = expected_steps[name]
        start = {n: w.double() for n, w in reference.noisy_weights(architecture).items()}
        assert min(norms) > ADAM.clip_grad
        found = {}
        for sharded in (False, True):
            for rank in ranks:
                assert rank[name, sharded][0] == pytest.approx(norms, rel=1e-4), (name, sharded)
            gradient = join([rank[name, sharded][1] for rank in ranks], 70, padding=0.0)
            final = join([rank[name, sharded][2] for rank in ranks], 70, padding=None)
            found[sharded] = gradient, final
            # Adam divides by |g|: where g is rounding noise the update is noise too, hence the wider tolerance.
            moved = {n: final[n].double() - start[n] for n in final}
            gap = reference.norm_difference(moved, {n: weights[n] - start[n] for n in weights})
            print(f"\ntp {tp} pp {pp} dp {dp} {name} sharded {sharded}: update off by {max(gap.values()):.1e}")
            assert max(gap.values()) < 2e-3, gap
        for plain, sharded, tolerance in zip(found[False], found[True], (1e-6, 5e-5), strict=True):
            gap = reference.norm_difference(sharded, {n: t.double() for n, t in plain.items()})
            assert max(gap.values()) < tolerance, gap


def _bf16_pass(runtime):
    weights = {n: w.bfloat16().float() for n, w in reference.noisy_weights(SMALL).items()}
    options = build_options(SMALL, params_dtype=torch.bfloat16, sequence_parallel=True, use_distributed_optimizer=True)
    policy, model = build(runtime, SMALL, weights, options)
    coefficients = plain_coefficients(batch())
    done = train_with(runtime, policy, model, share(batch(), runtime), OPTIONS, coefficients)
    parallel = ParallelConfig(use_distributed_optimizer=True)
    config = Config(optimizer=ADAM, model=ModelConfig(bf16=True), parallel=parallel)
    optimizer = build_optimizer(model, config, runtime)
    with runtime.megatron():
        succeeded, norm, _ = optimizer.step()
    return done, succeeded, float(norm), named_tensors(policy, runtime, lambda p: p.float())


def _expected_bf16():
    weights = {n: w.bfloat16().float() for n, w in reference.noisy_weights(SMALL).items()}
    double, coefficients = {n: w.double() for n, w in weights.items()}, plain_coefficients(batch())
    scored = [[x.item() for x in reference.score(double, SMALL, s)] for s in batch()]
    tables = coefficients.rationale_BM.tolist(), coefficients.answer_BM.tolist()
    return torch.tensor(scored), reference.surrogate_gradients(weights, SMALL, batch(), *tables)[1]


@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 1, 1), (2, 2, 2)])
def test_bf16_is_close_to_the_unsharded_model_and_steps(tp, pp, dp):
    scored, gradients = run_apart(_expected_bf16)
    ranks = run_ranks(_bf16_pass, tp=tp, pp=pp, dp=dp)
    trained = ranks[0][0].trained
    found = torch.stack([trained.table.log_z_BM.flatten(), trained.table.log_w_BM.flatten()], dim=1)
    worst_score = (found - scored).abs().max().item()
    gradient = join([rank[0].gradients for rank in ranks], 70, padding=0.0)
    worst = max(reference.norm_difference(gradient, gradients).values())
    print(f"\nbf16 tp {tp} pp {pp} dp {dp}: ln p within {worst_score:.2f} nats, gradients within {worst:.1e}")
    assert worst_score < 0.3 and worst < 0.1
    total = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    assert all(rank[1] and rank[2] == pytest.approx(total, rel=0.05) for rank in ranks)
    final = join([rank[3] for rank in ranks], 70, padding=None)
    start = reference.noisy_weights(SMALL)
    assert all(not torch.equal(final[n], start[n].bfloat16().float()) for n in final)


def _initial(runtime):
    return {
        (name, bias): named_tensors(
            *build_policies(replace(architecture, add_qkv_bias=bias), build_options(architecture), runtime),
            runtime,
            lambda p: p,
        )
        for name, architecture in POLICIES.items()
        for bias in (False, True)
    }


def test_initial_weights_are_the_same_at_every_layout():
    layouts = [{}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}, {"dp": 2}]
    launches = [run_ranks(_initial, **layout) for layout in layouts]
    for case in launches[0][0]:
        first, *others = (join([rank[case] for rank in ranks], 70, padding=0.0) for ranks in launches)
        for other in others:
            assert other.keys() == first.keys() and all(torch.equal(other[n], first[n]) for n in first)
        architecture = replace(POLICIES[case[0]], add_qkv_bias=case[1])
        assert {n: tuple(t.shape) for n, t in first.items()} == reference.parameter_shapes(architecture)
        matrix = first["decoder.layers.1.mlp.linear_fc1.weight"]
        assert matrix.std().item() == pytest.approx(architecture.init_method_std, rel=0.05)
        assert not torch.equal(matrix, first["decoder.layers.0.mlp.linear_fc1.weight"])
