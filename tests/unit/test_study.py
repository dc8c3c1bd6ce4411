"""The study's arithmetic against independent references, its runner, and one policy run of two steps."""

import itertools
import json
import math
import os
import signal
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from examples.study import enumeration, figures, noise, policy_runs, report, sigmoid, tasks, warm
from examples.study.plan import PARTS, jobs_of_part
from examples.study.pool import Job, read_result, run_jobs
from megatron_jq.objective.garl import garl_coefficients
from megatron_jq.objective.paft import paft_attenuation

QS = (0.0, 0.25, 0.5, 0.75, 1.0)


# --- a: escape times --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", QS)
def test_the_slope_of_escape_times_is_within_0_02_of_1_minus_q(q):
    (row,) = sigmoid.escape_table((q,), far=(-60, -45, -30), near=(-6, -4), step=0.2)["rows"]
    assert row["slope_far"] == pytest.approx(1.0 - q, abs=0.02)
    assert row["worst_relative_error"] < 1e-5


def test_escape_integral_and_flow_equal_the_antiderivatives_at_both_poles():
    p0, delta = 1e-3, 0.5
    odds = lambda u: math.log(u / (1 - u))  # noqa: E731
    # q = 1: integral of 1 / (u (1-u)^2); q = 0: of 1 / (u^2 (1-u)^2)
    at_one = (odds(delta) + 1 / (1 - delta)) - (odds(p0) + 1 / (1 - p0))
    at_zero = (2 * odds(delta) - 1 / delta + 1 / (1 - delta)) - (2 * odds(p0) - 1 / p0 + 1 / (1 - p0))
    for q, exact in ((1.0, at_one), (0.0, at_zero)):
        assert sigmoid.integral_time(math.log(p0), q) == pytest.approx(exact, rel=1e-10)
        assert sigmoid.flow_times([math.log(p0)], q)[0] == pytest.approx(exact, rel=1e-6)


# --- c: two labels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", QS[1:])
@pytest.mark.parametrize("eps", (0.3, 0.1, 0.01))
def test_the_two_label_loss_has_its_minimum_at_the_escort_distribution(q, eps):
    actual = noise.equilibrium(eps, q)
    assert actual == pytest.approx(noise.escort(eps, q), rel=1e-9)
    near = [
        noise.two_label_loss(torch.tensor(math.log(actual / (1 - actual)) + d), eps, q).item() for d in (-0.1, 0, 0.1)
    ]
    assert near[1] < min(near[0], near[2])


@pytest.mark.parametrize("q", QS[1:])
def test_equation_17_is_the_limit_of_small_noise(q):
    distance = [abs(noise.small_noise_limit(eps, q) / noise.escort(eps, q) - 1) for eps in (0.1, 0.01, 0.001)]
    assert distance[0] > distance[1] > distance[2] and distance[2] < 2e-3


# --- d: enumeration ---------------------------------------------------------------------------------------------------

MODEL = enumeration.Model((0.2, 0.3, 0.5), (0.6, 0.2, 0.05))


def brute_force(q: float, num: int) -> tuple[torch.Tensor, float, float]:
    """(mean gradient, variance of GARL, of PAFT) over every ordered pool, by the package's coefficients."""
    rationale, answer = MODEL.scores()
    joint = rationale + answer
    pool = torch.tensor(list(itertools.product(range(3), repeat=num)))
    prior, weight = (torch.tensor(x, dtype=torch.float64) for x in (MODEL.prior, MODEL.weight))
    chance, log_w = prior[pool].prod(1), weight[pool].log()
    first, second = garl_coefficients(log_w, q, normalize=False)
    garl = (first[:, :, None] * rationale[pool] + second[:, :, None] * answer[pool]).mean(1)
    attenuation, share = paft_attenuation(log_w, q, normalize=False), torch.softmax(log_w, 1)
    mean = square = 0.0
    for draw in itertools.product(range(num), repeat=num):
        gradient = attenuation[:, None] * joint[pool[:, list(draw)]].mean(1)
        weight_T = chance * share[:, list(draw)].prod(1)
        mean = mean + weight_T @ gradient
        square = square + weight_T @ gradient.square().sum(1)
    expected = chance @ garl
    variance = chance @ garl.square().sum(1) - expected.square().sum()
    return mean, float(variance), float(square - mean.square().sum())


@pytest.mark.parametrize("q", QS)
def test_counts_give_the_moments_of_all_ordered_pools(q):
    mean, garl, paft = brute_force(q, 3)
    actual = enumeration.moments(MODEL, q, 3)
    assert actual.bias == pytest.approx(float((mean - MODEL.exact_gradient(q)).norm()), rel=1e-10, abs=1e-15)
    assert actual.variance_garl == pytest.approx(garl, rel=1e-10)
    assert actual.variance_paft == pytest.approx(paft, rel=1e-10)


