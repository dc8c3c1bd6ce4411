"""What every engine that draws promises, run with the engine itself, and how failures of one rank end all.

Each row of ENGINES that draws is run through the contract without a line added here. Beside them: an engine that draws
elsewhere with the weights that it is sent.
"""

import time
from dataclasses import replace

import pytest
import torch

from megatron_jq.checkpoint.export import export_hf_tensors
from megatron_jq.config import Config
from megatron_jq.errors import RunFailure, UserError
from megatron_jq.records import Rollout, TrainingSequence
from megatron_jq.rollout import engines
from megatron_jq.rollout.checked import CheckedEngine
from megatron_jq.rollout.engine import EngineSetup, RolloutRequest, SamplingOptions, share_of_replica
from megatron_jq.train.passes import BatchOptions, score
from tests.distributed import reference
from tests.distributed.cases import SMALL, build, build_options
from tests.distributed.elsewhere import ELSEWHERE
from tests.distributed.ranks import run_ranks

ROWS = {row.name: row for row in (*engines.ENGINES.values(), ELSEWHERE) if row.capabilities.draws}
LAYOUTS = {"TP1": {}, "TP2": {"tp": 2}, "PP2": {"pp": 2}, "DP2": {"dp": 2}}
SHAPE = (3, 4)
CLOSE, END = 3, 4
OPTIONS = SamplingOptions(6, 0, 1.0, 1.0, close_id=CLOSE, eos_id=END, seed=11, step=0)
GOLD = (5, 6, 69)
#: ln p of the engine and of the trainer, nats: float32 on both sides.
TOLERANCE = 1e-3


def _prompt(b: int) -> tuple[int, ...]:
    return tuple((7 * b + 3 * i) % 70 for i in range(3 + 4 * b))


def _config() -> Config:
    config, shape = Config(), {name: getattr(SMALL, name) for name in ("num_layers", "hidden_size", "ffn_hidden_size")}
    shape |= {name: getattr(SMALL, name) for name in ("num_attention_heads", "num_query_groups", "kv_channels")}
    return replace(config, model=replace(config.model, **shape))


def _setup(runtime, seed: int = 7):
    weights = reference.noisy_weights(SMALL, embedding_scale=0.25, seed=seed)
    policy, model = build(runtime, SMALL, weights, build_options(SMALL))
    return EngineSetup(_config(), runtime, [policy], 70), model


def _requests(runtime, **changes) -> list[RolloutRequest]:
    dp = runtime.groups.dp
    share = share_of_replica(*SHAPE, dp.rank(), dp.size())
    return [RolloutRequest(b, _prompt(b), slots, **changes) for b, slots in share]


def _trainer(runtime, model, rollouts, options):
    rows = [
        TrainingSequence(r.prompt_slot, r.rationale_slot, _prompt(r.prompt_slot), r.rationale_ids, r.num_sampled, GOLD)
        for r in rollouts
    ]
    batch = BatchOptions(8, temperature=options.temperature, top_p=options.top_p)
    return score(model, rows, SHAPE, runtime, batch, with_rationale=True).table


def _by_slot(rollouts: list[Rollout]) -> dict:
    return {(r.prompt_slot, r.rationale_slot): r for r in rollouts}


def _run_contract(runtime, name: str):
    """Rollouts by what was asked for, and the largest gap to the trainer's ln p and ln w, before and after an update.
    """
    setup, model = _setup(runtime)
    engine, drawn, gaps = CheckedEngine(ROWS[name], setup), {}, []
    capabilities = ROWS[name].capabilities
    gold = GOLD if capabilities.scores_gold else None
    for version, seed in ((0, 7), (1, 8)):
        if version:
            [policy], other = setup.policies, reference.noisy_weights(SMALL, embedding_scale=0.25, seed=seed)
            shards = build(runtime, SMALL, other, build_options(SMALL))[0].parameters()
            with torch.no_grad():
                for parameter, shard in zip(policy.parameters(), shards, strict=True):
                    parameter.copy_(shard)
        engine.update_weights(version, lambda: export_hf_tensors(setup.policies, runtime, SMALL, everywhere=True))
        for options in (OPTIONS, replace(OPTIONS, temperature=0.8, top_p=0.9))[: version + 1]:
            rollouts = engine.generate(_requests(runtime, gold_ids=gold), options)
            trainer = _trainer(runtime, model, rollouts, options)
            for slot, r in _by_slot(rollouts).items():
                if capabilities.gives_log_prob:
                    gaps.append(abs(r.log_prob - trainer.log_z_BM[slot].item()))
                if capabilities.scores_gold:
                    gaps.append(abs(r.log_w - trainer.log_w_BM[slot].item()))
            drawn[f"version {version}, temperature {options.temperature}"] = _by_slot(rollouts)
    requests = _requests(runtime)
    drawn["again"] = _by_slot(engine.generate(requests, OPTIONS))
    alone = [replace(r, rationale_slots=(m,)) for r in requests for m in r.rationale_slots]
    drawn["alone"] = _by_slot([engine.generate([request], OPTIONS)[0] for request in alone[:5]])
    drawn["another step"] = _by_slot(engine.generate(requests, replace(OPTIONS, step=1)))
    drawn["one token"] = _by_slot(engine.generate(requests, replace(OPTIONS, rationale_budget=1)))
    if capabilities.samples_answers:
        drawn["answers"] = _by_slot(engine.generate(requests, replace(OPTIONS, answer_budget=2)))
    engine.close()
    return drawn, max(gaps, default=0.0)


