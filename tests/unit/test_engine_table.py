"""The table of engines, and the contract that every engine's rollouts are held to. Runs: test_engine_contract.py."""

from dataclasses import replace

import pytest

from megatron_jq.config import Config, parse_args
from megatron_jq.errors import UserError
from megatron_jq.records import Rollout
from megatron_jq.rollout import engines
from megatron_jq.rollout.contract import broken_promise
from megatron_jq.rollout.engine import Capabilities, RolloutRequest, SamplingOptions
from megatron_jq.rollout.engines import ENGINES, EngineRow, engine_row

CLOSE, END, VOCABULARY = 3, 4, 70
OPTIONS = SamplingOptions(3, 0, 1.0, 1.0, close_id=CLOSE, eos_id=END, seed=1, step=2)
ANSWERED = replace(OPTIONS, answer_budget=2)
ELSEWHERE = Capabilities(
    draws=True, scores_gold=True, samples_answers=True, gives_log_prob=True, shares_weights=False, every_rank=False
)
SLOTS = [(5, 0), (5, 2), (6, 1)]


def requests(**changes) -> list[RolloutRequest]:
    return [RolloutRequest(5, (9, 8), (0, 2), **changes), RolloutRequest(6, (9,), (1,), **changes)]


def rollouts(**changes) -> list[Rollout]:
    """One that closes itself, one that ends the text, one that spends its budget; the changes in the second."""
    good = [
        Rollout(5, 0, (7, CLOSE), 2, log_prob=-1.0),
        Rollout(5, 2, (7, END, CLOSE), 2, log_prob=-2.0),
        Rollout(6, 1, (7, 8, 9, CLOSE), 3, log_prob=-3.0),
    ]
    return [good[0], replace(good[1], **changes), good[2]]


def problem(drawn, asked=None, options=OPTIONS, capabilities=ELSEWHERE) -> str | None:
    return broken_promise(drawn, asked or requests(), options, VOCABULARY, capabilities)


def test_every_way_to_end_keeps_the_contract():
    assert problem(rollouts()) is None
    assert problem(rollouts(valid=False, rationale_ids=(), num_sampled=0)) is None  # one that failed leaves M
    answers = [(END,), (7, 8), (7, END)]
    answered = [replace(r, answer_ids=ids) for r, ids in zip(rollouts(), answers, strict=True)]
    assert problem(answered, options=ANSWERED) is None
    scored = [replace(r, log_w=-0.5) for r in rollouts()]
    assert problem(scored, requests(gold_ids=(1, 2))) is None


#: What the second rollout has instead → what is said of it.
BROKEN = {
    "another slot": ({"rationale_slot": 1}, "slot (5, 1) came back in its place"),
    "a list": ({"rationale_ids": [7, CLOSE]}, "rationale_ids must be a tuple of int"),
    "a float": ({"rationale_ids": (7.0, CLOSE)}, "rationale_ids must be a tuple of int"),
    "another vocabulary": ({"rationale_ids": (VOCABULARY, CLOSE)}, "token 70 was sampled, and the vocabulary has 70"),
    "a negative id": ({"rationale_ids": (-1, CLOSE)}, "token -1 was sampled"),
    "nothing sampled": ({"rationale_ids": (CLOSE,), "num_sampled": 0}, "num_sampled is 0"),
    "nothing at all": ({"rationale_ids": (), "num_sampled": 0}, "num_sampled is 0"),
    "beyond the budget": ({"rationale_ids": (7, 7, 7, CLOSE), "num_sampled": 4}, "between 1 and 3 sampled tokens"),
    "no close token": ({"rationale_ids": (7, END)}, "does not end with the close token, 3"),
    "tokens after the sampled": ({"rationale_ids": (7, END, 9, CLOSE)}, "a close token alone is put there by force"),
    "closed twice": ({"rationale_ids": (7, CLOSE, CLOSE)}, "a close token alone is put there by force"),
    "on after the close token": ({"rationale_ids": (CLOSE, 7, CLOSE), "num_sampled": 3}, "goes on after its close"),
    "on after the end": ({"rationale_ids": (END, 7, CLOSE), "num_sampled": 2}, "goes on after its close token or"),
    "cut early": ({"rationale_ids": (7, 8, CLOSE)}, "closed by force after 2 tokens of 3"),
    "an unasked answer": ({"answer_ids": (7,)}, "1 answer tokens with an answer budget of 0"),
    "no ln p": ({"log_prob": None}, "log_prob is None, and the engine's row declares gives_log_prob"),
    "ln p above 0": ({"log_prob": 0.5}, "log_prob is 0.5; the logarithm of a probability is finite and at most 0"),
    "ln p not a number": ({"log_prob": float("nan")}, "log_prob is nan"),
    "ln w infinite": ({"log_w": float("-inf")}, "log_w is -inf"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_the_contract_is_said_with_its_slot(name):
    changes, words = BROKEN[name]
    told = problem(rollouts(**changes))
    assert told is not None and told.startswith("prompt slot 5, rationale slot 2: ") and words in told, told


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((), "0 answer tokens with an answer budget of 2"),
        ((7, 8, 9), "3 answer tokens with an answer budget of 2"),
        ((END, 7), "the answer goes on after the end of the text"),
        ((7,), "the answer ends after 1 tokens of 2, and not with the end of the text"),
    ],
)
def test_an_answer_that_breaks_the_contract_is_said(answer, words):
    told = problem([replace(r, answer_ids=answer) for r in rollouts()], options=ANSWERED)
    assert told == f"prompt slot 5, rationale slot 0: {words}"


