"""What every row of megatron_jq/estimators.py promises. Your own row is tested here as soon as it stands in the table.

YOU ADDED AN ESTIMATOR AND THIS FAILS? Each test's docstring says what goes wrong in a run without it. How to add one:
docs/extending.md. What this cannot show is that your equation is right: write a test of that beside
tests/unit/test_objective_estimators.py, against an enumeration or a table by hand.
"""

import dataclasses
import typing
from pathlib import Path

import pytest
import torch

from megatron_jq.config import SETTINGS, Config, ObjectiveConfig, parse_args
from megatron_jq.config_estimators import READ_BY, estimator_problems
from megatron_jq.config_validate import derive, resolve_architecture, validate_training
from megatron_jq.errors import UserError
from megatron_jq.estimators import (
    ALIASES,
    DEFAULT,
    ESTIMATORS,
    GENERATOR,
    NAMES,
    REFUSED_ELSEWHERE,
    ROWS,
    EstimatorRow,
    Needs,
    help_text,
    markdown_table,
    resolve,
    row_of,
    row_problems,
)
from megatron_jq.objective.knobs import Knobs
from megatron_jq.objective.table import StepTable
from megatron_jq.report import describe_q
from megatron_jq.seeds import stream
from megatron_jq.train.estimators import DeclaredTable, Estimator
from megatron_jq.train.rehearsal import rehearse

REPOSITORY = Path(__file__).resolve().parents[2]
BASELINES = REPOSITORY / "docs" / "baselines.md"
FLOATS = [f.name for f in dataclasses.fields(StepTable) if f.name != "valid_BM"]
#: Beside these a function may read any setting of [objective]; its default is used.
VALUES = {**{f.name: f.default for f in dataclasses.fields(ObjectiveConfig)}, "q": 0.5, "num_resamples": 4}

each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
each_function = pytest.mark.parametrize(
    ("row", "function"),
    [
        pytest.param(row, function, id=f"{row.name}-{function.partition(':')[2]}")
        for row in ROWS
        for function in (row.function, row.effective_reward)
        if function is not None
    ],
)


def made_up_table(num_prompts: int = 4, num_rationales: int = 5, *, shift: float = 0.0) -> StepTable:
    """Distinct numbers everywhere and, for every prompt, both kinds of reward."""
    generator = torch.Generator().manual_seed(3)
    shape = (num_prompts, num_rationales)
    numbers = {name: shift - 9 * torch.rand(shape, generator=generator, dtype=torch.float64) for name in FLOATS}
    numbers["reward_BM"] = (torch.arange(num_prompts * num_rationales).reshape(shape) % 3 == 0).double()
    return StepTable(valid_BM=torch.ones(shape, dtype=torch.bool), **numbers)


def with_mask(table: StepTable, masked: list[tuple[int, int]], filler: float) -> StepTable:
    """The same with some rationales not valid, and `filler` where nothing may be read."""
    valid_BM = table.valid_BM.clone()
    for prompt, rationale in masked:
        valid_BM[prompt, rationale] = False
    numbers = {name: torch.where(valid_BM, getattr(table, name), filler) for name in FLOATS}
    return StepTable(valid_BM=valid_BM, **numbers)


def entries(table: StepTable, index) -> StepTable:
    """The table of some prompts or rationales."""
    return StepTable(**{f.name: getattr(table, f.name)[index] for f in dataclasses.fields(StepTable)})


class SamePerPrompt:
    """Random numbers that are alike for every prompt: permuted prompts then draw alike."""

    def random(self, size):
        return stream("a test", 1).random(size[1:])[None].repeat(size[0], axis=0)


def knobs_of(row: EstimatorRow, generator=None, **changes) -> Knobs:
    values = {**VALUES, **changes, GENERATOR: generator or stream("a test", 1)}
    return Knobs(row.name, {name: values[name] for name in row.reads})


