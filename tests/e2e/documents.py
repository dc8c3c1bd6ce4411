"""The commands of the documents, as bash reads them: loops, variables and continued lines included.

A snippet (a fenced bash block, an indented block of command lines, a `command` in a sentence) is run by bash with no
program but a few that do no harm: every other call is recorded with its arguments, not carried out. So the README's
line, and the lines that ./examples/quickstart.sh would run, come out as lists of words, ready to be done in small.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PATTERNS = ("*.md", "docs/*.md", "docs/study/*.md", "docs/measurements/*.md", "examples/*/*.md", "launch/**/*.md")
DOCUMENTS = sorted(str(path.relative_to(REPOSITORY)) for pattern in PATTERNS for path in REPOSITORY.glob(pattern))
_PROGRAM = (
    r"(?:[A-Z_]+=\S+ +)*"
    r"(?:megatron-jq(?! \d)|python3?|torchrun|sbatch|srun|scancel|pip|git|\.venv/bin/\S+|\./[\w/.]+|"
    r"(?:tools|examples|launch)/[\w/]+\.(?:py|sh))"
)
_COMMAND = re.compile(rf"{_PROGRAM}(?: |$)")
_INLINE = re.compile(rf"(?<!`)`({_PROGRAM} +[^`]+)`(?!`)")
#: Programs that scripts need to find themselves; all others are recorded.
_HARMLESS = ("bash", "env", "dirname", "realpath", "date")
#: Set before a command, these go to a job.
VARIABLES = ("RUN_DIR", "SWEEP_DIR", "QS", "SBATCH_ACCOUNT", "LOAD", "EVALUATION_DIR", "GRID")
_PRELUDE = r"""
record() { printf '%s\0' "$#" VARIABLES "$@" >>"$RECORD"; [[ $* != *--parsable* ]] || echo 1234; }
command_not_found_handle() { record "$@"; }
export -f record command_not_found_handle
"""


@dataclass(frozen=True)
class Snippet:
    """line: of the document, from 1. printed: what the document shows below the command, where it shows that."""

    document: str
    line: int
    text: str
    printed: str = ""

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


@dataclass(frozen=True)
class Call:
    """A program and its arguments. variables: those of VARIABLES that were set."""

    snippet: Snippet
    words: tuple[str, ...]
    variables: dict[str, str]

    def __str__(self) -> str:
        return f"{self.snippet}: {' '.join(self.words)}"


def snippets(document: str, text: str | None = None) -> list[Snippet]:
    """All of a document, in its order."""
    text = (REPOSITORY / document).read_text(encoding="utf-8") if text is None else text
    lines, result, prose, at = text.split("\n"), [], [], 0
    while at < len(lines):
        line = lines[at]
        if line.startswith("```"):
            end = next(i for i in range(at + 1, len(lines)) if lines[i].startswith("```"))
            body = lines[at + 1 : end]
            if line[3:].strip() in ("bash", "sh", "shell", "console"):
                result.append(Snippet(document, at + 2, "\n".join(body)))
            elif body and body[0].startswith("$ "):
                command = _continued(body, 0)
                shown = "\n".join(body[len(command) :]) + "\n"
                result.append(Snippet(document, at + 2, "\n".join(command)[2:], shown))
            prose += [""] * (end - at + 1)
            at = end + 1
        elif line.startswith("    ") and _COMMAND.match(line[4:]):
            command = _continued(lines, at)
            result.append(Snippet(document, at + 1, "\n".join(command)))
            prose += [""] * len(command)
            at += len(command)
        else:
            prose.append(line)
            at += 1
    sentences = "\n".join(prose)
    for match in _INLINE.finditer(sentences):
        line = sentences.count("\n", 0, match.start()) + 1
        result.append(Snippet(document, line, " ".join(match[1].split())))
    return sorted(result, key=lambda snippet: snippet.line)


def _continued(lines: list[str], first: int) -> list[str]:
    last = first
    while lines[last].endswith("\\"):
        last += 1
    return lines[first : last + 1]


def make_place(place: Path) -> None:
    """A folder that looks like the repository to scripts, whose programs only record."""
    place.mkdir(parents=True)
    (place / "bin").mkdir()
    for name in _HARMLESS:
        (place / "bin" / name).symlink_to(shutil.which(name))
    for folder in ("examples", "launch"):
        shutil.copytree(REPOSITORY / folder, place / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (place / "tools").mkdir()
    (place / "tools" / "setup_env.sh").write_text("")  # it installs packages; the suite itself runs by it
    programs = [f"tools/{path.name}" for path in (REPOSITORY / "tools").glob("*.py")]
    for program in (*programs, ".venv/bin/python", ".venv/bin/pip", "tests/run.sh", "tests/slurm/in_root.sh"):
        path = place / program
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!{shutil.which("bash")}\nrecord {program} "$@"\n')
        path.chmod(0o755)
    (place / "megatron-jq").symlink_to(place)  # `git clone URL megatron-jq && cd megatron-jq`


def calls(snippet: Snippet, place: Path, variables: dict[str, str]) -> list[Call]:
    """What bash would start for it, in `place`. AssertionError where bash refuses it."""
    record = place / "record"
    record.write_bytes(b"")
    names = " ".join(f'"{name}=${{{name}-}}"' for name in VARIABLES)
    environment = {"PATH": str(place / "bin"), "RECORD": str(record), "HOME": str(place), **variables}
    script = f"set -euo pipefail\n{_PRELUDE.replace('VARIABLES', names)}\n{snippet.text}\n"
    bash = subprocess.run(
        ["/bin/bash", "--noprofile", "--norc", "-c", script], cwd=place, env=environment, capture_output=True, text=True
    )
    assert bash.returncode == 0, f"{snippet}: bash ends with {bash.returncode}: {bash.stderr}"
    words, result = record.read_bytes().decode().split("\0")[:-1], []
    while words:
        number = int(words.pop(0))
        taken = [words.pop(0) for _ in range(len(VARIABLES) + number)]
        pairs = (word.split("=", 1) for word in taken[: len(VARIABLES)])
        result.append(Call(snippet, tuple(taken[len(VARIABLES) :]), {name: text for name, text in pairs if text}))
    return result


def without_python(words: tuple[str, ...]) -> tuple[str, ...]:
    """`python tools/x.py …`, `.venv/bin/python …` and `tools/x.py …` are one; so are torchrun and its module."""
    words = list(words)
    if os.path.basename(words[0]) in ("python", "python3"):
        words = words[1:]
        if words[:2] == ["-m", "torch.distributed.run"]:
            words = ["torchrun", *words[2:]]
        elif words[:2] == ["-m", "megatron_jq"]:
            words = ["megatron-jq", *words[2:]]
    return tuple(words)
