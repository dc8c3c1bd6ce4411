"""Imports go only down the floors. The source is parsed, not imported, so optional packages do not matter.

The floors are the package's architecture. A new room or root module needs a line in FLOORS before its tests pass.
"""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_jq"

FLOORS = {
    "__init__": 0,
    "errors": 0,
    "files": 0,
    "seeds": 0,
    "streams": 0,
    "interrupts": 0,
    "toml_files": 0,
    "objective": 0,
    "records": 1,
    "estimators": 1,
    "settings": 1,
    "architecture": 1,
    "architecture_files": 1,
    "config": 1,
    "config_estimators": 1,
    "config_layout": 1,
    "config_reads": 1,
    "config_validate": 1,
    "grid": 1,
    "formats": 1,
    "data": 2,
    "parallel": 2,
    "model": 3,
    "rollout": 3,
    "corpus": 3,
    "checkpoint": 4,
    "train": 4,
    "evaluate": 4,
    "report": 4,
    "preflight": 4,
    "bench": 4,
    "estimate": 4,
    "cli": 5,
    "__main__": 5,
}

# The only imports between rooms of one floor. They must form no circle.
SAME_FLOOR = {
    "objective": {"errors", "seeds"},
    "files": {"errors"},
    "toml_files": {"errors"},
    "architecture_files": {"architecture"},
    "settings": {"estimators", "formats"},
    "config": {"estimators", "settings"},
    "config_estimators": {"architecture", "architecture_files", "config", "estimators"},
    "config_reads": {"architecture", "architecture_files", "config", "config_estimators", "estimators", "formats"},
    "config_layout": {"architecture", "config"},
    "config_validate": {
        "architecture",
        "architecture_files",
        "config",
        "config_estimators",
        "config_layout",
        "estimators",
        "formats",
    },
    "grid": {"config"},
    "rollout": {"model"},
    "train": {"checkpoint", "evaluate"},
    "evaluate": {"checkpoint"},
    "bench": {"train"},
    "__main__": {"cli"},
}

# Rooms a tool may import where Megatron-core is not installed or no process group exists.
WITHOUT_MEGATRON = [room for room, floor in FLOORS.items() if floor <= 1] + ["data", "report", "estimate", "preflight"]


def imported_names(source: str, module: str, *, is_package: bool) -> set[str]:
    """Dotted names that a module imports anywhere in its body: absolute, relative, and import_module with a literal.

    `from a import b` counts as a.b: whether b is a module or a name in one cannot be told from the source alone.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join(parents + ([node.module] if node.module else []))
            names.update(f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                names.add(node.args[0].value)
    return names


def attribute_chains(source: str) -> set[str]:
    """Dotted expressions such as torch.distributed.all_reduce, for what is reached without an import of its own."""
    chains = set()
    for node in ast.walk(ast.parse(source)):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name):
            chains.add(".".join([node.id, *reversed(parts)]))
    return chains


def room_of(name: str) -> str:
    """The room of a dotted name inside the package; what is no room of its own belongs to the root."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else "__init__"


