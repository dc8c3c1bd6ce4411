"""No variable points where it could name: `found` and `one` say nothing of what they hold. The source is parsed only.

MOST holds what each room still has. Its numbers only fall; a room that is not listed has none.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
POINTING = frozenset("found one some made given named kept whole own here mine theirs where".split())

MOST = {
    "megatron_jq": 1,
    "megatron_jq/evaluate": 2,
    "megatron_jq/rollout": 3,
    "tests/distributed": 105,
    "tests/e2e": 30,
    "tests/gpu": 5,
    "tests/slurm": 2,
    "tests/unit": 71,
}


def bound_names(source: str) -> Iterator[tuple[str, int]]:
    """Every variable that a source binds, with its line: assigned, looped over, caught, opened by `with`, passed."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name, node.lineno


def rooms() -> dict[str, list[Path]]:
    """The repository's source files by room: a folder of the package or of tests/, else the folder at the root."""
    files: dict[str, list[Path]] = {}
    for root in ("megatron_jq", "tools", "launch", "examples", "tests"):
        for path in sorted((REPOSITORY / root).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).parts[:-1]
            files.setdefault("/".join(parts[: 2 if root in ("megatron_jq", "tests") else 1]), []).append(path)
    return files


ROOMS = rooms()


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_variables_name_what_they_hold(room):
    pointing = [
        f"{path.relative_to(REPOSITORY)}:{line} {name}"
        for path in ROOMS[room]
        for name, line in bound_names(path.read_text(encoding="utf-8"))
        if name in POINTING
    ]
    most = MOST.get(room, 0)
    assert len(pointing) <= most, (
        f"{room}: {len(pointing)} variables have a name that only points, {most} at most. Name what yours holds "
        f"(its content or role: `missing_keys`, not `found`; `location`, not `where`):\n" + "\n".join(pointing)
    )


def test_every_way_to_bind_a_name_is_seen():
    source = (
        "found = 1\nfor one in (): pass\nwith open('') as given: pass\n[kept for kept in ()]\nif (own := 1): pass\n"
        "def f(some, *named, where=0, **made): pass\nlambda mine: 0\na, (*theirs, b) = 0, (1, 2)\n"
        "try: pass\nexcept OSError as here: pass\nwhole: int\nself.found = one.found"
    )
    assert POINTING == {name for name, _ in bound_names(source)} - {"a", "b"}