def test_rollouts_that_are_missing_or_no_rollouts_are_said():
    assert problem(rollouts()[:2]) == "3 slots were asked for, 2 rollouts came back"
    assert problem(None) == problem([(7, CLOSE)] * 3) == "it must return a list of Rollout"
    unscored = problem(rollouts(), requests(gold_ids=(1,)))
    assert unscored == "prompt slot 5, rationale slot 0: log_w is None, and y* was given to be scored"


def test_figures_of_shared_weights_that_are_not_finite_are_left_to_the_step_which_keeps_the_batch():
    assert problem(rollouts(log_prob=float("nan")), capabilities=ENGINES["megatron"].capabilities) is None


def test_an_engine_that_draws_nothing_returns_what_it_was_given():
    asked, row = requests(given_ids=(7, 7, 7, 7, CLOSE)), ENGINES["given"]
    drawn = row.load(None).generate(asked, OPTIONS)
    assert problem(drawn, asked, capabilities=row.capabilities) is None
    told = problem(rollouts(), asked, capabilities=row.capabilities)
    assert told == "prompt slot 5, rationale slot 0: it is not the rationale that was given"


@pytest.mark.parametrize("name", ENGINES)
def test_every_row_names_a_class_or_function_with_the_protocol(name):
    row = ENGINES[name]
    assert row.name == name and len(row.description) > 10
    module, _, attribute = row.build.partition(":")
    assert callable(getattr(__import__(module, fromlist=[attribute]), attribute))


def test_an_engine_of_one_rank_cannot_share_weights():
    with pytest.raises(AssertionError, match="one rank alone does not hold the shared weights"):
        EngineRow(name="x", description="", build="x:x", capabilities=replace(ELSEWHERE, shares_weights=True))


def chosen(flags: str, monkeypatch, **capabilities) -> EngineRow:
    row = EngineRow(name="mute", description="", build="x:x", capabilities=replace(ELSEWHERE, **capabilities))
    monkeypatch.setattr(engines, "ENGINES", {**ENGINES, "mute": row})
    return engine_row(parse_args(flags.split()))


def test_the_estimator_s_needs_choose_the_engine_and_refuse_what_it_lacks(monkeypatch):
    assert engine_row(Config()).name == "megatron"
    for estimator in ("sft", "pretrain"):
        assert chosen(f"--estimator {estimator}", monkeypatch).name == "given"
    assert chosen("--rollout-engine mute --estimator grpo --score-with rollout", monkeypatch).name == "mute"
    for flags, lacking, words in (
        ("--rollout-engine mute --estimator rloo", "samples_answers", "samples no answers, which"),
        ("--rollout-engine mute --score-with rollout", "scores_gold", "use --score-with trainer"),
        ("--rollout-engine nowhere", "scores_gold", "nowhere: there is no such engine; choose megatron or"),
        ("--rollout-engine given", "scores_gold", "--rollout-engine given: there is no such engine"),
    ):
        with pytest.raises(UserError, match=words):
            chosen(flags, monkeypatch, **{lacking: False})


class Whole:
    """Every part of the protocol, and nothing in it."""

    def __init__(self, setup):
        self.version = None

    def update_weights(self, version, named_weights): ...

    def generate(self, requests, options): ...

    def close(self): ...


def without(part: str) -> type:
    """An engine whose author forgot `part`."""
    members = {name: member for name, member in vars(Whole).items() if name != part and not name.startswith("__")}
    if part != "version":
        members["version"] = None
    return type("Forgetful", (), {**members, "__init__": lambda self, setup: None})


@pytest.mark.parametrize("part", ["version", "update_weights", "generate", "close"])
def test_an_engine_that_lacks_a_part_is_refused_when_it_is_built(part, monkeypatch):
    row = EngineRow(name="mine", description="", build=f"{__name__}:Whole", capabilities=ELSEWHERE)
    row.load(None)
    monkeypatch.setitem(globals(), "Whole", without(part))
    with pytest.raises(UserError, match=f"^--rollout-engine mine: .*:Whole lacks {part}, which every engine has"):
        row.load(None)
