"""One factor on the whole loss changes no bit of what float32 holds: updates, norms, clipping, moments. What it does
not hold is reported, rescaled and judged by figures that are right."""

import math
from dataclasses import replace

import pytest
import torch

from megatron_jq.config import Config, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_jq.errors import RunFailure
from megatron_jq.records import Coefficients
from megatron_jq.train.clipped_learner import OffPolicy, train_by_token
from megatron_jq.train.loss_scale import LossScale
from megatron_jq.train.optimizer import build_optimizer, clip_and_step, gradient_norm, parts_of, rounded
from megatron_jq.train.passes import BatchOptions, train, training_batches
from megatron_jq.train.precision import PrecisionWatch, StepFacts
from tests.distributed import reference
from tests.distributed.cases import SMALL, TABLE, batch, build, build_options, share
from tests.distributed.ranks import run_ranks
from tests.distributed.shards import named_tensors
from tests.distributed.test_training_pass import plain_coefficients

STEPS = 3
#: The clip is below every step's norm; epsilon, as large as typical elements, shows in every weight.
ADAM = OptimizerConfig(lr=5e-3, weight_decay=0.1, clip_grad=0.02, adam_eps=1e-5)
EXPERTS = replace(SMALL, num_experts=4, moe_ffn_hidden_size=40, moe_router_topk=2, moe_aux_loss_coeff=0.05)
OPTIONS = BatchOptions(micro_batch_size=2)