@pytest.fixture(scope="module")
def results():
    """{(row, layout): results by rank}, each run once."""
    return {(name, layout): run_ranks(_run_contract, name, **LAYOUTS[layout]) for name in ROWS for layout in LAYOUTS}


def alike(rollouts: dict, others: dict) -> float:
    """Share of the slots in both that drew the same: rounding may decide one now and then."""
    slots = rollouts.keys() & others.keys()
    return sum(rollouts[slot].rationale_ids == others[slot].rationale_ids for slot in slots) / len(slots)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ROWS)
def test_a_slot_draws_by_weights_seed_step_and_slot_alone(name, layout, results):
    """Whatever is in the batch, however the policy lies; and every rank of a replica has the same, to the last bit."""
    at_one = results[name, "TP1"][0][0]
    replicas = {}
    for rank, (drawn, _) in enumerate(results[name, layout]):
        assert replicas.setdefault(rank if layout == "DP2" else 0, drawn) == drawn
        reference_draws = drawn["version 1, temperature 1.0"]
        assert alike(drawn["again"], reference_draws) >= 0.9 and alike(drawn["alone"], reference_draws) >= 0.9
        assert all(alike(drawn[what], at_one[what]) >= 0.9 for what in drawn if what != "alone")
        assert alike(drawn["another step"], reference_draws) < 0.5
        assert alike(drawn["version 0, temperature 1.0"], reference_draws) < 0.5
    slots = {slot for drawn in replicas.values() for slot in drawn["again"]}
    assert slots == {(b, m) for b in range(SHAPE[0]) for m in range(SHAPE[1])}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ROWS)
def test_ln_p_and_ln_w_are_the_trainer_s_before_and_after_an_update(name, layout, results):
    gap = max(rank[1] for rank in results[name, layout])
    print(f"{name}, {layout}: within {gap:.1e}")
    assert gap < TOLERANCE


@pytest.mark.parametrize("name", ROWS)
def test_every_way_to_end_occurs(name, results):
    drawn = results[name, "TP1"][0][0]
    tempered = drawn["version 1, temperature 1.0"] | {(9, *slot): r for slot, r in drawn["another step"].items()}
    last = {r.rationale_ids[: r.num_sampled][-1] for r in tempered.values()}
    assert CLOSE in last or END in last, "choose another seed"
    assert any(r.forced and r.num_sampled == OPTIONS.rationale_budget for r in tempered.values())
    assert all(len(r.rationale_ids) <= 2 for r in drawn["one token"].values())
    if "answers" in drawn:
        assert any(r.answer_ids for r in drawn["answers"].values())


# What goes wrong


class Refused(UserError):
    def __init__(self, flag, fix):
        super().__init__(f"{flag}: {fix}")


