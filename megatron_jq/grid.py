"""F1: a TOML file of values to try, and the runs that follow: sweeps under Slurm and nemo-run read the same one.

    estimator = ["garl", "paft"]
    q = [0, 0.5, 1]
    lr = 1e-3

Keys are settings (as in `--config`, without tables). Every list is tried with every other: six runs, garl-q0 first.
"""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_jq.config import OLD_NAMES, SETTINGS, parse_args
from megatron_jq.errors import UserError
from megatron_jq.files import inside
from megatron_jq.toml_files import did_you_mean, read_toml


@dataclass(frozen=True)
class Point:
    """One run. name: for its folder and the legend; flags: for `megatron-jq train`."""

    name: str
    flags: tuple[str, ...]


def read_grid(path: str | Path) -> list[Point]:
    """The file's points; its last list varies fastest. UserError names the key at fault."""
    lists: list[tuple[str, list, bool]] = []
    for key, value in read_toml(path).items():
        name = OLD_NAMES.get(key.replace("-", "_"), key.replace("-", "_"))
        if isinstance(value, dict):
            raise UserError(f"{path}: [{key}]: a grid has no tables; write its keys at the top level")
        if any(name == earlier for earlier, _, _ in lists):
            raise UserError(f"{path}: {key} and an older name of it are both set; keep --{name.replace('_', '-')}'s")
        if name not in SETTINGS:
            raise UserError(f"{path}: unknown key {key}; {did_you_mean(name, SETTINGS, 'see train --help')}")
        if value == []:
            raise UserError(f"{path}: {key} lists no value")
        lists.append((name, value if isinstance(value, list) else [value], isinstance(value, list)))
    if not any(varies for _, _, varies in lists):
        raise UserError(f"{path}: no key lists values to try, such as q = [0, 0.5, 1]")
    points = []
    for values in itertools.product(*(choices for _, choices, _ in lists)):
        pairs = [(name, value, varies) for (name, _, varies), value in zip(lists, values, strict=True)]
        label = "-".join(_label(name, value) for name, value, varies in pairs if varies)
        inside(Path(), label, path)  # it names the run's folder
        points.append(Point(label, tuple(_flag(name, value) for name, value, _ in pairs)))
        _check(path, points[-1])
    names = [point.name for point in points]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: two points are called {twice}; list each value once")
    _check_folders(path, {name: values for name, values, _ in lists}, len(points))
    return points


#: Folders that belong to one run, and what a sweep has in their place.
_ONE_RUNS = {
    "save": "each run's checkpoints lie in its own directory",
    "run_dir": "the launcher gives each point a directory of its own",
}


def _check_folders(path: str | Path, lists: dict[str, list[object]], points: int) -> None:
    """UserError where points would share a folder that belongs to one run: the second would be refused by the first."""
    for name, instead in _ONE_RUNS.items():
        if name in lists and len(set(lists[name])) < points:
            raise UserError(
                f"{path}: {name} = {lists[name][0]!r} would be shared by several of {points} points, and it belongs to "
                f"one run; leave it out: {instead}"
            )


def _flag(name: str, value: object) -> str:
    kebab = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{kebab}" if value else f"--no-{kebab}"
    return f"--{kebab}={value}"


def _label(name: str, value: object) -> str:
    """'q0.75', 'garl': text speaks for itself, numbers need their name. Fit for a folder's name."""
    text = str(value) if isinstance(value, str) else f"{name.replace('_', '-')}{str(value).lower()}"
    return re.sub(r"[^\w.+-]+", "_", text)


def _check(path: str | Path, point: Point) -> None:
    try:
        parse_args(list(point.flags))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
