"""Every tool tells a wrong command line as the main command does."""

import sys
from importlib import import_module
from pathlib import Path

import pytest

TOOLS = {path.stem for path in (Path(__file__).resolve().parents[2] / "tools").glob("*.py")}
#: Flags that the tool cannot read. bench_sharing leaves those that it does not know to bench_step.
WRONG = {
    "bench_head": "--no-such-flag",
    "bench_sharing": "--num-rationales many",
    "bench_step": "--steps many",
    "draw_step": "--no-such-flag",
    "draw_tree_row": "--no-such-flag",
    "estimate": "--gpus many",
    "plot_run": "--no-such-flag",
    "prepare_data": "--test-data",
    "preprocess_data": "--no-such-flag",
    "reference_pages": "--no-such-flag",
    "soak_checkpoints": "--kills many",
}


def test_every_tool_is_looked_at():
    assert set(WRONG) == TOOLS - {"convert_checkpoint"}  # that one is the main command


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(name, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", [name, *WRONG[name].split()])
    assert import_module(f"tools.{name}").main() == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"{name}: error: ") and err.endswith(f"; see tools/{name}.py --help\n")
    assert err.count("\n") == 1
