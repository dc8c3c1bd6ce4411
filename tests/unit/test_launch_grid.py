"""`megatron-jq grid`: the runs that a sweep's TOML file describes."""

import pytest

from megatron_jq.cli.main import main
from megatron_jq.config import parse_args
from megatron_jq.errors import UserError
from megatron_jq.grid import read_grid


@pytest.fixture
def grid(tmp_path):
    def write(text: str):
        path = tmp_path / "my grid.toml"
        path.write_text(text)
        return path

    return write


def test_every_list_is_tried_with_every_other_and_single_values_are_in_all(grid):
    points = read_grid(grid('estimator = ["garl", "paft"]\nq = [0, 0.5]\nlr = 1e-3\nbf16 = [true]\n'))
    assert [p.name for p in points] == [
        "garl-q0-bf16true",
        "garl-q0.5-bf16true",
        "paft-q0-bf16true",
        "paft-q0.5-bf16true",
    ]
    config = parse_args(list(points[1].flags))
    assert (config.objective.estimator, config.objective.q) == ("garl", 0.5)
    assert (config.optimizer.lr, config.model.bf16) == (1e-3, True)


def test_a_name_is_fit_for_a_folder(grid):
    (point,) = read_grid(grid('train_data = ["data/my set.jsonl"]\n'))
    assert point.name == "data_my_set.jsonl" and point.flags == ("--train-data=data/my set.jsonl",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("qq = [1]", "unknown key qq; did you mean q"),
        ("[objective]\nq = [1]", "[objective]: a grid has no tables"),
        ("q = []", "q lists no value"),
        ("q = 0.5", "no key lists values to try"),
        ("q = [0.5, 0.5]", "two points are called q0.5"),
        ('normalise = ["text"]\nmatch_rule = ["number"]', "match_rule and an older name of it are both set"),
        ('q = ["much"]', "--q much: expected a number"),
        ("q = [", "is not valid TOML"),
        ('q = [0, 1]\nsave = "/all"', "save = '/all' would be shared by several of 2 points, and"),
        ('q = [0, 1]\nsave = ["/a", "/b"]', "save = '/a' would be shared by several of 4 points"),
        ('q = [0, 1]\nrun_dir = "/all"', "run_dir = '/all' would be shared by several of 2 points"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(grid, text, words):
    path = grid(text)
    with pytest.raises(UserError) as raised:
        read_grid(path)
    assert str(path) in str(raised.value) and words in str(raised.value)


def test_the_command_prints_all_points_or_one(grid, capsys):
    path = str(grid("q = [0.25, 1]\ntrain_iters = 3\n"))
    assert main(["grid", path]) == 0
    assert capsys.readouterr().out == "0 q0.25 --q=0.25 --train-iters=3\n1 q1 --q=1 --train-iters=3\n"
    assert main(["grid", path, "--point", "1"]) == 0
    assert capsys.readouterr().out == "q1\n--q=1\n--train-iters=3\n"
    assert main(["grid", path, "--point", "2"]) == 2
    assert "has 2 points, 0 to 1; none is 2" in capsys.readouterr().err


def test_points_with_folders_of_their_own_are_a_sweep(grid):
    points = read_grid(grid('save = ["/a", "/b"]\nlr = 1e-3\n'))
    assert [point.flags[0] for point in points] == ["--save=/a", "--save=/b"]