class Failing:
    """Draws one token a rationale, and fails as its name says."""

    def __init__(self, setup: EngineSetup):
        self.version, self.mode = None, setup.config.training.run_dir

    def update_weights(self, version, named_weights):
        tensors = named_weights()
        next(tensors)
        if self.mode == "raises in the middle of the weights":
            raise ConnectionError("the server is gone")
        if self.mode == "hangs in the middle of the weights":
            time.sleep(30)
        if self.mode != "leaves weights untaken":
            list(tensors)
        if self.mode == "takes weights twice":
            list(named_weights())
        if self.mode != "is stale" or version == 0:
            self.version = version

    def generate(self, requests, options):
        if self.mode == "raises":
            raise ValueError("no tokens today")
        if self.mode == "is refused":
            raise UserError("--rollout-url: give one")
        if self.mode == "is refused in a class of its own":
            raise Refused("--rollout-url", "give two")
        if self.mode == "hangs":
            time.sleep(30)
        ids = (70, CLOSE) if self.mode == "has another vocabulary" else (CLOSE,)
        count = None if self.mode == "counts in no number" else 1
        if self.mode == FAILED_ONES:
            return [Rollout(r.prompt_slot, m, [70], 0, valid=False) for r in requests for m in r.rationale_slots]
        return [Rollout(r.prompt_slot, m, ids, count, log_prob=-1.0) for r in requests for m in r.rationale_slots]

    def close(self):
        raise RuntimeError("what is over is over")


#: No failure: a rationale that failed may carry whatever there is of it.
FAILED_ONES = "brings parts of rationales that failed"
#: How it fails → what every rank says.
FAILURES = {
    "raises": "step 0: rollout engine failing: generate failed: ValueError: no tokens today (test_engine_contract.py:",
    "is refused": "--rollout-url: give one",
    "is refused in a class of its own": "--rollout-url: give two",
    "counts in no number": "rollout engine failing: what generate returned cannot be checked: TypeError: ",
    "hangs in the middle of the weights": "step 0: rollout engine failing: update_weights did not return within 1.8 s",
    "hangs": "step 0: rollout engine failing: generate did not return within 1.8 s (90 % of --distributed-timeout-min",
    "has another vocabulary": "prompt slot 0, rationale slot 0: token 70 was sampled, and the vocabulary has 70 tokens",
    "is stale": "step 1: rollout engine failing draws with weights of version 0, and the trainer's are of version 1",
    "leaves weights untaken": "step 0: rollout engine failing: update_weights took 1 of the policy's 24 tensors; it",
    "takes weights twice": "update_weights called named_weights twice; the tensors are handed over once",
    "raises in the middle of the weights": "step 0: rollout engine failing: update_weights failed: ConnectionError: ",
}


def _fail(runtime, modes):
    setup, _ = _setup(runtime)
    told = {}
    for mode in modes:
        config = replace(setup.config, training=replace(setup.config.training, run_dir=mode))
        config = replace(config, parallel=replace(config.parallel, distributed_timeout_minutes=2 / 60))
        row = replace(ELSEWHERE, name="failing", build="tests.distributed.test_engine_contract:Failing")
        engine = CheckedEngine(row, replace(setup, config=config))
        try:
            for step in range(2):
                engine.update_weights(step, lambda: export_hf_tensors(setup.policies, runtime, SMALL, everywhere=True))
                engine.generate(_requests(runtime), replace(OPTIONS, step=step))
        except (RunFailure, UserError) as error:
            told[mode] = type(error), str(error)
        engine.close()
    return told


@pytest.mark.parametrize("layout", ["TP2", "DP2"])
def test_a_failure_of_one_rank_is_raised_on_all(layout):
    for told in run_ranks(_fail, [*FAILURES, FAILED_ONES], **LAYOUTS[layout]):
        assert FAILED_ONES not in told
        for mode, words in FAILURES.items():
            kind, message = told[mode]
            assert words in message, (mode, message)
            assert kind is (UserError if mode.startswith("is refused") else RunFailure)


def _differ(runtime):
    """An engine declared as one of every rank whose ranks draw for themselves; DP ranks may."""
    setup, _ = _setup(runtime)
    engine = CheckedEngine(ROWS["megatron"], setup)
    engine.update_weights(0, iter)
    ids = (CLOSE,) if runtime.rank == 0 else (END, CLOSE)
    engine.engine.generate = lambda requests, options: [
        Rollout(r.prompt_slot, m, ids, 1, log_prob=-1.0) for r in requests for m in r.rationale_slots
    ]
    try:
        return len(engine.generate(_requests(runtime), OPTIONS))
    except RunFailure as error:
        return str(error)


def test_ranks_of_one_replica_that_draw_differently_are_refused():
    for told in run_ranks(_differ, tp=2):
        assert "rank 1 and rank 0 hold one replica and drew different rollouts; declare every_rank=False" in told
    assert run_ranks(_differ, dp=2) == [6, 6]
