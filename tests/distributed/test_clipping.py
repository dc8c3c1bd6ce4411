"""Two updates on one rollout with clipped ratios and a KL to a reference, against the unsharded model in float64."""

from dataclasses import dataclass, replace

import pytest
import torch

from megatron_jq.config import Config, OptimizerConfig
from megatron_jq.model.build import TrainingModel, build_policies, wrap_for_training
from megatron_jq.records import Coefficients
from megatron_jq.train.clipped_learner import ClippedLearner, OffPolicy, token_log_probs, train_by_token
from megatron_jq.train.learner import UpdateResult
from megatron_jq.train.optimizer import build_optimizer
from megatron_jq.train.passes import BatchOptions, train, training_batches
from tests.distributed import reference
from tests.distributed.cases import SMALL, TABLE, batch, build_options, gather_gradient_shards, share
from tests.distributed.ranks import run_apart, run_ranks
from tests.distributed.shards import join, load_whole, named_tensors

ARCHITECTURE = replace(SMALL, num_layers=4)
LOWER, UPPER, BETA, TEMPERATURE = 0.2, 0.3, 0.3, 0.8
START = reference.noisy_weights(ARCHITECTURE)
#: The reference differs from the start, so that the KL has a gradient in the first update too.
FROZEN = {name: w + 0.02 * torch.sign(w) for name, w in START.items()}
SGD = Config(optimizer=OptimizerConfig(optimizer="sgd", lr=0.005, sgd_momentum=0.0, clip_grad=0.0))
#: A prompt without an advantage, a sequence without one, a sequence out of the batch.
QUIET, ALONE, ABSENT = 2, (0, 1), (1, 2)


def coefficients(*, with_kl: bool = False) -> Coefficients:
    """One advantage a sequence, as GRPO's, of both signs, denominators included."""
    advantage_BM = torch.randn(TABLE, dtype=torch.float64, generator=torch.Generator().manual_seed(11)) / 9
    advantage_BM[QUIET], advantage_BM[ALONE], advantage_BM[ABSENT] = 0.0, 0.0, 0.0
    return Coefficients(advantage_BM, advantage_BM.clone(), kl_weights() if with_kl else None)


def kl_weights() -> torch.Tensor:
    weight_BM = torch.full(TABLE, BETA / 9, dtype=torch.float64)
    weight_BM[ABSENT] = 0.0
    return weight_BM


@dataclass(frozen=True)
class Case:
    ranks: dict
    batch: BatchOptions
    options: dict
    beta: bool = True


OPTIONS = BatchOptions(micro_batch_size=2, temperature=TEMPERATURE, tempered_answers=True)
PACKED = replace(OPTIONS, max_tokens=48)
CASES = {
    "alone": Case({}, OPTIONS, {}),
    "clipping alone": Case({}, OPTIONS, {}, beta=False),
    "TP2 with SP, packed": Case({"tp": 2}, PACKED, {"sequence_parallel": True}),
    "PP2, prompts not shared": Case({"pp": 2}, replace(OPTIONS, share_prompts=False), {}),
    "DP2, packed, sharded": Case({"dp": 2}, PACKED, {"use_distributed_optimizer": True}),
    "PP2, interleaved": Case({"pp": 2, "virtual_stages": 2}, OPTIONS, {"virtual_stages": 2}),
}


@dataclass(frozen=True)
class Left:
    """What a rank has after two updates: gradients of both, parameters behind the first, and the figures."""

    gradients: list
    between: list
    trained: UpdateResult


def _frozen(runtime, options) -> TrainingModel:
    policies = build_policies(ARCHITECTURE, options, runtime)
    for policy in policies:
        load_whole(policy, runtime, FROZEN)
        policy.requires_grad_(requires_grad=False)
    return TrainingModel(policies)


def _trained(runtime, options):
    policies = build_policies(ARCHITECTURE, options, runtime)
    for policy in policies:
        load_whole(policy, runtime, START)
    return policies, wrap_for_training(policies, options, runtime)


