"""Items of reasoning-gym: which sets are refused; items are the same everywhere, and none is in two splits."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from megatron_jq.checkpoint.folder import Manifest, package_versions
from megatron_jq.config import parse_args
from megatron_jq.config_reads import has_heldout
from megatron_jq.data import reasoning_gym
from megatron_jq.data.answers import rule_of
from megatron_jq.data.dataset import load_source
from megatron_jq.data.reading import heldout_source
from megatron_jq.data.reasoning_gym import read_reasoning_gym, without_size
from megatron_jq.data.reasoning_gym_sets import REFUSED, SETS
from megatron_jq.errors import UserError
from megatron_jq.formats.options import ReadOptions
from megatron_jq.train.saving import changed_packages

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None,
    reason="reasoning-gym is not installed: pip install 'megatron-jq[reasoning-gym]'",
)


def items(source: str, split: str = "train") -> list[tuple[str, str]]:
    return [(pair.prompt, pair.answer) for pair in read_reasoning_gym(f"reasoning-gym:{source}", split).pairs]


def test_no_set_is_used_and_refused():
    assert SETS and not SETS.keys() & REFUSED.keys()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("syllogism", "syllogism is refused: one gold in eight is wrong"),
        ("ransom_note", "ransom_note is refused: its items differ from process to process"),
        ("sudoku:size=4", "sudoku:size=4 is refused: its answers have several lines"),
        ("gdc", r"gdc is no set of reasoning-gym; did you mean gcd\?"),
        ("", "write reasoning-gym:NAME"),
        ("gcd:size=1:seed=2", "write reasoning-gym:NAME"),
    ],
)
def test_what_can_be_said_without_the_package(source, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=f"^--eval-data reasoning-gym:.*{message}"):
        read_reasoning_gym(f"reasoning-gym:{source}", "train", flag="--eval-data")


def test_the_package_s_absence_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"needs the package .*pip install 'megatron-jq\[reasoning-gym\]'"):
        items("gcd")


def test_a_training_source_brings_its_validation_split():
    config = parse_args(["--train-data", "reasoning-gym:gcd:max_value=99,size=2000,seed=3"])
    assert has_heldout(config) and heldout_source(config) == "reasoning-gym:gcd:max_value=99,seed=3"
    assert without_size("reasoning-gym:gcd:size=9") == "reasoning-gym:gcd"
    config = parse_args(["--train-data", "reasoning-gym:gcd", "--eval-data", "reasoning-gym:lcm"])
    assert heldout_source(config) == "reasoning-gym:lcm"


def test_rationales_are_asked_of_other_sources():
    with pytest.raises(UserError, match="sets of reasoning-gym give no rationales, and --estimator sft"):
        load_source("reasoning-gym:gcd", ReadOptions(rationales=True))


def test_a_checkpoint_under_another_version_is_named():
    saved = Manifest(1, {}, 9, False, versions={"reasoning-gym": "0.1.24"})
    assert changed_packages(saved, "builtin:recall") == []
    assert changed_packages(Manifest(1, {}, 9, False), "builtin:recall") == []
    assert set(package_versions()) == {"megatron-jq", "megatron-core", "torch"}


@needs_package
def test_the_versions_of_checkpoint_and_package_are_named():
    saved = Manifest(1, {}, 9, False, versions={"reasoning-gym": "0.0.1"})
    (line,) = changed_packages(saved, "reasoning-gym:gcd")
    now = package_versions("reasoning-gym")["reasoning-gym"]
    assert line == f"reasoning-gym was 0.0.1, and {now} is installed"
    assert changed_packages(Manifest(1, {}, 9, False, versions={"reasoning-gym": now}), "reasoning-gym:gcd") == []


@needs_package
def test_items_are_these_and_no_question_is_in_two_splits_or_comes_twice(capsys):
    question = "Find the Greatest Common Divisor (GCD) of these numbers: {}. Give only the GCD as your final answer."
    train = items("gcd:size=400")
    assert train[:2] == [(question.format("856, 174"), "2"), (question.format("641, 595"), "1")]
    assert items("gcd:size=40") == train[:40]
    assert len(items("gcd", "heldout")) == reasoning_gym.DEFAULT_SIZE["heldout"]
    other = items("gcd:size=400,seed=1")  # the package's own seeds 0 and 1 share 399 of 400
    assert len(dict(train) | dict(other)) > 700
    heldout = items("gcd:seed=7,size=150", "heldout") + items("gcd:size=150", "heldout")
    assert not {prompt for prompt, _ in train + other} & {prompt for prompt, _ in heldout}
    few = read_reasoning_gym("reasoning-gym:products:max_digits=2,size=300", "train")
    assert len({pair.prompt for pair in few.pairs}) == 300
    assert "left out whose question was there already" in few.notes[-1]
    assert rule_of("auto", few.data_format) == "number" and capsys.readouterr().out == ""


@needs_package
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gcd:max_valu=9", r"no key 'max_valu' that can be set here; did you mean max_value\? it has min_numbers \("),
        ("gcd:max_value=many", "max_value=many: expected whole number"),
        ("chain_sum:allow_negation=1", "allow_negation=1: expected true or false"),
        ("gcd:max_value=0", "gcd refuses its settings: max_value must be > min_value"),
        ("gcd:size=0", "size=0; ask for at least 1"),
        ("gcd:seed=-1", "seed=-1 is not from 0 to 4095"),
        ("gcd:size=2,size=3", "size is given twice"),
        ("gcd:max_value", "'max_value' is no KEY=VALUE"),
        ("gcd:max_value=3", r"8 distinct training questions among .*ask for fewer \(size=8\)"),
        (
            "word_sequence_reversal:min_words=50,max_words=60",
            "has an answer of .* characters, more than 128; .*question '",
        ),
    ],
)
def test_bad_settings_are_refused_by_key_and_item(source, message):
    with pytest.raises(UserError, match=f"^--train-data reasoning-gym:{source}: .*{message}"):
        items(source)


@needs_package
def test_another_version_than_the_checked_one_is_said(monkeypatch):
    monkeypatch.setattr(reasoning_gym, "CHECKED_VERSION", "0.0.1")
    assert "its sets were checked in 0.0.1" in read_reasoning_gym("reasoning-gym:lcm:size=2", "train").notes[0]


@needs_package
def test_no_set_depends_on_the_process():
    """Five items of every set, in processes with two hash seeds."""
    program = (
        "import json; from megatron_jq.data.reasoning_gym import read_reasoning_gym as read; "
        "from megatron_jq.data.reasoning_gym_sets import SETS; "
        "print(json.dumps({s: [[p.prompt, p.answer] for p in read(f'reasoning-gym:{s}:size=5', 'train').pairs] "
        "for s in SETS}))"
    )
    read = [
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    first, second = (hashlib.sha256(out).hexdigest() for out in read)
    assert first == second
    answers = [answer for pairs in json.loads(read[0]).values() for _, answer in pairs]
    assert len(answers) == 5 * len(SETS) and all(answer == answer.strip() and "\n" not in answer for answer in answers)
    numbers = [answer for name, pairs in json.loads(read[0]).items() if SETS[name].numbers for _, answer in pairs]
    assert all(float(answer.replace(",", "")) is not None for answer in numbers)
