"""ruff over the repository and pyright over the rooms that pyproject.toml names: `python -m tests.check`.

A tool that is not installed (pip install -e .[dev]), or that does not start, is named and passed over. pyright takes
20 to 30 seconds; it runs on node, which its wheel brings, or would download.
"""

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DEADLINE_SECONDS = 300

#: Findings of pyright that a room may still have. They only fall; a room that is not listed has none.
MOST: dict[str, int] = {}


def run(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", tool, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=DEADLINE_SECONDS)


def ruff_passes() -> bool:
    result = run("ruff", "check", "--quiet", "megatron_jq", "tests", "tools", "launch", "examples")
    print(result.stdout or result.stderr or "ruff: no findings")
    return result.returncode == 0


def pyright_passes() -> bool:
    """Whether every room has at most its findings; prints those of a room that has more."""
    try:
        result = run("pyright", "--pythonpath", sys.executable, "--outputjson")
        report = json.loads(result.stdout)
    except subprocess.TimeoutExpired:
        print(f"pyright does not end within {DEADLINE_SECONDS} s: not checked")
        return True
    except ValueError:
        print(f"pyright does not run: not checked ({(result.stderr or result.stdout).strip()})")
        return True
    rooms: dict[str, list[str]] = {}
    for entry in report["generalDiagnostics"]:
        path = Path(entry["file"]).relative_to(REPOSITORY)
        if entry["severity"] == "error":
            line = entry["range"]["start"]["line"] + 1
            rooms.setdefault("/".join(path.parts[:2]), []).append(f"{path}:{line}: {entry['message']}")
    counts = Counter({room: len(lines) for room, lines in rooms.items()})
    checked = report["summary"]["filesAnalyzed"]
    by_room = ", ".join(f"{room} {count}" for room, count in sorted(counts.items()))
    print(f"pyright: {checked} files, {counts.total()} findings", by_room)
    worse = [room for room in rooms if counts[room] > MOST.get(room, 0)]
    for room in worse:
        print(f"{room} has {counts[room]} findings, {MOST.get(room, 0)} at most:", *rooms[room], sep="\n")
    for room in MOST:
        if counts[room] < MOST[room]:
            print(f"{room} has {counts[room]} findings: lower its {MOST[room]} in tests/check.py")
    return checked > 0 and not worse


def main() -> int:
    passed = True
    for tool, check in (("ruff", ruff_passes), ("pyright", pyright_passes)):
        if importlib.util.find_spec(tool) is None:
            print(f"{tool} is not installed (pip install -e .[dev]): not checked")
        else:
            passed = check() and passed
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