def _two_updates(runtime, case: Case) -> Left:
    options = build_options(ARCHITECTURE, params_dtype=torch.float64, **case.options)
    policies, model = _trained(runtime, options)
    parallel = replace(SGD.parallel, use_distributed_optimizer=False)
    optimizer = (
        build_optimizer(model, replace(SGD, parallel=parallel), runtime)
        if not case.options.get("use_distributed_optimizer")
        else None
    )
    gradients, between = [], []

    def named(of):
        return [named_tensors(policy, runtime, of) for policy in policies]

    class Observed(ClippedLearner):
        """Plain steps of SGD in place of schedule, checks and clipping; notes what each leaves."""

        def begin(self, coefficients):
            return self.options

        def apply(self, sequences, table):
            gather_gradient_shards(model)
            gradients.append(named(lambda p: p.main_grad.clone()))
            if optimizer is None:
                _descend(model)
            else:
                with runtime.megatron():
                    assert optimizer.step()[0]
            between.append(named(lambda p: p))
            return float(len(gradients))

    learner = Observed(
        model,
        _NoOptimizer() if optimizer is None else optimizer,
        schedule=None,
        numerics=None,
        runtime=runtime,
        options=case.batch,
        reference=_frozen(runtime, options) if case.beta else None,
        iterations=2,
        lower=LOWER,
        upper=UPPER,
    )
    trained = learner.update(share(batch(), runtime), coefficients(with_kl=case.beta))
    return Left(gradients, between[0], trained)


class _NoOptimizer:
    """Megatron-core's distributed optimizer knows Adam alone."""

    def zero_grad(self) -> None:
        pass


@torch.no_grad()
def _descend(model) -> None:
    for _, parameter in model.named_parameters():
        parameter -= SGD.optimizer.lr * parameter.main_grad


def _token_log_probs(weights, sequence) -> torch.Tensor:
    """Of the sampled rationale's tokens, then the answer's."""
    ids = (*sequence.prompt_ids, *sequence.rationale_ids, *sequence.answer_ids)
    log_probs = reference.tempered_log_probs(reference.token_logits(weights, ARCHITECTURE, ids), TEMPERATURE)
    z, y = len(sequence.prompt_ids), len(sequence.prompt_ids) + len(sequence.rationale_ids)
    places = [*range(z, z + sequence.num_sampled), *range(y, len(ids))]
    return torch.stack([log_probs[t - 1, ids[t]] for t in places])


def _double(weights):
    return {name: w.double() for name, w in weights.items()}


def _expected(weights, beta: bool):
    """(loss, its gradient, clipped fraction, KL a token) at these weights, written out from the paper's formula."""
    leaves = {name: w.double().requires_grad_() for name, w in weights.items()}
    loss, ratios, kls = torch.zeros((), dtype=torch.float64), [], []
    for s in batch():
        slot = s.prompt_slot, s.rationale_slot
        now, advantage = _token_log_probs(leaves, s), coefficients().rationale_BM[slot]
        old, frozen = (_token_log_probs(_double(w), s).detach() for w in (START, FROZEN))
        ratio = (now - old).exp()
        clipped = torch.clamp(ratio, 1 - LOWER, 1 + UPPER)
        surrogate = torch.minimum(ratio * advantage, clipped * advantage)
        kl = (frozen - now).exp() - (frozen - now) - 1
        loss = loss - surrogate.sum() + beta * kl_weights()[slot] * kl.sum()
        if advantage != 0:
            ratios.append(torch.stack([ratio.detach(), clipped.detach(), torch.full_like(old, advantage)]))
        if kl_weights()[slot] != 0:
            kls.append(kl.detach())
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    ratio, clipped, advantage = torch.cat(ratios, dim=1)
    assert min((ratio - bound).abs().min() for bound in (1 - LOWER, 1 + UPPER)) > 1e-5, "choose another learning rate"
    flat = (ratio != clipped) & ((ratio > 1) == (advantage > 0))
    return gradients, flat.double().mean().item(), torch.cat(kls).mean().item()


@pytest.fixture(scope="module")
def first():
    return {beta: run_apart(_expected, START, beta) for beta in (False, True)}


