"""The training pass away from the plain batch: failed and absent sequences, tempered sampling, forced tokens, padding,
overlap, bf16. All passes of a layout share one launch."""

import random
from dataclasses import replace

import pytest
import torch

from megatron_jq.records import Coefficients, TrainingSequence
from megatron_jq.train.passes import BatchOptions, score
from tests.distributed import reference
from tests.distributed.cases import (
    NUM_RATIONALES,
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
from tests.distributed.shards import join

TOLERANCE = 1e-5
FAILED = (1, 1)  # a slot of the prompt that lies on two replicas
SAMPLING = {"temperature": 0.7, "top_p": 0.8}
PADDINGS = (1, 8, 64, 512)
CASES = ["failed", "one sequence", "idle replica", "temperature", "tempered", "tempered answers"]
CASES += [f"overlap, {name}" for name in POLICIES]


def failed_batch() -> list[TrainingSequence]:
    return [s for s in batch() if (s.prompt_slot, s.rationale_slot) != FAILED]


def plain_coefficients(sequences: list[TrainingSequence]) -> Coefficients:
    """Constants of mixed sign and size, zero where the table holds no sequence."""
    generator = torch.Generator().manual_seed(11)
    rationale, answer = torch.randn(2, *TABLE, dtype=torch.float64, generator=generator)
    present = torch.zeros(TABLE, dtype=torch.bool)
    for s in sequences:
        present[s.prompt_slot, s.rationale_slot] = True
    return Coefficients(rationale * present, answer * present)


def second_replica_idle() -> Coefficients:
    """Zero on slots 4..8, all of which the second of two replicas holds."""
    full = plain_coefficients(batch())
    mask = (torch.arange(9) < 4).view(TABLE)
    return Coefficients(full.rationale_BM * mask, full.answer_BM * mask)


def sampled_batch() -> list[TrainingSequence]:
    """The batch with rationales and answers drawn from the tempered nucleus, whose edges rounding could not move."""
    weights = {name: w.double() for name, w in reference.noisy_weights(SMALL).items()}
    rng, sequences = random.Random(17), []
    for s in batch():
        ids = list(s.prompt_ids)
        while len(ids) < len(s):
            logits = reference.token_logits(weights, SMALL, ids)[-1] / SAMPLING["temperature"]
            ordered, index = logits.softmax(-1).sort(descending=True)
            before = ordered.cumsum(0) - ordered
            assert (before - SAMPLING["top_p"]).abs().min() > 1e-5, "choose another seed"
            ids.append(index[rng.randrange(int((before < SAMPLING["top_p"]).sum()))].item())
        z, y = len(s.prompt_ids), len(s) - len(s.answer_ids)
        sequences.append(replace(s, rationale_ids=tuple(ids[z:y]), answer_ids=tuple(ids[y:])))
    return sequences


def other_forced_ids() -> list[TrainingSequence]:
    """The batch with every forced token replaced by another one."""
    changed = []
    for s in batch():
        forced = tuple((token + 31) % 70 for token in s.rationale_ids[s.num_sampled :])
        changed.append(replace(s, rationale_ids=s.rationale_ids[: s.num_sampled] + forced))
    assert changed != batch()
    return changed


def rows_to_pad() -> list[TrainingSequence]:
    """Sequences of 16 tokens or so, and one of 460."""
    rng = random.Random(23)
    lengths = [(9, 4, 3), (8, 5, 4), (6, 6, 3), (10, 5, 2), (7, 6, 4), (9, 3, 3), (5, 8, 3), (8, 4, 4), (50, 400, 10)]
    cut = [tuple(tuple(rng.randrange(70) for _ in range(n)) for n in part) for part in lengths]
    return [TrainingSequence(i // 3, i % 3, x, z, len(z), y) for i, (x, z, y) in enumerate(cut)]


def _passes(runtime, sampled):
    """Everything below on this rank, by name."""
    weights = reference.noisy_weights(SMALL)
    policy, model = build(runtime, SMALL, weights, build_options(SMALL, sequence_parallel=True))
    options = BatchOptions(micro_batch_size=2)
    tempered = replace(options, **SAMPLING)
    rationales_alone = Coefficients(torch.ones(TABLE).double(), torch.zeros(TABLE).double())
    everything, one = batch(), [s for s in batch() if (s.prompt_slot, s.rationale_slot) == (0, 0)]

    def train(sequences, options, coefficients):
        return train_with(runtime, policy, model, share(sequences, runtime), options, coefficients)

    results = {
        "failed": score_and_train(runtime, policy, model, share(failed_batch(), runtime), options, "garl"),
        "one sequence": train(one, options, plain_coefficients(one)),
        "idle replica": train(everything, options, second_replica_idle()),
        "temperature": train(everything, replace(options, temperature=0.7), plain_coefficients(everything)),
        "tempered": train(sampled, tempered, plain_coefficients(sampled)),
        "tempered answers": train(sampled, replace(tempered, tempered_answers=True), plain_coefficients(sampled)),
        "forced": train(everything, options, rationales_alone),
        "other forced ids": train(other_forced_ids(), options, rationales_alone),
        "padded": {
            (size, padding): score(
                model,
                share(rows_to_pad(), runtime),
                TABLE,
                runtime,
                BatchOptions(micro_batch_size=size, sequence_multiple=padding),
                with_rationale=True,
            )
            for size in (1, 9)
            for padding in PADDINGS
        },
    }
    for name, architecture in POLICIES.items():
        overlap = build_options(architecture, overlap_grad_reduce=True, use_distributed_optimizer=True)
        policy, model = build(runtime, architecture, reference.noisy_weights(architecture), overlap)
        results[f"overlap, {name}"] = train(everything, options, plain_coefficients(everything))
    return results


def _expected(sampled):
    double, everything = {name: w.double() for name, w in reference.noisy_weights(SMALL).items()}, batch()
    failed = [[None] * NUM_RATIONALES for _ in range(TABLE[0])]
    for s in failed_batch():
        failed[s.prompt_slot][s.rationale_slot] = reference.score(double, SMALL, s)[1].item()
    one = everything[:1]

    def gradients(sequences, coefficients, architecture=SMALL, **sampling):
        weights = reference.noisy_weights(architecture)
        tables = coefficients.rationale_BM.tolist(), coefficients.answer_BM.tolist()
        return reference.surrogate_gradients(weights, architecture, sequences, *tables, **sampling)[1]

    garl = Coefficients(*(torch.tensor(table, dtype=torch.float64) for table in reference.garl(failed, Q)))
    return {
        "failed": gradients(failed_batch(), garl),
        "one sequence": gradients(one, plain_coefficients(one)),
        "idle replica": gradients(everything, second_replica_idle()),
        "temperature": gradients(everything, plain_coefficients(everything), temperature=0.7),
        "tempered": gradients(sampled, plain_coefficients(sampled), **SAMPLING),
        "tempered answers": gradients(sampled, plain_coefficients(sampled), **SAMPLING, tempered_answers=True),
        **{
            f"overlap, {name}": gradients(everything, plain_coefficients(everything), architecture)
            for name, architecture in POLICIES.items()
        },
        "padded": [[x.item() for x in reference.score(double, SMALL, s)] for s in rows_to_pad()],
    }


@pytest.fixture(scope="module")
def sampled():
    return run_apart(sampled_batch)


@pytest.fixture(scope="module")
def expected(sampled):
    return run_apart(_expected, sampled)


@pytest.fixture(scope="module", params=[(1, 1, 1), (1, 1, 2), (2, 1, 1), (2, 2, 2)], ids="{0[0]}-{0[1]}-{0[2]}".format)
def ranks(request, sampled):
    tp, pp, dp = request.param
    return run_ranks(_passes, sampled, tp=tp, pp=pp, dp=dp)


def gradients_of(ranks, name):
    return join([rank[name].gradients for rank in ranks], 70, padding=0.0)


@pytest.mark.parametrize("name", CASES)
def test_gradient_equals_the_unsharded_model_with(name, ranks, expected):
    worst = reference.norm_difference(gradients_of(ranks, name), expected[name])
    print(f"{name}: {max(worst.values()):.2e}")
    assert max(worst.values()) < TOLERANCE, worst


def test_a_failed_rationale_is_absent_from_every_ranks_table(ranks):
    for rank in ranks:
        absent = ~rank["failed"].scores.table.valid_BM
        assert absent.nonzero().tolist() == [list(FAILED)]
        coefficients = rank["failed"].coefficients
        assert coefficients.rationale_BM[FAILED] == 0 and coefficients.answer_BM[FAILED] == 0


def test_forced_tokens_have_no_gradient_and_no_share_in_ln_p_of_the_rationale(ranks):
    before, after = (gradients_of(ranks, name) for name in ("forced", "other forced ids"))
    assert max(reference.norm_difference(after, {n: g.double() for n, g in before.items()}).values()) < 1e-6
    tables = [ranks[0][name].trained.table.log_z_BM for name in ("forced", "other forced ids")]
    torch.testing.assert_close(tables[0], tables[1], rtol=0, atol=1e-5)
    assert tables[0][2, 0] == 0.0  # forced throughout: p of an empty draw is 1
    embedding = before["embedding.word_embeddings.weight"]
    assert embedding.norm() > 0.1


def test_padding_and_neighbours_change_no_ln_p_beyond_rounding(ranks, expected):
    right = torch.tensor(expected["padded"], dtype=torch.float64)
    for rank in ranks:
        tables = [
            torch.stack([s.table.log_z_BM.flatten(), s.table.log_w_BM.flatten()], dim=1)
            for s in rank["padded"].values()
        ]
        spread = max((table - tables[0]).abs().max().item() for table in tables)
        relative = max(((table - right).abs() / right.abs()).max().item() for table in tables)
        assert spread < 5e-5 and relative < 1e-6, (spread, relative)
        short = max((table[:8] - tables[0][:8]).abs().max().item() for table in tables)
        assert short < 1e-5, short
    print(f"padding: {spread:.1e} nats on 400 tokens, {short:.1e} on short rows, relative to reference {relative:.1e}")