def _steps(runtime, architecture, scale, *, optimizer="adam", bf16=False, sharded=False, by_token=False, top_p=1.0):
    """(norms, figures, parameters' bits) of this rank after STEPS updates at a loss scale, epsilon scaled alike."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    weights = {n: w.to(dtype).float() for n, w in reference.noisy_weights(architecture).items()}
    sequence_parallel = architecture is EXPERTS and runtime.groups.tp.size() > 1
    options = build_options(
        architecture, params_dtype=dtype, use_distributed_optimizer=sharded, sequence_parallel=sequence_parallel
    )
    policy, model = build(runtime, architecture, weights, options)
    settings = replace(ADAM, optimizer=optimizer, adam_eps=ADAM.adam_eps * scale)
    config = Config(settings_of(bf16), ParallelConfig(use_distributed_optimizer=sharded), optimizer=settings)
    adam, norms, figures = build_optimizer(model, config, runtime), [], []
    passes = replace(OPTIONS, loss_scale=scale, top_p=top_p)
    mine, coefficients = share(batch(), runtime), plain_coefficients(batch())
    if by_token:
        coefficients = replace(coefficients, kl_weight_BM=torch.full(TABLE, 0.3 / 9, dtype=torch.float64))
    batches = training_batches(model, mine, coefficients, runtime, passes)
    off_policy = OffPolicy(0.2, 0.3)
    for _ in range(STEPS):
        model.zero_grad_buffer()
        adam.zero_grad()
        if by_token:
            if off_policy.reference is None:  # as far from the start as ln p was drawn with noise
                off_policy = replace(off_policy, reference=_shifted(model, batches, runtime, passes))
            done = train_by_token(model, batches, coefficients, off_policy, runtime, passes)
            off_policy = replace(off_policy, old=off_policy.old or done.log_prob)
            figures.append((done.figures.kl_loss, done.figures.kl_mean, done.figures.clipped_fraction))
        else:
            figures.append(train(model, mine, coefficients, runtime, passes).expert_balance)
        with runtime.megatron():
            adam.prepare_grads()
            norm = gradient_norm(adam)
            norms.append((norm / scale, rounded(norm) / scale))
            clip_and_step(adam, config, norm=norm / scale, loss_scale=scale)
    return norms, figures, named_tensors(policy, runtime, lambda p: p.clone())


def settings_of(bf16: bool) -> ModelConfig:
    return ModelConfig(bf16=bf16)


def _shifted(model, batches, runtime, passes):
    from megatron_jq.train.clipped_learner import token_log_probs

    return [log_prob - 0.1 for log_prob in token_log_probs(model, batches, runtime, passes)]


def equal(tensors, others) -> bool:
    """Of two results of named_tensors: whether every bit is the same."""
    (_, tensors), (_, others) = tensors, others
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


CASES = {
    "alone": ({}, SMALL, {}),
    "TP2 DP2, sharded": ({"tp": 2, "dp": 2}, SMALL, {"sharded": True}),
    "bf16, DP2, sharded": ({"dp": 2}, SMALL, {"bf16": True, "sharded": True}),
    "bf16": ({}, SMALL, {"bf16": True}),
    "SGD": ({}, SMALL, {"optimizer": "sgd"}),
    "nucleus": ({}, SMALL, {"top_p": 0.9}),
    "clipped ratios and KL": ({"dp": 2}, SMALL, {"by_token": True}),
    "experts, EP2": ({"dp": 2, "ep": 2}, EXPERTS, {}),
}


def _at_all_scales(runtime, architecture, options):
    return [_steps(runtime, architecture, scale, **options) for scale in (1.0, 2.0**30, 2.0**-12)]


@pytest.mark.parametrize("name", CASES)
def test_a_power_of_two_changes_no_bit_where_float32_holds_both(name):
    ranks, architecture, options = CASES[name]
    for results in run_ranks(_at_all_scales, architecture, options, **ranks):
        plain = results[0]
        assert min(norm for norm, _ in plain[0]) > ADAM.clip_grad  # so clipping is at work
        for scaled in results[1:]:
            assert scaled[0] == plain[0] and scaled[1] == plain[1]
            assert equal(scaled[2], plain[2])


def _tiny_gradients(runtime, values):
    _, model = build(runtime, SMALL, reference.noisy_weights(SMALL), build_options(SMALL))
    optimizer, norms = build_optimizer(model, Config(optimizer=ADAM), runtime), []
    count = sum(p.numel() for _, p in model.named_parameters())
    for value in values:
        for _, parameter in model.named_parameters():
            parameter.main_grad.fill_(value)
        with runtime.megatron():
            optimizer.prepare_grads()
            norms.append(gradient_norm(optimizer) / value / math.sqrt(count))
    return norms


def test_norms_are_those_of_gradients_whose_squares_float32_cannot_hold():
    values = [1.0, 1e-8, 1e-15, 4e-25, 1e-30, 1e-37, 1e12, 1e20, 1e30]
    [norms] = run_ranks(_tiny_gradients, values)
    assert norms == pytest.approx([1.0] * len(values), rel=1e-5)


def _auto(runtime):
    """Adam's state and weights under an automatic scale while coefficients grow by 2^100, against one wide scale."""
    found = {}
    for name, setting in (("auto", "auto"), ("constant", 2.0**40)):
        policy, model = build(runtime, SMALL, reference.noisy_weights(SMALL), build_options(SMALL))
        config = Config(optimizer=replace(ADAM, adam_eps=1e-30, clip_grad=0.0))
        optimizer, scale, values = build_optimizer(model, config, runtime), LossScale(setting, adam=True), []
        for step, size in enumerate((2.0**-40, 2.0**-38, 2.0**-3, 2.0**-3)):
            c = plain_coefficients(batch())
            c = Coefficients(c.rationale_BM * (size / c.largest), c.answer_BM * (size / c.largest))
            values.append(scale.for_step(step, c.largest, optimizer))
            model.zero_grad_buffer()
            train(model, share(batch(), runtime), c, runtime, replace(OPTIONS, loss_scale=values[-1]))
            with runtime.megatron():
                optimizer.prepare_grads()
                clip_and_step(optimizer, config, norm=1.0, loss_scale=values[-1])
        moments = [s for part in parts_of(optimizer) for s in part.optimizer.state.values()]
        found[name] = values, named_tensors(policy, runtime, lambda p: p.clone()), moments
    return found


def test_lowering_the_scale_is_the_same_run_with_a_wider_float32():
    [found] = run_ranks(_auto)
    (values, weights, moments), (_, expected, wide) = found["auto"], found["constant"]
    assert values == [2.0**40, 2.0**40, 2.0**3, 2.0**3]  # set once, then lowered as soon as the product passed 2^32
    assert equal(weights, expected)
    for ours, theirs in zip(moments, wide, strict=True):
        assert torch.equal(ours["exp_avg"] * 2.0**37, theirs["exp_avg"])
        assert torch.equal(ours["exp_avg_sq"] * 2.0**74, theirs["exp_avg_sq"])