@pytest.mark.parametrize("name", CASES)
def test_both_updates_gradients_are_those_of_the_unsharded_formula(name, first):
    case = CASES[name]
    ranks = run_ranks(_two_updates, case, **case.ranks)

    def whole(of, padding=0.0):
        return join([chunk for rank in ranks for chunk in of(rank)], SMALL.vocab_size, padding=padding)

    weights = whole(lambda rank: rank.between, padding=None)
    moved, clipped, _ = run_apart(_expected, weights, case.beta)
    for number, expected in enumerate((first[case.beta][0], moved)):
        gap = reference.norm_difference(whole(lambda rank, n=number: rank.gradients[n]), expected)
        print(f"\n{name}: update {number + 1} off by {max(gap.values()):.1e}, clipped {clipped:.3f}")
        assert max(gap.values()) < 3e-6, gap  # the rotary angles are float32
    assert 0.1 < clipped < 0.9, "choose another learning rate: the ratio must have passed the bounds for some tokens"
    for rank in ranks:
        found = rank.trained
        assert found.grad_norm == 2.0  # the last update's
        assert found.clipped_fraction == pytest.approx(clipped / 2, rel=1e-12)  # none in the first update
        assert found.kl_reference_mean == (pytest.approx(first[True][2], rel=1e-5) if case.beta else None)
        present = found.trained.table.valid_BM
        assert not present[ABSENT] and present[ALONE].item() is present[QUIET].all().item() is case.beta


def _at_the_start(runtime, options: BatchOptions):
    """Plain gradients, those of a rule that changes nothing, and whether ln p of equal weights is equal."""
    built = build_options(ARCHITECTURE, sequence_parallel=runtime.groups.tp.size() > 1)
    policies, model = _trained(runtime, built)
    frozen = TrainingModel(_trained(runtime, built)[0])
    mine, gradients = share(batch(), runtime), []
    batches = training_batches(model, mine, coefficients(with_kl=True), runtime, options)
    other = token_log_probs(frozen, batches, runtime, options)
    model.zero_grad_buffer()
    with_kl = OffPolicy(LOWER, UPPER, None, other)
    done = train_by_token(model, batches, coefficients(with_kl=True), with_kl, runtime, options)
    same = [torch.equal(a, b) for a, b in zip(done.log_prob, other, strict=True)]
    model.zero_grad_buffer()
    zero = Coefficients(torch.zeros(TABLE).double(), torch.zeros(TABLE).double(), kl_weights())
    train_by_token(model, batches, zero, with_kl, runtime, options)
    still = all((p.main_grad == 0).all() for _, p in model.named_parameters())
    for plain in (True, False):
        model.zero_grad_buffer()
        if plain:
            train(model, mine, coefficients(), runtime, options)
        else:
            batches = training_batches(model, mine, coefficients(), runtime, options)
            train_by_token(model, batches, coefficients(), OffPolicy(LOWER, UPPER), runtime, options)
        gradients.append([named_tensors(policy, runtime, lambda p: p.main_grad.clone())[1] for policy in policies])
    return gradients, same, still, done.figures


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}, {"dp": 2}], ids=str)
def test_where_nothing_has_moved_the_ratio_is_1_and_the_kl_is_0_bit_for_bit(layout):
    for rank in run_ranks(_at_the_start, PACKED, **layout):
        (plain, ruled), same, still, figures = rank
        for a, b in zip(plain, ruled, strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
        assert all(same) and still
        assert (figures.clipped, figures.kl_sum, figures.kl_loss) == (0, 0, 0) and figures.with_kl > 0


def _one_sequence(runtime):
    """As two updates, where all but one replica are idle."""
    options = build_options(ARCHITECTURE)
    _, model = _trained(runtime, options)
    batches = training_batches(model, share(batch()[:1], runtime), coefficients(), runtime, OPTIONS)
    other = token_log_probs(_frozen(runtime, options), batches, runtime, OPTIONS)
    rule = OffPolicy(LOWER, UPPER, other, other)  # ratios against another policy, too
    return train_by_token(model, batches, coefficients(with_kl=True), rule, runtime, OPTIONS).figures


def test_figures_are_alike_where_a_replica_has_no_sequence():
    [alone] = run_ranks(_one_sequence)
    assert alone.kl_sum > 0 and 0 < alone.clipped < alone.with_advantage == alone.with_kl
    for figures in run_ranks(_one_sequence, dp=2):
        assert vars(figures) == pytest.approx(vars(alone), rel=1e-6)