def both(row: EstimatorRow, table: StepTable, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    """The function itself, on a bare table."""
    return resolve(row, row.function)(table, knobs_of(row, **changes))


def trains(row: EstimatorRow, table: StepTable) -> bool:
    """Whether either likelihood is weighed at all, at q = 1."""
    return any(bool(constant_BM.any()) for constant_BM in both(row, table, q=1.0))


def estimator(row: EstimatorRow) -> Estimator:
    return Estimator(row.name, VALUES["num_resamples"], normalize=True, seed=5, settings=VALUES)


def of_step(row: EstimatorRow, table: StepTable) -> torch.Tensor:
    """What a step trains with: both coefficients, denominators included, [2, B, M]."""
    coefficients = estimator(row).coefficients(table, q=0.5, step=7)
    return torch.stack([coefficients.rationale_BM, coefficients.answer_BM])


# The row


@each_row
def test_a_row_is_sound_and_its_names_are_everywhere_alike(row):
    """One table: a name that only some rooms know is accepted by the command line and trained as something else."""
    assert row_problems(row) == [] and estimator_problems_of(row) == []
    assert ESTIMATORS[row.name] is row and typing.get_args(SETTINGS["estimator"][1]) == NAMES
    assert parse_args(["--estimator", row.name]).objective.row is row
    assert f"{row.name}: {row.description}" in help_text()
    assert row.description and row.description[-1] != "." and "\n" not in row.description
    for alias, q in row.aliases:
        assert ALIASES[alias] == (row.name, q) and row_of(alias) is row


def estimator_problems_of(row: EstimatorRow) -> list[str]:
    config = parse_args(["--estimator", row.name])
    problems = estimator_problems(config, resolve_architecture(config))
    return [line for line in problems if "megatron_jq/estimators.py" in line]


def test_the_documents_have_the_table():
    """Readers choose an estimator by docs/baselines.md: its table is written by the rows."""
    current = markdown_table() in BASELINES.read_text(encoding="utf-8")
    assert current, "run python tools/reference_pages.py: the table of docs/baselines.md is not current"


@each_row
def test_the_documents_have_the_equation(row):
    """Nobody can check an estimator whose equation is not written down: docs/baselines.md has a line for each."""
    first = BASELINES.read_text(encoding="utf-8").partition("| `--estimator` | what it does |")[0]
    assert f"| `{row.name}`" in first, f"docs/baselines.md: give {row.name} a line in the table of coefficients"


@each_row
def test_rooms_tell_of_an_estimator_what_its_row_says(row):
    """Reports, estimates and the opening line would otherwise state what a run does not do."""
    corpus = ["--data-path", "p", "--tokenizer-model", "m"] if row.pretrains else []
    config = parse_args(["--estimator", row.name, *corpus])
    derived = derive(config, 1)
    of_run = Estimator.of(config, derived)
    assert of_run.samples_answers == row.samples_answers == derived.samples_answers
    assert of_run.imitates == row.imitates and of_run.minimum_rationales == row.minimum_rationales
    assert (describe_q(config) == "-") == (not row.uses_q) == (row.name not in READ_BY["q"])
    for setting, readers in READ_BY.items():
        assert (row.name in readers) == (setting in row.all_settings)


# The function


@each_row
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_coefficients_are_constants_in_float64(row, dtype):
    """float32 ends at e^-87, and a cold start begins at e^-200. A coefficient with a gradient trains something else."""
    table = with_mask(made_up_table(), [(0, 1), (2, 0)], filler=0.0)
    table = dataclasses.replace(table, **{name: getattr(table, name).to(dtype).requires_grad_() for name in FLOATS})
    for each_BM in both(row, table):
        assert each_BM.dtype == torch.float64 and each_BM.shape == table.shape and not each_BM.requires_grad


@each_row
@pytest.mark.parametrize("log_w", [-200.0, -900.0, -2660.0])
def test_a_cold_start_has_finite_coefficients_and_large_q_none_that_vanish(row, log_w):
    """At ln w = -900 w itself is 0 in float64. Powers are taken of logarithms, or NaN and zeros are what you train."""
    for q in (0.0, 0.5, 1.0):
        for each_BM in both(row, made_up_table(shift=log_w), q=q):
            assert torch.isfinite(each_BM).all(), (q, each_BM)
    if not row.samples_answers:  # at q = 1 (and for what has no q) nothing shrinks with P
        assert trains(row, made_up_table(shift=log_w)), "every constant is 0 at a cold start: nothing would be learnt"


@each_row
@pytest.mark.parametrize("filler", [float("nan"), -float("inf"), 0.0])
def test_masking_rationales_equals_the_smaller_group(row, filler):
    """A rationale that failed leaves M. It is not a rationale with w = 0 or reward 0, and what its entries hold must
    not matter: they hold anything.
    """
    table = made_up_table()
    masked = with_mask(table, [(b, m) for b in range(4) for m in (0, 3)], filler)
    remaining = [1, 2, 4]
    expected, result = of_step(row, entries(table, (slice(None), remaining))), of_step(row, masked)
    assert result[:, :, [0, 3]].count_nonzero() == 0
    torch.testing.assert_close(result[:, :, remaining], expected, rtol=1e-12, atol=0.0)


@each_row
def test_a_prompt_with_too_few_rationales_leaves_the_batch(row):
    """B counts the prompts that have something to train on; a zero in the mean would weaken all the others."""
    table = made_up_table()
    masked = with_mask(table, [(3, m) for m in range(5 - row.minimum_rationales + 1)], float("nan"))
    expected, result = of_step(row, entries(table, slice(0, 3))), of_step(row, masked)
    assert result[:, 3].count_nonzero() == 0
    torch.testing.assert_close(result[:, :3], expected, rtol=1e-12, atol=0.0)


@each_row
def test_the_least_number_is_the_least_that_trains(row):
    """Too low, and a run trains on nothing and ends with exit code 0; too high, and a good run is refused."""
    seen = [trains(row, made_up_table(4, num_rationales)) for num_rationales in (1, 2, 3, 4)]
    least = row.minimum_rationales
    assert seen == [size >= least for size in (1, 2, 3, 4)], f"trains with M = 1, 2, 3, 4: {seen}; the row says {least}"


@each_row
def test_another_number_of_rationales_is_refused_at_start_by_name(row):
    wrong = 2 if row.imitates else row.minimum_rationales - 1
    if wrong < 1:
        return
    with pytest.raises(UserError, match=f"--num-rationales must be .* for --estimator {row.name}"):
        validate_training(parse_args(["--estimator", row.name, "--num-rationales", str(wrong)]), 1)


@each_row
def test_what_a_row_declares_is_what_its_function_reads(row):
    """By what is declared a run says which flags have no effect, and computes ln w, or draws answers, or does not."""
    knobs, table = knobs_of(row), DeclaredTable(made_up_table(), row)
    resolve(row, row.function)(table, knobs)
    assert knobs.names_read == set(row.reads), "change reads"
    assert table.names_read == set(row.fields), "change needs"


@each_function
def test_reading_what_is_not_declared_is_refused_by_name(row, function, monkeypatch):
    """At start (rehearse), not at the first step, and never in silence."""
    undeclared = [("reads", tuple(set(row.reads) - {name}), f"knobs.{name}") for name in row.reads]
    if row.fields:
        undeclared.append(("needs", Needs.GIVEN_RATIONALE, f"table.{row.fields[0]}"))
    undeclared = [(field, value, words) for field, value, words in undeclared if is_read(row, function, words)]
    for field, value, words in undeclared:
        monkeypatch.setitem(ESTIMATORS, row.name, dataclasses.replace(row, function=function, **{field: value}))
        with pytest.raises(UserError, match=f"--estimator {row.name}: its function reads {words}, .* {field}"):
            rehearse(estimator(row), 4)


def is_read(row: EstimatorRow, function: str, words: str) -> bool:
    knobs = knobs_of(row)
    resolve(row, function)(made_up_table(), knobs)
    return words.startswith("table.") or words.removeprefix("knobs.") in knobs.names_read


@each_function
def test_nothing_depends_on_what_is_not_needed(row, function):
    """A step that does not know it leaves it out (None); one that does may hold anything there."""
    table = made_up_table()
    unneeded = [name for name in FLOATS if name not in row.fields]
    results = [
        resolve(row, function)(dataclasses.replace(table, **dict.fromkeys(unneeded, value)), knobs_of(row))
        for value in (None, torch.full(table.shape, torch.nan))
    ]
    for without, with_nan in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
        assert torch.equal(without, with_nan)


@each_row
def test_what_is_needed_and_lacking_is_refused_by_name(row):
    for field in row.fields:
        with pytest.raises(UserError, match=f"--estimator {row.name} needs {field}, which this step's table"):
            estimator(row).coefficients(dataclasses.replace(made_up_table(), **{field: None}), q=0.5, step=0)


@each_row
def test_prompts_do_not_know_their_place(row):
    """Ranks and layouts place prompts differently. Only random numbers belong to a place: here all have the same."""
    table, order = made_up_table(), [2, 0, 3, 1]
    plain, permuted = (both(row, each, generator=SamePerPrompt()) for each in (table, entries(table, order)))
    for before_BM, after_BM in zip(plain, permuted, strict=True):
        torch.testing.assert_close(before_BM[order], after_BM, rtol=1e-13, atol=0.0)


@each_function
def test_a_step_can_be_done_again(row, function):
    """Alike on every rank and after a resume: a pure function of table and knobs, that leaves the table as it is."""
    table, copy = made_up_table(), made_up_table()
    results = [resolve(row, function)(table, knobs_of(row)) for _ in range(2)]
    for first, second in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
        assert torch.equal(first, second)
    assert all(torch.equal(getattr(table, name), getattr(copy, name)) for name in (*FLOATS, "valid_BM"))


@each_row
def test_the_effective_reward_is_a_number(row):
    table, of_row = made_up_table(), estimator(row)
    coefficients = of_row.coefficients(table, q=0.5, step=0)
    largest = of_row.effective_reward_max(table, coefficients, q=0.5)
    assert isinstance(largest, float) and largest >= 0
    nothing = dataclasses.replace(table, valid_BM=torch.zeros(table.shape, dtype=torch.bool))
    assert of_row.effective_reward_max(nothing, coefficients, q=0.5) == 0.0


# A row, or a function, that is wrong


@each_row
def test_a_right_row_is_let_through_at_start(row):
    for num_rationales in range(row.minimum_rationales, 2 if row.imitates else 5):
        rehearse(estimator(row), num_rationales)


def too_few(table, knobs):
    return table.log_w_BM - table.log_w_BM.mean(dim=1, keepdim=True)


def single_precision(table, knobs):
    return table.log_w_BM.float(), table.log_w_BM.float()


def with_gradient(table, knobs):
    weight_BM = torch.where(table.valid_BM, table.log_w_BM, 0.0)
    return weight_BM, weight_BM


def not_masked(table, knobs):
    return table.log_w_BM.detach(), table.log_w_BM.detach()


def zeros(table, knobs):
    return torch.zeros_like(table.log_w_BM), torch.zeros_like(table.log_w_BM)


def infinite(table, knobs):
    return torch.where(table.valid_BM, torch.inf, 0.0).double(), table.valid_BM.double()


def not_in_log_space(table, knobs):
    weight_BM = torch.where(table.valid_BM, table.log_w_BM.detach().exp(), 0.0)
    return weight_BM / weight_BM.sum(dim=1, keepdim=True), weight_BM


def fails(table, knobs):
    raise KeyError("w")


def three_arguments(table, knobs, extra):
    return table, knobs


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("too_few", "returns Tensor; two tensors must come back"),
        ("single_precision", "returns rationale_BM as .*float32.*; float64 .* must come back"),
        ("with_gradient", "returns rationale_BM as .*, with a gradient; float64 .* must come back"),
        ("not_masked", "returns rationale_BM other than 0 for a rationale that is not valid"),
        ("zeros", "gives every rationale the constant 0 with --num-rationales 3: nothing would be trained"),
        ("infinite", "returns rationale_BM with a number that is not finite"),
        ("not_in_log_space", "returns rationale_BM with a number that is not finite"),
        ("fails", "fails on made-up numbers: KeyError: 'w'"),
        ("three_arguments", r"missing a required argument: 'extra'; it is called as three_arguments\(table, knobs\)"),
        ("nowhere", "has no function nowhere"),
    ],
)
def test_a_function_that_cannot_train_is_refused_at_start(function, words, monkeypatch):
    changes = {"function": f"{__name__}:{function}", "minimum_rationales": 1}
    row = dataclasses.replace(ESTIMATORS[DEFAULT], **changes, reads=(), aliases=(), effective_reward=None)
    monkeypatch.setitem(ESTIMATORS, DEFAULT, row)
    with pytest.raises(UserError, match=words):
        rehearse(Estimator.of(Config(), derive(parse_args(["--num-rationales", "3"]), 1)), 3)


