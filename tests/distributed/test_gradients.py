"""Scores, coefficients and every parameter's gradient, at every layout, against the unsharded reference."""

import itertools

import pytest
import torch

from megatron_jq.seeds import stream
from megatron_jq.train.passes import BatchOptions
from tests.distributed import reference
from tests.distributed.cases import (
    NUM_PROMPTS,
    NUM_RATIONALES,
    POLICIES,
    Q,
    batch,
    build,
    build_options,
    score_and_train,
    share,
)
from tests.distributed.ranks import run_apart, run_ranks
from tests.distributed.shards import join

TOLERANCE = 1e-5
LAYOUTS = list(itertools.product((1, 2), repeat=3))
ESTIMATORS = ("garl", "paft")
BATCHES = {
    "one at a time": BatchOptions(micro_batch_size=1),
    "four at a time": BatchOptions(micro_batch_size=4),
    "four, padded": BatchOptions(micro_batch_size=4, sequence_multiple=16),
    "by tokens, padded": BatchOptions(micro_batch_size=1, max_tokens=48, sequence_multiple=8),
}


def _reference(policy: str):
    """Per-sequence ln p, and coefficients and gradients by estimator, of the whole batch."""
    architecture, sequences = POLICIES[policy], batch()
    weights = {name: w.double() for name, w in reference.noisy_weights(architecture).items()}
    scored = {(s.prompt_slot, s.rationale_slot): reference.score(weights, architecture, s) for s in sequences}
    tables = [
        [[scored[b, m][column].item() for m in range(NUM_RATIONALES)] for b in range(NUM_PROMPTS)] for column in (0, 1)
    ]
    draws = torch.from_numpy(stream("PAFT's draws", 5, 0).random((NUM_PROMPTS, NUM_RATIONALES)))
    joint = reference.paft(tables[1], Q, draws)
    coefficients = {"garl": reference.garl(tables[1], Q), "paft": (joint, joint)}
    gradients = {
        name: reference.surrogate_gradients(weights, architecture, sequences, *coefficients[name])[1]
        for name in ESTIMATORS
    }
    return tables, coefficients, gradients


@pytest.fixture(scope="module")
def references():
    return {policy: run_apart(_reference, policy) for policy in POLICIES}


def _passes(runtime, sequence_parallel: bool):
    """{(policy, estimator, way of cutting micro-batches): Pass} of this rank."""
    results = {}
    for name, architecture in POLICIES.items():
        options = build_options(architecture, sequence_parallel=sequence_parallel)
        policy, model = build(runtime, architecture, reference.noisy_weights(architecture), options)
        assert policy.config.sequence_parallel == (sequence_parallel and runtime.groups.tp.size() > 1)
        for which, cut in itertools.product(ESTIMATORS, BATCHES):
            results[name, which, cut] = score_and_train(
                runtime, policy, model, share(batch(), runtime), BATCHES[cut], which
            )
    return results


LAYOUTS_AND_SP = [(*layout, False) for layout in LAYOUTS] + [(*layout, True) for layout in LAYOUTS if layout[0] == 2]


@pytest.mark.parametrize(("tp", "pp", "dp", "sequence_parallel"), LAYOUTS_AND_SP)
def test_scores_coefficients_and_gradients_equal_the_unsharded_model(references, tp, pp, dp, sequence_parallel):
    ranks = run_ranks(_passes, sequence_parallel, tp=tp, pp=pp, dp=dp)
    worst = {}
    for case in ranks[0]:
        policy, which, _ = case
        (log_rationale, log_answer), coefficients, gradients = references[policy]
        for rank in ranks:
            done = rank[case]
            torch.testing.assert_close(done.scores.table.log_z_BM, torch.tensor(log_rationale).double(), **close())
            torch.testing.assert_close(done.scores.table.log_w_BM, torch.tensor(log_answer).double(), **close())
            for mine, theirs in zip(_both(done.coefficients), coefficients[which], strict=True):
                theirs = torch.tensor(theirs).double()
                assert (mine - theirs).norm() < TOLERANCE * theirs.norm(), (case, mine, theirs)
        found = join([rank[case].gradients for rank in ranks], POLICIES[policy].vocab_size, padding=0.0)
        for name, difference in reference.norm_difference(found, gradients[which]).items():
            worst[difference] = (case, name)
    largest = max(worst)
    print(f"\ntp {tp} pp {pp} dp {dp} sp {sequence_parallel}: {largest:.2e} at {worst[largest]}")
    assert largest < TOLERANCE, worst[largest]


def close():
    return {"rtol": 1e-6, "atol": 1e-5}


def _both(coefficients):
    return coefficients.rationale_BM, coefficients.answer_BM
