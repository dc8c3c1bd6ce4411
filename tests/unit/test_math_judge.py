"""`--match math`: what is equal, what math-verify is not asked about, its process, its deadline, our own alarms."""

import os
import signal
import time

import pytest

from megatron_jq.errors import RunFailure, UserError
from megatron_jq.evaluate import math_judge
from megatron_jq.evaluate.judging import Answer, Judge, Metric, judge_prompt
from megatron_jq.evaluate.math_judge import PROCESS, MathProcess, check_installed, expression

#: (gold, answer, whether it is right)
CASES = (
    (r"\frac{1}{2}", "0.5", True),
    (r"\frac{\sqrt{3}}{2}", r"$\sqrt{3}/2$", True),
    ("x^2-1", "(x-1)(x+1)", True),
    (r"2\pi", "2π", True),
    ("(1,2)", "(2,1)", False),
    ("[1,2)", "(1,2)", False),
    (r"\text{odd}", "odd", True),
    ("yes", "Yes.", True),
    ("yes", "no", False),
    # math-verify alone says the contrary of each
    ("70", "70k", False),
    ("0.005", "5e-3", True),
    ("5", "5e-3", False),
    ("3", "3 dozen", False),
    ("0.093", "9.3%", False),
    ("18", r"\$18", True),
    ("18", "**18**", True),
    ("2", "18 dollars (9 eggs at $2 each)", False),
    ("12", "10 or 12", False),
    ("5", "5 squared", False),
    (r"\frac{x}{2}%", r"\frac{x}{2}", False),
)


@pytest.mark.parametrize(("gold", "answer", "right"), CASES)
def test_equal_mathematics(gold, answer, right):
    assert judge_prompt([Answer(answer, True)], [gold], Judge("math")).right == (right,)
    assert not judge_prompt([Answer(answer, False)], [gold], Judge("math")).right[0]  # it was cut off


def test_equal_expressions_are_one_vote_right_or_wrong():
    wrong = ["x+1", "1+x", "x + 1"]
    texts = [wrong[0], "2x", wrong[1], "x*2", "x+x", wrong[2]]
    judged = judge_prompt([Answer(text, True) for text in texts], ["2x"], Judge("math"))
    assert judged.right == (False, True, False, True, True, False)
    assert len(set(judged.votes)) == 2
    # three to three: the first drawn has it
    assert judged.value(Metric("maj", 6)) == 0 and judged.value(Metric("maj", 5)) == 1


def test_the_processs_own_alarm_stays():
    """math-verify's timeouts take SIGALRM and cancel what was set."""
    fired = []
    before = signal.signal(signal.SIGALRM, lambda *_: fired.append(1))
    signal.setitimer(signal.ITIMER_REAL, 600)
    try:
        assert PROCESS.equal("x+1", "1+x")
        assert 500 < signal.getitimer(signal.ITIMER_REAL)[0] < 600
        assert not fired
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_what_takes_too_long_counts_as_different_and_the_next_pair_is_answered():
    process = MathProcess()
    try:
        assert process.equal("x+1", "1+x")
        first = process._process.pid
        os.kill(first, signal.SIGSTOP)  # as a comparison that no alarm of its own ends
        process._deadline, began = 0.5, time.monotonic()
        assert not process.equal("x+2", "2+x")
        assert 0.4 < time.monotonic() - began < 30 and process.unanswered == 1
        process._deadline = 60
        assert process.equal("x+3", "3+x") and process._process.pid != first
        os.kill(process._process.pid, signal.SIGKILL)
        assert not process.equal("x+4", "4+x") and process.unanswered == 2
        assert process.equal("x+1", "1+x") and process._process is None  # known already
    finally:
        process.close()


def test_a_missing_package_is_named_before_any_work_and_a_broken_one_stops_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(math_judge, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match=r"--match math needs the math-verify package: pip install megatron-jq\[math\]"):
        check_installed()
    (tmp_path / "math_verify.py").write_text("raise ImportError('half installed')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RunFailure, match="--match math: math-verify's process failed: ImportError: half installed"):
        MathProcess().equal("x", "y")


def test_prose_is_no_expression():
    for text in ("so it is x", "10 or 12", "x" * 3000, "", "** **"):
        assert expression(text) is None
    for text in (r"\sin(x)", "18 inches", "$x$", r"\frac{1}{2}"):
        assert expression(text) is not None