def test_the_enumerated_models_gradient_is_autograds():
    theta = torch.tensor(MODEL.prior, dtype=torch.float64).log()
    answers = [[w, *[(1 - w) / (enumeration.NUM_ANSWERS - 1)] * (enumeration.NUM_ANSWERS - 1)] for w in MODEL.weight]
    flat = torch.cat([theta, torch.tensor(answers, dtype=torch.float64).log().flatten()]).requires_grad_(True)
    success = torch.softmax(flat[:3], 0) @ torch.softmax(flat[3:].view(3, -1), 1)[:, 0]
    (gradient,) = torch.autograd.grad(success, flat)
    assert MODEL.success == pytest.approx(success.item(), rel=1e-12)
    for q in QS:
        torch.testing.assert_close(MODEL.exact_gradient(q), gradient / success.detach() ** q, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("family", enumeration.FAMILIES)
def test_both_families_have_the_success_that_was_asked_for_and_pools_that_add_up(family):
    for success in (0.1, 1e-3):
        model = enumeration.model_of(family, success)
        assert model.success == pytest.approx(success, rel=1e-12) and sum(model.prior) == pytest.approx(1.0)
        count, chance = enumeration.pools(model, 50)
        assert float(chance.sum()) == pytest.approx(1.0, abs=1e-9) and bool((count.sum(1) == 50).all())


@pytest.mark.parametrize("q", (0.5, 1.0))
def test_bias_grows_as_p_to_minus_q_where_successes_are_rare(q):
    table = enumeration.bias_table((q,), powers=(-3.0, -3.5, -4.0))["exponents"]
    actual = {row["family"]: row["exponent"] for row in table}
    assert actual["rare"] == pytest.approx(-q, abs=0.02) and actual["hard"] == pytest.approx(1 - q, abs=0.02)


# --- figures ----------------------------------------------------------------------------------------------------------


def test_steps_are_counted_by_the_running_mean():
    curve = [-10.0] * 10 + [-0.1] * 10
    # Means of the last five: -8.02 (one new value), -6.04, -4.06, -2.08, -0.1
    assert figures.escape_step(curve) == 12 and figures.half_step(curve) == 14
    assert figures.half_step([-10.0] * 5) is None
    assert figures.median_step([3, None, 5]) == 5 and figures.median_step([3, None, None]) == math.inf


def test_the_interval_spans_seeds_not_prompts_alone():
    # Prompts of a seed agree, seeds do not: a bootstrap over prompts alone would have no width.
    actual = figures.interval_over_seeds([[0.0] * 20, [1.0] * 20, [1.0] * 20])
    assert actual.value == pytest.approx(2 / 3) and (actual.low, actual.high) == (0.0, 1.0)
    tight = figures.interval_over_seeds([[0.0, 1.0] * 50] * 3)
    assert tight.value == 0.5 and 0.38 < tight.low < 0.5 < tight.high < 0.62


def test_validation_has_collapsed_only_behind_a_peak():
    assert warm.has_collapsed([0.0, 0.6, 0.3, 0.0]) and not warm.has_collapsed([0.0, 0.05, 0.0])
    assert not warm.has_collapsed([0.1, 0.6, 0.5])


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_the_tasks_hold_out_combinations_and_flip_the_share_that_was_asked_for(tmp_path):
    for task in ("paint", "colour"):
        train, heldout = tasks.items(task)
        assert (len(train), len(heldout)) == (448, 64)
        assert not {item.prompt for item in train} & {item.prompt for item in heldout}
        assert all(item.answer != item.other for item in train)
    tasks.write_task(tmp_path, "colour", noise=0.3, seed=1)
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").open()]
    clean = {item.prompt: item for item in tasks.items("colour")[0]}
    wrong = [line for line in lines if line["answer"] != clean[line["prompt"]].answer]
    assert len(lines) == 448 and len(wrong) == round(0.3 * 448)
    assert all(line["answer"] == clean[line["prompt"]].other for line in wrong)
    assert [json.loads(line) for line in (tmp_path / "flipped.jsonl").open()] == wrong


# --- the runner -------------------------------------------------------------------------------------------------------


def jobs_that_count(folder: Path) -> list[Job]:
    """Three jobs that leave a line each time they are run; the third needs the first's result."""

    def run(name: str, work: Path) -> dict:
        with open(folder / "runs", "a") as file:
            file.write(name + "\n")
        assert work.is_dir() and list(work.iterdir()) == []
        (work / "scratch").touch()
        return {"name": name}

    return [
        Job("t", name, lambda work, name=name: run(name, work), {"name": name}, after=after)
        for name, after in (("third", ("first",)), ("first", ()), ("second", ()))
    ]


def test_finished_jobs_are_kept_and_changed_ones_are_run_again(tmp_path):
    jobs, said = jobs_that_count(tmp_path), []
    assert run_jobs(jobs[1:2], tmp_path, workers=2, commit="x", say=said.append) == 0
    assert run_jobs(jobs, tmp_path, workers=2, commit="x", say=said.append) == 0
    ran = (tmp_path / "runs").read_text().split()
    assert ran[0] == "first" and sorted(ran[1:]) == ["second", "third"]
    assert read_result(tmp_path, jobs[0]).value == {"name": "third"} and "ETA" in said[-1]
    assert not list(tmp_path.glob("t/*.work"))
    changed = replace(jobs[2], spec={"name": "second", "more": 1})
    assert read_result(tmp_path, changed) is None
    assert run_jobs([changed], tmp_path, workers=1, commit="x", say=said.append) == 0
    assert (tmp_path / "runs").read_text().split()[3:] == ["second"]


def test_a_job_that_fails_is_named_with_its_log_and_others_go_on(tmp_path):
    jobs, said = jobs_that_count(tmp_path), []

    def fail(_work: Path) -> dict:
        raise ValueError("no luck")

    failed = run_jobs([replace(jobs[1], run=fail), jobs[0], jobs[2]], tmp_path, workers=1, commit="x", say=said.append)
    assert failed == 2 and (tmp_path / "runs").read_text().split() == ["second"]
    assert any("FAILED" in line and "first.log" in line for line in said)
    assert "no luck" in (tmp_path / "t" / "first.log").read_text()


def test_a_killed_study_leaves_no_process_and_goes_on(tmp_path):
    def slow(_work: Path) -> dict:
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(60)
        return {}

    quick, hanging = Job("t", "quick", lambda _: {"done": 1}), Job("t", "hanging", slow)
    study = get_context("fork").Process(
        target=run_jobs, args=([quick, hanging], tmp_path), kwargs={"workers": 1, "commit": "x", "say": lambda _: None}
    )
    study.start()
    wait_until((tmp_path / "pid").exists)
    wait_until(lambda: (tmp_path / "pid").read_text() != "")
    worker = int((tmp_path / "pid").read_text())
    os.kill(study.pid, signal.SIGKILL)
    study.join()
    wait_until(lambda: not Path(f"/proc/{worker}").exists())
    assert read_result(tmp_path, quick) is not None and read_result(tmp_path, hanging) is None
    assert (
        run_jobs([quick, replace(hanging, run=lambda _: {})], tmp_path, workers=1, commit="x", say=lambda _: None) == 0
    )


def wait_until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "waited 20 s in vain"
        time.sleep(0.05)


# --- a policy run, the plan, the report -------------------------------------------------------------------------------


def test_a_policy_run_of_two_steps_gives_curves_and_figures_and_another_begins_from_it(tmp_path):
    short = ("--estimator", "garl", "--q", "0.75", "--train-iters", "2", "--eval-examples", "4")
    noisy = policy_runs.PolicyRun("first", "colour", 1, short, noise=0.1, keep_weights=True, flipped=True)
    second = policy_runs.PolicyRun("second", "colour", 1, short, warm="first", evaluated=False)
    jobs = policy_runs.jobs_of("t", [noisy, second], tmp_path, seconds=1)
    assert run_jobs(jobs, tmp_path, workers=2, commit="x", say=lambda _: None) == 0, log_of(tmp_path)
    first, later = (read_result(tmp_path, job).value for job in jobs)
    assert len(first["log_p_mean"]) == 2 and first["eval_step"] == [2]
    assert len(first["heldout"]["pass_at_16"]) == policy_runs.HELDOUT_EXAMPLES
    assert len(first["flipped"]["golds"]) == round(0.1 * tasks.NUM_TRAIN)  # fewer than HELDOUT_EXAMPLES
    assert all(len(answers) == policy_runs.NUM_SAMPLES for answers in first["heldout"]["answers"])
    assert later["log_p_mean"][0] > first["log_p_mean"][0]


def log_of(folder: Path) -> str:
    return "\n".join(path.read_text()[-2000:] for path in folder.glob("t/*.log"))


def test_every_part_has_jobs_of_names_of_their_own_and_what_they_wait_for(tmp_path):
    for part in PARTS:
        names = [job.name for job in jobs_of_part(part, tmp_path)]
        assert names and len(set(names)) == len(names)
        assert {after for job in jobs_of_part(part, tmp_path) for after in job.after} <= set(names)
    assert len(jobs_of_part("b", tmp_path)) == 6 * 3 and len(jobs_of_part("f", tmp_path)) == 4 * 6 * 3


def test_the_report_says_what_is_missing_and_shows_what_is_there(tmp_path):
    jobs = jobs_of_part("a", tmp_path)
    tables = {q: sigmoid.escape_table((q,), far=(-40, -30), near=(-6, -4), step=0.5) for q in sigmoid.QS}
    done = [replace(job, run=lambda _, q=q: tables[q]) for job, q in zip(jobs, sigmoid.QS, strict=True)]
    assert run_jobs(done, tmp_path, workers=1, commit="abc", say=lambda _: None) == 0
    text = report.write_report(tmp_path, tmp_path / "docs", command="run.py").read_text()
    assert "Not finished: 0 of 18 jobs." in text and "abc" in text and "`run.py`" in text
    assert (tmp_path / "docs" / "escape.png").stat().st_size > 10_000
    for q in sigmoid.QS:
        assert f"| {q:g} | {1 - q:g} |" in text