def upward_imports(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What a module imports of the package although its floor forbids it."""
    room = room_of(module)
    wrong = []
    for name in sorted(imported_names(source, module, is_package=is_package)):
        if name.split(".")[0] != "megatron_jq":
            continue
        target = room_of(name)
        if target == "__init__" and len(name.split(".")) > 2:
            wrong.append(f"{module} imports {name}, which has no floor: add it to FLOORS")
        elif target not in (room, "__init__") and not (
            FLOORS[target] < FLOORS[room] or target in SAME_FLOOR.get(room, ())
        ):
            wrong.append(f"{module} (F{FLOORS[room]}) imports {name} (F{FLOORS[target]})")
    return wrong


def reads_parallel_state(source: str, module: str, *, is_package: bool = False) -> bool:
    """Whether a module touches Megatron's global parallel state, by its name or its legacy alias mpu."""
    names = imported_names(source, module, is_package=is_package) | attribute_chains(source)
    return any({"parallel_state", "mpu"} & set(name.split(".")) for name in names)


def foreign_packages(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """Top-level packages that are neither ours nor in the standard library."""
    roots = {name.split(".")[0] for name in imported_names(source, module, is_package=is_package)}
    return roots - set(sys.stdlib_module_names) - {"megatron_jq"}


def modules() -> list[tuple[str, Path]]:
    """Every module of the package as (dotted name, file); a package's own name stands for its __init__.py."""
    result = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["megatron_jq", *path.relative_to(PACKAGE).with_suffix("").parts]
        result.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return result


MODULES = modules()


def over_modules(*rooms: str) -> pytest.MarkDecorator:
    """Parametrise a test over every module of these rooms, or of all rooms."""
    chosen = [pytest.param(*each, id=each[0]) for each in MODULES if not rooms or room_of(each[0]) in rooms]
    return pytest.mark.parametrize(("module", "path"), chosen)


def test_the_walk_finds_the_package():
    names = {module for module, _ in MODULES}
    assert {"megatron_jq", "megatron_jq.errors", "megatron_jq.objective", "megatron_jq.objective.garl"} <= names


@over_modules()
def test_every_module_has_a_floor(module, path):
    parts = module.split(".")
    assert len(parts) == 1 or parts[1] in FLOORS, f"{module} has no floor: add it to FLOORS"


@over_modules()
def test_imports_go_only_down(module, path):
    assert upward_imports(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py") == []


@over_modules()
def test_global_parallel_state_is_read_in_one_file(module, path):
    touched = reads_parallel_state(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py")
    assert not touched or module == "megatron_jq.parallel.groups"


@over_modules(*WITHOUT_MEGATRON)
def test_the_lower_rooms_know_nothing_of_megatron_or_processes(module, path):
    source, is_package = path.read_text(encoding="utf-8"), path.name == "__init__.py"
    assert "megatron" not in foreign_packages(source, module, is_package=is_package)
    reached = imported_names(source, module, is_package=is_package) | attribute_chains(source)
    assert not [name for name in reached if name.startswith("torch.distributed")]


@over_modules("objective")
def test_the_objective_needs_torch_and_the_standard_library_alone(module, path):
    assert foreign_packages(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py") <= {
        "torch"
    }


def test_the_exceptions_stay_on_one_floor_and_form_no_circle():
    for room, targets in SAME_FLOOR.items():
        assert all(FLOORS[target] == FLOORS[room] for target in targets), room
    tuple(graphlib.TopologicalSorter(SAME_FLOOR).static_order())  # raises CycleError


@pytest.mark.parametrize(
    ("module", "source"),
    (
        ("megatron_jq.objective.garl", "from megatron_jq.config import Config"),
        ("megatron_jq.objective.garl", "from megatron_jq import config"),
        ("megatron_jq.objective.garl", "from .. import train"),
        ("megatron_jq.objective.garl", "from ..train.step import step"),
        ("megatron_jq.objective.garl", "def late():\n    import megatron_jq.train.passes"),
        ("megatron_jq.objective.garl", "import importlib\nimportlib.import_module('megatron_jq.parallel.groups')"),
        ("megatron_jq.errors", "from megatron_jq.objective import garl"),
        ("megatron_jq.data.jsonl", "from megatron_jq.parallel.runtime import Runtime"),
        ("megatron_jq.model.policy", "from megatron_jq.rollout.engine import RolloutRequest"),
        ("megatron_jq.evaluate", "from megatron_jq.train.run import run_training"),
        ("megatron_jq.train.passes", "from megatron_jq.cli.main import main"),
        ("megatron_jq", "from megatron_jq.config import Config"),
        ("megatron_jq.train.passes", "from megatron_jq.helpers.odds import ends"),
    ),
)
def test_the_check_catches_an_import_that_goes_up(module, source):
    assert len(upward_imports(source, module, is_package=module == "megatron_jq")) == 1


@pytest.mark.parametrize(
    ("module", "is_package", "source"),
    (
        ("megatron_jq.objective", True, "from . import garl\nfrom .paft import paft_coefficients"),
        ("megatron_jq.objective.garl", False, "from ..errors import UserError\nfrom . import tsallis"),
        ("megatron_jq.rollout.megatron", False, "from megatron_jq.model.policy import Policy"),
        ("megatron_jq.train.trainer", False, "from megatron_jq import evaluate, objective\nimport megatron_jq.data"),
        ("megatron_jq.cli.main", False, "from megatron_jq import __version__"),
        ("megatron_jq.parallel.groups", False, "from megatron.core import parallel_state"),
    ),
)
def test_the_check_lets_an_import_pass_that_goes_down(module, is_package, source):
    assert upward_imports(source, module, is_package=is_package) == []


@pytest.mark.parametrize(
    "source",
    (
        "from megatron.core import parallel_state",
        "from megatron.core import mpu",
        "import megatron.core.parallel_state as state",
        "from megatron.core.parallel_state import get_tensor_model_parallel_group",
        "import megatron.core\nmegatron.core.parallel_state.get_tensor_model_parallel_group()",
        "def late():\n    from megatron.core import parallel_state",
    ),
)
def test_the_check_catches_every_way_to_the_global_parallel_state(source):
    assert reads_parallel_state(source, "megatron_jq.train.passes")
    assert not reads_parallel_state("from megatron.core import tensor_parallel", "megatron_jq.train.passes")


def test_the_check_catches_a_foreign_package_in_the_objective():
    source = "import math\nimport torch\nimport numpy as np\nfrom megatron_jq.errors import UserError"
    assert foreign_packages(source, "megatron_jq.objective.garl") == {"torch", "numpy"}
    assert "torch.distributed.all_reduce" in attribute_chains("import torch\ntorch.distributed.all_reduce(x)")
