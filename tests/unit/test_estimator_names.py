"""No code asks what an estimator is called: it asks its row (megatron_jq/estimators.py). The source is parsed only.

A name that is tested somewhere is a place that the next estimator's author does not know of. Before there was a table,
41 lines in 20 files tested one; a new estimator was accepted with M = 1, and trained on nothing with exit code 0.
"""

import ast
from pathlib import Path

import pytest

from megatron_jq.estimators import NAMES

REPOSITORY = Path(__file__).resolve().parents[2]
#: The one file that may, and how often: the rows themselves are keyword arguments and count as none.
TABLE, MOST = "megatron_jq/estimators.py", 5


def lines_that_test(source: str) -> list[int]:
    """Lines that compare with an estimator's name, or collect names: in a tuple, list, set, dictionary or `case`."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Tuple | ast.List | ast.Set):
            parts = node.elts
        elif isinstance(node, ast.Dict):
            parts = node.keys
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        else:
            continue
        if any(isinstance(part, ast.Constant) and part.value in NAMES for part in parts):
            lines.append(node.lineno)
    return sorted(set(lines))


def test_no_line_but_the_tables_tests_an_estimators_name():
    counts = {}
    for folder in ("megatron_jq", "tools"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            if lines := lines_that_test(path.read_text(encoding="utf-8")):
                counts[path.relative_to(REPOSITORY).as_posix()] = lines
    in_table = len(counts.pop(TABLE, []))
    assert not counts, f"ask the row (config.objective.row, Estimator.row) for a property instead: {counts}"
    assert in_table <= MOST


@pytest.mark.parametrize(
    "source",
    (
        "if o.estimator == 'garl': pass",
        "if 'paft' != name: pass",
        "imitated = split == 'train' and estimator in ('sft',)",
        "POWERS = ['garl', x]",
        "FUNCTIONS = {'grpo': f}",
        "known = {'trice'}",
        "match name:\n    case 'star':\n        pass",
    ),
)
def test_the_counter_sees_each_way_to_test_a_name(source):
    assert len(lines_that_test(source)) == 1


def test_the_counter_lets_rows_and_words_pass():
    assert lines_that_test("row = Row(name='garl')\ntext = 'garl'\nx == 'adam'\nDEFAULT = 'garl'") == []