def _moments(runtime, saved, settings):
    """Scale and moments after a checkpoint with moments of 2^-20 and 2^-40 is loaded, for each setting."""
    found = []
    for setting in settings:
        _, model = build(runtime, SMALL, reference.noisy_weights(SMALL), build_options(SMALL))
        optimizer = build_optimizer(model, Config(optimizer=ADAM), runtime)
        with runtime.megatron():
            for _, parameter in model.named_parameters():
                parameter.main_grad.fill_(1.0)
            optimizer.prepare_grads()
            optimizer.step_with_ready_grads()
        for state in optimizer.chained_optimizers[0].optimizer.state.values():
            state["exp_avg"].fill_(2.0**-20)
            state["exp_avg_sq"].fill_(2.0**-40)
        scale = LossScale(setting, adam=True)
        scale.restore(saved, optimizer)
        state = next(iter(optimizer.chained_optimizers[0].optimizer.state.values()))
        found.append((scale.value, state["exp_avg"].max().item(), state["exp_avg_sq"].max().item()))
    return found


def _refusal(runtime, saved, setting):
    [(_, _, square)] = _moments(runtime, saved, [setting / 2])
    assert square == 2.0**100
    with pytest.raises(RunFailure) as refused:
        _moments(runtime, saved, [setting])
    return str(refused.value)


def test_a_checkpoints_moments_come_to_the_scale_of_the_run_that_loads_them():
    settings = ["auto", 1.0, 2.0**10]
    [auto] = run_ranks(_moments, {"loss_scale": 2.0**20, "loss_scale_setting": "auto"}, settings)
    assert auto == [(2.0**20, 2.0**-20, 2.0**-40), (1.0, 2.0**-40, 2.0**-80), (2.0**10, 2.0**-30, 2.0**-60)]
    [older] = run_ranks(_moments, {}, settings)  # written before there was a loss scale
    assert older[1:] == [(1.0, 2.0**-20, 2.0**-40), (2.0**10, 2.0**-10, 2.0**-20)]
    assert older[0] == (2.0**70, 2.0**50, 2.0**100)  # as far up as second moments let it: the next step lowers it
    [refused] = run_ranks(_refusal, {"loss_scale": 2.0**20, "loss_scale_setting": "auto"}, 2.0**91)
    assert "give at most 1.2379400392853803e+27, or --finetune" in refused  # 2^90: second moments of 2^100
    [undecided] = run_ranks(_moments, {"loss_scale": None, "loss_scale_setting": "auto"}, ["auto"])
    assert undecided == [(None, 2.0**-20, 2.0**-40)]


def _judged(runtime, epsilon, sizes):
    """What is said, or raised, before each of a few Adam steps on gradients of these sizes."""
    _, model = build(runtime, SMALL, reference.noisy_weights(SMALL), build_options(SMALL))
    settings = replace(ADAM, adam_eps=epsilon, clip_grad=1.0)
    optimizer, said = build_optimizer(model, Config(optimizer=settings), runtime), []
    watch = PrecisionWatch(Config(optimizer=settings), said.append)
    for step, size in enumerate(sizes):
        facts = StepFacts(step, 0.25, -79.0, size, 9, 1.0)
        for _, parameter in model.named_parameters():
            parameter.main_grad.fill_(size)
        with runtime.megatron():
            optimizer.prepare_grads()
            norm = gradient_norm(optimizer)
            watch.gradient(facts, norm, 10_000)
            try:
                watch.adam_step(facts, optimizer, norm)
            except RunFailure as failure:
                return said, str(failure)
            clip_and_step(optimizer, Config(optimizer=settings), norm=norm)
    return said, None


@pytest.mark.parametrize(
    ("epsilon", "sizes", "said", "stopped"),
    [
        (1e-8, [1e-3, 1e-5], [], False),
        (1e-8, [1e-25], ["below --adam-eps 1e-08"], False),
        (1e-8, [0.0], [], False),
        (1e-8, [1e-39], ["below what float32 holds with all its digits"], False),
        (1e-15, [1e-14], [], False),
        (1e-30, [1e-14, 1e-15, 1e-13], [], False),
        (1e-30, [1e-20], ["float32 cannot hold the squares of 1e+02 %"], False),
        (1e-30, [1e-25], [], True),
    ],
)
def test_adams_floor_is_said_and_a_step_that_adam_cannot_make_is_not_made(epsilon, sizes, said, stopped):
    [(lines, failure)] = run_ranks(_judged, epsilon, sizes)
    assert len(lines) == len(said) and all(text in line for text, line in zip(said, lines, strict=True)), lines
    assert all(line.startswith("warning: step ") and "--loss-scale auto" in line for line in lines)
    assert (failure is not None) is stopped
    if stopped:
        assert "a weight would move" in failure and "--adam-eps 1e-30" in failure and "--loss-scale auto" in failure


