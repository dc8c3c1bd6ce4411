"""Counts of what makes the package easy or hard to read: `python -m tests.house`. One short run, the rest parsed."""

import ast
import subprocess
import sys

from tests.unit.test_estimator_names import lines_that_test
from tests.unit.test_names import POINTING, REPOSITORY, bound_names

PACKAGE = REPOSITORY / "megatron_jq"
FILES = sorted(PACKAGE.rglob("*.py"))
SOURCES = {str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8") for path in FILES}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def functions() -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of the package with its file."""
    return [(name, node) for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, FUNCTION)]


def typed(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether every parameter but self and cls has a type, and so has the return but for __init__'s."""
    arguments = function.args
    parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    bare = [p for p in parameters if p is not None and p.annotation is None and p.arg not in ("self", "cls")]
    return not bare and (function.returns is not None or function.name == "__init__")


def long_files(most: int = 300) -> list[str]:
    lengths = {name: source.count("\n") for name, source in SOURCES.items()}
    return [f"{name} {length}" for name, length in lengths.items() if length > most]


def long_functions(most: int = 60) -> list[str]:
    spans = [(f"{name}:{f.lineno} {f.name}", f.end_lineno - f.lineno + 1) for name, f in functions()]
    return [f"{label} {length}" for label, length in spans if length > most]


def imports(name: str) -> int:
    """Import statements of one module."""
    return sum(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(TREES[name]))


def main() -> None:
    variables = [variable for source in SOURCES.values() for variable, _ in bound_names(source)]
    pointing = sum(variable in POINTING for variable in variables)
    untyped = [f"{name}:{f.lineno} {f.name}" for name, f in functions() if not typed(f)]
    print(f"{len(TREES)} files, {sum(source.count(chr(10)) for source in SOURCES.values()):,} lines")
    print(f"variables with a name that only points: {pointing} of {len(variables):,} ({pointing / len(variables):.2%})")
    asking = [f"{name} {len(lines)}" for name, source in SOURCES.items() if (lines := lines_that_test(source))]
    print(f"lines that test an estimator's name: {asking or 'none'}")
    print(f"files over 300 lines: {long_files() or 'none'}")
    print(f"functions over 60 lines: {long_functions() or 'none'}")
    print(f"import statements of train/trainer.py: {imports('megatron_jq/train/trainer.py')}")
    print(f"functions with a type on every parameter and the return: {1 - len(untyped) / len(functions()):.1%}")
    for label in untyped:
        print(f"  untyped: {label}")
    frames = subprocess.run([sys.executable, "-m", "tests.frames"], cwd=REPOSITORY, capture_output=True, text=True)
    lines = [line for line in frames.stdout.splitlines() if "megatron_jq/" in line]  # without the run's own output
    print("\n".join([f"frames of the package from main to the loss: {len(lines) or frames.stderr}", *lines]))


if __name__ == "__main__":
    main()