def test_a_least_number_that_is_too_low_is_refused_at_start(monkeypatch):
    """GARL with M = 1 has no baseline: every coefficient is 0."""
    monkeypatch.setitem(ESTIMATORS, DEFAULT, dataclasses.replace(ESTIMATORS[DEFAULT], minimum_rationales=1))
    config = parse_args(["--num-rationales", "1"])
    validate_training(config, 1)
    with pytest.raises(UserError, match="the constant 0 with --num-rationales 1: nothing would be trained"):
        rehearse(Estimator.of(config, derive(config, 1)), 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reads": ("q", "normalize", "num_resamples")}, "does not read knobs.num_resamples, which its row declares"),
        ({"needs": Needs.GOLD_SCORE | Needs.REWARD}, "does not read table.reward_BM, which its row declares"),
        ({"effective_reward": f"{__name__}:fails"}, "fails on made-up numbers: KeyError: 'w'"),
    ],
)
def test_a_row_that_says_more_than_its_function_does_is_refused_at_start(changes, words, monkeypatch):
    """An unread q would stand in every line that is said of the run; an unneeded reward trains another answer."""
    monkeypatch.setitem(ESTIMATORS, DEFAULT, dataclasses.replace(ESTIMATORS[DEFAULT], **changes))
    with pytest.raises(UserError, match=words):
        rehearse(estimator(ESTIMATORS[DEFAULT]), 4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"needs": Needs(0)}, "needs says nothing, and no step brings that"),
        ({"needs": Needs.GOLD_SCORE | Needs.CORPUS_ROW}, "needs says ln p of the gold answer, a row of --data-path"),
        ({"minimum_rationales": 0}, "minimum_rationales 0 is not possible"),
        ({"name": "paft"}, "its name or an alias stands in the table twice"),
        ({"reads": ("normalize",)}, 'aliases stand for a q, which needs "q" in reads'),
        ({"reads": ("q", "normalise")}, "reads says normalise, which is no setting of .objective.; .*normalize"),
        ({"settings": ("grpo_beta",)}, "settings says grpo_beta, which is no setting"),
        ({"binary_rewards": True}, "binary_rewards needs Needs.REWARD"),
        ({"function": "garl"}, "write MODULE:FUNCTION"),
        ({"function": "megatron_jq.no_such:garl"}, "the module cannot be imported"),
    ],
)
def test_a_row_that_is_wrong_is_refused_at_start_by_name(changes, words, monkeypatch):
    row = dataclasses.replace(ESTIMATORS[DEFAULT], **changes)
    monkeypatch.setitem(ESTIMATORS, DEFAULT, row)
    if "name" in changes:
        monkeypatch.setattr("megatron_jq.estimators.NAMES", (*NAMES, "paft"))
    with pytest.raises(UserError, match=f"megatron_jq/estimators.py, row {row.name}: .*{words}"):
        config = Config()
        rehearse(Estimator.of(config, derive(config, 1)), 4)


def test_settings_that_are_refused_elsewhere_are_read_somewhere():
    assert REFUSED_ELSEWHERE <= READ_BY.keys()
