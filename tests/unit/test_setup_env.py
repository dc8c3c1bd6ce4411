"""Which interpreter tools/setup_env.sh makes the environment with: the README's two commands begin there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parents[2] / "tools" / "setup_env.sh"
NAMES = ("python3", "python3.13", "python3.12", "python3.11", "python3.10")

#: Answers as Python of a version to setup_env.sh's question, and makes no environment.
INTERPRETER = """#!/bin/sh
[ "$1" = -c ] || exit 1
exec "{python}" -c "import sys; sys.version_info = {version}; exec(sys.argv[1])" "$2"
"""


def setup(folder: Path, versions: dict[str, tuple[int, int, int]], **variables: str) -> str:
    """Return what setup_env.sh says on a machine with these interpreters, none of which makes an environment."""
    for name in {*NAMES, *versions}:
        program = folder / name
        program.write_text(INTERPRETER.format(python=sys.executable, version=versions.get(name, (3, 9, 0))))
        program.chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "MEGATRON_JQ_VENV": str(folder / "environment"), **variables}
    command = ["bash", "-c", f'source "{SETUP}"']
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert result.returncode == 1 and os.listdir(folder).count("environment") == 0
    return result.stderr


@pytest.mark.parametrize(
    ("versions", "chosen"),
    [
        ({"python3": (3, 13, 0), "python3.12": (3, 12, 1)}, "python3"),
        ({"python3": (3, 14, 0), "python3.12": (3, 12, 1), "python3.11": (3, 11, 7)}, "python3.12"),
        ({"python3": (3, 9, 2), "python3.10": (3, 10, 13)}, "python3.10"),
    ],
)
def test_the_first_interpreter_with_wheels_is_taken(tmp_path, versions, chosen):
    assert f"setup: {tmp_path / chosen} cannot make virtual environments" in setup(tmp_path, versions)


def test_no_interpreter_is_one_error_that_names_the_versions(tmp_path):
    says = setup(tmp_path, {"python3": (3, 14, 0)})
    assert "is Python 3.10 to 3.13; install one, or set PYTHON" in says and says.count("\n") == 1


def test_a_named_interpreter_may_be_newer_but_not_older(tmp_path):
    newer = tmp_path / "mine"
    assert f"setup: {newer} cannot make" in setup(tmp_path, {"mine": (3, 14, 0)}, PYTHON=str(newer))
    assert "is not Python 3.10 or newer" in setup(tmp_path, {"mine": (3, 9, 0)}, PYTHON=str(newer))
