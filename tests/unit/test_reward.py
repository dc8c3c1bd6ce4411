"""A reward of the user's own: how it is called, what it may return, and every way in which it can fail, by its name."""

import math

import pytest

from megatron_jq.config import Config, ObjectiveConfig, TrainingConfig
from megatron_jq.errors import RunFailure, UserError
from megatron_jq.evaluate.judging import Answer, Judge, Metric, judge_prompt
from megatron_jq.evaluate.reward import KEYWORDS, load_reward, reward_of
from megatron_jq.records import Example, Rollout
from tests.unit.test_evaluation import WordTokenizer

MODULE = """
import math, fractions, numpy
CALLS = []

def all_of_it(*, prompt, rationale, answer, golds, rationale_ids, answer_ids, ended):
    CALLS.append(locals())
    return len(answer) / 4

def some(answer, golds, **_):
    return answer in golds

def nan(**_): return math.nan
def infinite(**_): return -math.inf
def huge(**_): return 10**400
def longer(**_): return -(10**5000)
def large_fraction(**_): return fractions.Fraction(10**400, 3)
def numpy_true(**_): return numpy.float64(1) > 0
def numpy_false(**_): return numpy.float64(1) < 0
def text(**_): return "1"
def nothing(**_): pass
def fraction(**_): return fractions.Fraction(1, 3)
def leaves(**_): raise SystemExit(4)
def fails(answer, **_):
    return {}[answer]

def positional(answer, gold): return 1
number = 5
class Kept:
    @staticmethod
    def score(**_): return 1
"""
EXAMPLE = Example(3, "say ab", "ab", (9,), (4, 5, 1), aliases=("AB",))
ROLLOUT = Rollout(2, 1, (6, 7, 3), 2, answer_ids=(4, 5, 1))


@pytest.fixture(autouse=True)
def on_the_path(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "broken_rewards.py").write_text("import math\nmath.no_such_thing\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))


def value(name: str, binary=None, rollout=ROLLOUT) -> float:
    return load_reward(f"own_rewards:{name}", binary).of(rollout, EXAMPLE, ("ab", "AB"), WordTokenizer())


def test_it_gets_everything_by_keyword():
    import own_rewards

    assert value("all_of_it") == 0.5 and value("some") == 1.0 and value("Kept.score") == 1.0
    assert value("fraction") == 1 / 3
    assert value("numpy_true", "--match reward") == 1.0 and value("numpy_false") == 0.0
    [call] = own_rewards.CALLS
    assert tuple(call) == KEYWORDS and call == {
        "prompt": "say ab", "rationale": "cd", "answer": "ab", "golds": ("ab", "AB"), "rationale_ids": (6, 7, 3),
        "answer_ids": (4, 5, 1), "ended": True,
    }  # fmt: skip
    value("all_of_it", rollout=Rollout(2, 1, (6, 7), 2, answer_ids=(4, 5)))
    assert own_rewards.CALLS[1]["ended"] is False


#: The function → the error that ends the run.
FAILURES = {
    "nan": "it returned nan; a finite number must come back",
    "infinite": "it returned -inf; a finite",
    **dict.fromkeys(("huge", "longer", "large_fraction"), "it returned a number beyond a float's range; a finite"),
    "text": "it returned '1'; a finite",
    "nothing": "it returned None; a finite",
    "leaves": "SystemExit: 4",
    "fails": r"KeyError: 'ab' \(own_rewards.py:24\)",
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_stops_the_run_with_the_functions_name_and_the_sample(name):
    with pytest.raises(RunFailure, match=f"--reward own_rewards:{name}, prompt 2, sample 1: {FAILURES[name]}"):
        value(name)


def test_who_needs_success_or_failure_takes_no_other_value():
    with pytest.raises(RunFailure, match="it returned 0.5; --estimator star needs 0 or 1"):
        value("all_of_it", "--estimator star")
    assert value("some", "--estimator star") == 1
    for estimator, match, binary in (
        ("grpo", "exact", None), ("rloo", "exact", None), ("maxrl", "exact", "--estimator maxrl"),
        ("star", "substring", "--estimator star"), ("grpo", "reward", "--match reward"),
    ):  # fmt: skip
        training = TrainingConfig(reward="own_rewards:some", match=match)
        assert reward_of(Config(objective=ObjectiveConfig(estimator=estimator), training=training)).binary == binary
    assert reward_of(Config()) is None


#: --reward → the error before any work.
REFUSED = {
    "own_rewards": "write MODULE:FUNCTION",
    ":some": "write MODULE:FUNCTION",
    "own_rewards:": "write MODULE:FUNCTION",
    "no_such_rewards:some": r"the module cannot be imported \(ModuleNotFoundError: .*put its folder on PYTHONPATH",
    "broken_rewards:some": r"cannot be imported \(AttributeError: .*no_such_thing.* \(broken_rewards.py:2\)\)",
    "own_rewards:most": "module own_rewards has no function most",
    "own_rewards:number": "module own_rewards has no function number",
    "own_rewards:positional": "it is called with the keywords prompt, rationale, .*take \\*\\*_",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_called_is_refused_by_its_flag(name):
    with pytest.raises(UserError, match=f"--reward {name}: .*{REFUSED[name]}"):
        load_reward(name)


def test_as_a_judge_it_decides_alone_and_the_first_of_equal_votes_speaks_for_them():
    answers = [Answer("a", True, 0.0), Answer("b", False, 1.0), Answer("b", False, 0.0), Answer("c", True, 1.0)]
    judged = judge_prompt(answers, ["a"], Judge("reward"))
    assert judged.right == (False, True, False, True)
    assert judged.value(Metric("pass", 1)) == 0.5 and judged.value(Metric("maj", 4)) == 1
    with pytest.raises(UserError, match="--match reward: these samples have no rewards; evaluate with --reward"):
        judge_prompt([Answer("a", True)], ["a"], Judge("reward"))
    assert math.isclose(judge_prompt(answers, ["a"], Judge()).value(Metric("pass", 1)), 0.25)
