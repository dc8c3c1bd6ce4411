"""Which settings a resumed run may change: every one is in the table, and schedules stay what they were."""

from collections import Counter
from dataclasses import replace
from typing import get_args

import pytest

from megatron_jq.config import SETTINGS, Config, parse_args
from megatron_jq.config_validate import derive
from megatron_jq.objective.schedule import QSchedule, ScheduleKind, q_at
from megatron_jq.train.resume_rules import _GROUPS, RULES, Rule, changed, meaning

LR_STYLES = get_args(SETTINGS["lr_decay_style"][1])


def test_every_setting_has_one_rule_and_a_reason():
    counts = Counter(name for _, _, names in _GROUPS for name in names)
    assert set(counts) == set(SETTINGS), "a new setting needs a line in resume_rules.py"
    assert set(counts.values()) == {1}
    assert all(why for _, why in RULES.values())


def other_value(name: str, config: Config):
    """A value of the setting's type other than the present one, whether or not it makes sense."""
    value, kind = getattr(getattr(config, SETTINGS[name][0]), name), SETTINGS[name][1]
    options = [option for each in (get_args(kind) or (kind,)) for option in (get_args(each) or (each,))]
    for option in options:
        if isinstance(option, type) and option is not type(None):
            return {bool: not value, int: 7919, float: 0.4321, str: "another"}[option]
        if isinstance(option, str) and option != value:
            return option
    raise AssertionError(name)


def with_setting(config: Config, name: str, value) -> Config:
    group = SETTINGS[name][0]
    return replace(config, **{group: replace(getattr(config, group), **{name: value})})


#: A run that reads each setting: the estimator, the optimizer and the schedules that do.
READS = {
    **dict.fromkeys(("num_resamples",), "--estimator paft"),
    **dict.fromkeys(
        ("grpo_iterations", "grpo_clamp_eps_lower", "grpo_clamp_eps_upper", "grpo_kl_beta"), "--estimator grpo"
    ),
    **dict.fromkeys(("eod_mask_loss", "reset_attention_mask"), "--estimator pretrain --data-path x"),
    **dict.fromkeys(("min_lr", "lr_decay_iters"), "--lr-decay-style linear"),
    "q_schedule_iters": "--q-schedule linear --q-final 0",
    "sgd_momentum": "--optimizer sgd",
}


@pytest.mark.parametrize("name", RULES)
def test_a_fixed_setting_is_refused_by_its_flag_and_no_other_is(name):
    before = parse_args(READS[name].split()) if name in READS else Config()
    after = with_setting(before, name, other_value(name, before))
    told = changed(before, after)
    if RULES[name][0] is Rule.FIXED:
        assert len(told) == 1 and f"--{name.replace('_', '-')} was " in told[0]
    else:
        assert told == []
        assert len(changed(before, after, RULES[name][0])) <= 1


@pytest.mark.parametrize("name", READS)
def test_what_the_run_does_not_read_may_change(name):
    before = Config()
    assert changed(before, with_setting(before, name, other_value(name, before))) == []


@pytest.mark.parametrize("style", LR_STYLES)
@pytest.mark.parametrize("kind", get_args(ScheduleKind))
def test_a_longer_run_keeps_both_schedules_or_is_refused_with_the_flags(kind, style):
    flags = ["--q-schedule", kind, *([] if kind == "constant" else ["--q-final", "1", "--q", "0"])]
    flags += ["--q-schedule-iters", "3"] if kind == "step" else []
    before = parse_args([*flags, "--lr-decay-style", style, "--train-iters", "4"])
    longer = with_setting(before, "train_iters", 8)
    told, keeping = changed(before, longer), []
    if style != "constant":
        keeping += ["--lr-decay-iters", "4"]
    if kind not in ("constant", "step"):
        keeping += ["--q-schedule-iters", "3"]
    assert len(told) == len(keeping) // 2
    for flag, length in zip(keeping[::2], keeping[1::2], strict=True):
        [line] = [line for line in told if flag in line]
        assert "--train-iters 8 would move the end of" in line and f"give {flag} {length} to keep it" in line
    explicit = parse_args([*flags, "--lr-decay-style", style, "--train-iters", "8", *keeping])
    assert changed(before, explicit) == [] and changed(explicit, with_setting(explicit, "train_iters", 99)) == []
    derived = [derive(config, 1) for config in (before, explicit)]
    assert style == "constant" or {d.lr_decay_iters for d in derived} == {meaning(before, "lr_decay_iters")}
    if kind != "constant":  # what the lines are about: q of the steps that are done, and of those to come
        assert {d.q_schedule_iters for d in derived} == {meaning(before, "q_schedule_iters")}
        schedules = [QSchedule(kind, 0.0, 1.0, d.q_schedule_iters) for d in derived]
        assert [q_at(step, schedules[0]) for step in range(9)] == [q_at(step, schedules[1]) for step in range(9)]


def test_one_value_by_two_names_is_no_change():
    before = parse_args(["--estimator", "paft", "--num-rationales", "8"])
    assert changed(before, with_setting(before, "num_resamples", 8)) == []
    assert changed(before, with_setting(before, "num_resamples", 4)) == ["--num-resamples was 8 and is 4"]
