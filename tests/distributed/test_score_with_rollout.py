"""ln w from the rollout's cache equals the trainer's, at every layout, for rationales that end early, late, forced."""

from dataclasses import replace

import pytest
import torch

from megatron_jq.model.build import build_policies, wrap_for_training
from megatron_jq.records import TrainingSequence
from megatron_jq.rollout.engine import RolloutRequest, SamplingOptions, share_of_replica
from megatron_jq.rollout.megatron import MegatronEngine
from megatron_jq.train.passes import BatchOptions, score, table_of_rollouts
from tests.distributed import reference
from tests.distributed.cases import SMALL, build_options
from tests.distributed.ranks import run_ranks
from tests.distributed.shards import load_whole

DEEP = replace(SMALL, num_layers=4)
TABLE = (4, 6)
CLOSE, END = 1, 2
LAYOUTS = {
    "one process": {},
    "TP2": {"tp": 2},
    "TP2 with SP": {"tp": 2, "sequence_parallel": True},
    "PP2": {"pp": 2},
    "PP2, interleaved": {"pp": 2, "virtual_stages": 2},
    "TP2 x PP2": {"tp": 2, "pp": 2},
    "DP2": {"dp": 2},
}


def _prompt(b: int) -> tuple[int, ...]:
    return tuple(range(5 + b, 9 + 3 * b))


def _gold(b: int) -> tuple[int, ...]:
    return (11, 12 + b, 13, END)[b % 4 :]


def _both(runtime, sequence_parallel: bool, virtual_stages: int):
    """[(rollouts by slot, ln w of the engine, ln w of the trainer)] for each way of generating."""
    options = build_options(DEEP, sequence_parallel=sequence_parallel, virtual_stages=virtual_stages)
    policies = build_policies(DEEP, options, runtime)
    for policy in policies:
        load_whole(policy, runtime, reference.noisy_weights(DEEP))
    model = wrap_for_training(policies, options, runtime)
    dp = runtime.groups.dp
    requests = [
        RolloutRequest(b, _prompt(b), slots, _gold(b)) for b, slots in share_of_replica(*TABLE, dp.rank(), dp.size())
    ]
    results = []
    for answer_budget, max_rows, budget in ((0, None, 9), (5, 7, 9), (0, None, 1)):
        sampling = SamplingOptions(
            budget, answer_budget, temperature=1.3, top_p=1.0, close_id=CLOSE, eos_id=END, seed=7, step=0
        )
        rollouts = MegatronEngine(policies, runtime, max_rows=max_rows).generate(requests, sampling)
        rows = [
            TrainingSequence(
                r.prompt_slot, r.rationale_slot, _prompt(r.prompt_slot), r.rationale_ids, 0, _gold(r.prompt_slot)
            )
            for r in rollouts
        ]
        trainer = score(model, rows, TABLE, runtime, BatchOptions(8))
        engine = table_of_rollouts(rollouts, TABLE, runtime)
        texts = {(r.prompt_slot, r.rationale_slot): (r.rationale_ids, r.answer_ids) for r in rollouts}
        results.append((texts, engine.table.log_w_BM, trainer.table.log_w_BM))
    return results


@pytest.fixture(scope="module")
def alone():
    return run_ranks(_both, False, 1)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_engine_and_trainer_agree_on_log_w(alone, name):
    layout = dict(LAYOUTS[name])
    sequence_parallel = layout.pop("sequence_parallel", False)
    ranks = run_ranks(_both, sequence_parallel, layout.get("virtual_stages", 1), **layout)
    for rank in ranks:
        for (texts, engine, trainer), (texts_alone, _, trainer_alone) in zip(rank, alone, strict=True):
            assert not engine.isnan().any()
            assert (engine - trainer).abs().max() < 1e-4
            assert all(texts[slot] == texts_alone[slot] for slot in texts)
            assert (trainer - trainer_alone).abs().max() < 1e-4


def test_the_cases_hold_early_late_and_forced_ends(alone):
    (texts, *_), (with_answers, *_), (short, *_) = alone
    lengths = {len(rationale) for rationale, _ in texts.values()}
    assert min(lengths) < 6 and max(lengths) == 10  # nine sampled and a forced close
    assert any(END in rationale for rationale, _ in texts.values())
    assert {len(answer) for _, answer in with_answers.values()} - {5}, "an answer ends before its budget"
    assert {len(rationale) for rationale, _ in short.values()} <= {1, 2}
    assert torch.isfinite(alone[0][1]).all()