def test_a_number_that_leaves_float32_is_refused_by_name():
    with pytest.raises(RunFailure, match="--loss-scale 1e\\+40 times a coefficient of 0.1 exceeds float32"):
        LossScale(1e40, adam=True).for_step(3, 0.1, None)
    watch = PrecisionWatch(Config(optimizer=replace(ADAM, clip_grad=0.0)), print)
    with pytest.raises(RunFailure, match="too large for Adam's squares"):
        watch.gradient(StepFacts(3, 0.5, -1.0, 0.1, 9, 1e30), 1e20, 100)


@pytest.mark.parametrize(
    ("log_p", "tokens", "said", "stopped"),
    [
        ([-79.0, -5_348_145.0], 12, 0, True),
        ([-27.0, -500.0], 3, 1, False),
        ([-27.0, -60.0], 3, 0, False),
        ([-0.01, -30.0], 3, 0, False),
        ([-8000.0, -7000.0], 1000, 0, False),
        ([math.nan, -5e6], 3, 0, False),
        ([-27.0, math.nan, -5e6], 3, 0, True),
    ],
)
def test_an_update_that_destroys_the_policy_stops_the_run(log_p, tokens, said, stopped):
    lines = []
    watch = PrecisionWatch(Config(), lines.append)
    try:
        for step, value in enumerate(log_p):
            watch.scored(step, value, tokens)
        assert not stopped
    except RunFailure as failure:
        assert stopped and "ln P fell to" in str(failure)
    assert len(lines) == said


def test_coefficients_that_float32_cannot_hold_are_said_once():
    lines = []
    watch = PrecisionWatch(Config(), lines.append)
    watch.coefficients(StepFacts(0, 0.75, -30.0, 1e-20, 64, 1.0), vanished=False)
    assert lines == []
    watch.coefficients(StepFacts(0, 0.75, -2660.0, 1e-289, 64, 2.0**950), vanished=False)
    assert lines == []
    for step in (0, 1):
        watch.coefficients(StepFacts(step, 0.75, -2660.0, 1e-289, 64, 1.0), vanished=False)
    watch.coefficients(StepFacts(2, 0.75, -4000.0, 0.0, 64, 1.0), vanished=True)
    assert len(lines) == 2
    assert "step 0: coefficients reach below float32's smallest" in lines[0] and "--loss-scale auto" in lines[0]
    assert "q = 0.75, ln P = -2660" in lines[0] and "below float64's range" in lines[1]


@pytest.mark.parametrize(
    ("setting", "scale", "largest", "said", "unsaid"),
    [
        ("auto", 2.0**15, 2.0**-320, ["larger --q", "--finetune", "the constant 2.13599e+96", "--prompts-per"], "SGD"),
        ("auto", 2.0**1015, 1e-310, ["larger --q", "--loss-scale auto)", "--prompts-per-step"], "constant"),
        ("auto", 1.0, 1e-7, ["A larger --q trains on it."], "constant"),
        (1.0, 1.0, 1e-20, ["--loss-scale auto trains on it."], "constant"),
    ],
)
def test_a_gradient_that_the_scale_does_not_lift_is_said_with_the_ways_out(setting, scale, largest, said, unsaid):
    lines = []
    watch = PrecisionWatch(Config(optimizer=replace(ADAM, loss_scale=setting)), lines.append)
    watch.gradient(StepFacts(2, 0.25, -293.0, largest, 4, scale), 0.0, 10_000)
    [line] = lines
    assert "exactly 0" in line and all(text in line for text in said) and unsaid not in line, line


def test_coefficients_know_their_largest():
    rationale, answer = torch.tensor([[0.5, -3.0]]), torch.tensor([[1.0, 2.0]])
    assert Coefficients(rationale, answer).largest == 3.0
    assert Coefficients(rationale, answer).of_loss(0.5).answer_BM.tolist() == [[-0.5, -1.0]]
    assert Coefficients(torch.zeros(0, 2), torch.zeros(0, 2)).largest == 0.0
