"""F4: `--match math`: whether two answers are the same mathematics, by the math-verify package in a process of its own.

math-verify takes 70k for 70, 5e-3 for 5, 9.3 % for 0.093 and for 9.3, and of prose the last number. So it is asked only
about what it is for: two expressions of which not both are quantities of data/numbers.py, without prose, and with a
percent sign in both or in neither. Texts that are equal under rule number are equal without asking.
"""

import atexit
import importlib.util
import json
import re
import select
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_jq.data.answers import AcceptedAnswers, folded, quantity_of
from megatron_jq.data.numbers import unwrapped
from megatron_jq.data.units import UNITS
from megatron_jq.errors import RunFailure, UserError

PACKAGE = "math_verify"
#: Seconds that one comparison may take, and the start of the process.
DEADLINE, START_DEADLINE = 10.0, 300.0
#: The longest expressions that are asked about, in characters.
LONGEST = 2000

_START = "import runpy, sys; sys.path.pop(0); runpy.run_path(sys.argv[1], run_name='__main__')"
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_WORD = re.compile(r"[^\W\d_]{2,}")
_FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "log", "ln", "exp",
    "sqrt", "pi", "inf", "infty", "min", "max", "gcd", "lcm", "mod", "det", "cis",
}  # fmt: skip


def check_installed() -> None:
    """UserError where the package is missing: before any work starts."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise UserError("--match math needs the math-verify package: pip install megatron-jq[math]")


class MathAnswers:
    """The gold answers of one prompt, as AcceptedAnswers, for `--match math`.

    Equality to a gold answer comes first; other answers vote with the first earlier one that they equal, for
    math-verify's relation is not transitive.
    """

    def __init__(self, golds: Sequence[str], process: "MathProcess", *, ratios: bool = False):
        self._plain = AcceptedAnswers(golds, "exact", "number", ratios=ratios)
        self._golds, self._process = list(golds), process
        self._right = self._plain.key(golds[0])
        self._key_of: dict[str, str] = {}  # of each text's own key
        self._classes: list[tuple[str, str]] = []  # (key, a text)

    def key(self, answer: str) -> str:
        plain = self._plain.key(answer)
        if plain not in self._key_of:
            self._key_of[plain] = self._class_of(plain, answer)
        return self._key_of[plain]

    def accepts(self, key: str) -> bool:
        return key == self._right

    def _class_of(self, plain: str, answer: str) -> str:
        if plain == self._right or any(self._same(gold, answer) for gold in self._golds):
            return self._right
        for key, text in self._classes:
            if self._same(text, answer) or self._same(answer, text):
                return key
        self._classes.append((plain, answer))
        return plain

    def _same(self, gold: str, answer: str) -> bool:
        pair = [expression(gold), expression(answer)]
        if None in pair or (quantity_of(gold) is not None and quantity_of(answer) is not None):
            return False
        return ("%" in pair[0]) == ("%" in pair[1]) and self._process.equal(*pair)


def expression(text: str) -> str | None:
    """The text as an expression: without Markdown or marks around it. None where it holds prose, or is too long."""
    text = unwrapped(folded(text)).replace("\\$", "$").replace("$", "")
    words = (word.casefold() for word in _WORD.findall(_COMMAND.sub(" ", text)))
    prose = any(word not in _FUNCTIONS and word not in UNITS for word in words)
    return None if not text or prose or len(text) > LONGEST else text


class MathProcess:
    """math-verify's process, started when it is first asked. What takes longer than the deadline is not equal.

    unanswered: how many comparisons did, or ran out of memory.
    """

    def __init__(self, deadline: float = DEADLINE):
        self._deadline, self.unanswered = deadline, 0
        self._process: subprocess.Popen[str] | None = None
        self._known: dict[tuple[str, str], bool] = {}  # the same samples are judged as they come, and for the results

    def equal(self, gold: str, answer: str) -> bool:
        """RunFailure where the process cannot be started."""
        if (gold, answer) not in self._known:
            self._known[gold, answer] = self._ask(gold, answer)
        return self._known[gold, answer]

    def _ask(self, gold: str, answer: str) -> bool:
        if self._process is None:
            self._start()
        try:
            self._process.stdin.write(json.dumps([gold, answer]) + "\n")
            self._process.stdin.flush()
            line = self._line(self._deadline)
        except BrokenPipeError:
            line = ""
        if not line:  # too long, or it died of this pair: another process answers the next
            self.close()
        equal = json.loads(line) if line else None
        self.unanswered += equal is None
        return bool(equal)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        script, errors = Path(__file__).with_name("math_worker.py"), tempfile.TemporaryFile()  # a pipe would fill up
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(script)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8",
        )  # fmt: skip
        atexit.register(self.close)
        if self._line(START_DEADLINE) != "ready\n":
            self.close()
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            reason = (lines or [f"it did not start within {START_DEADLINE:g} seconds"])[-1]
            raise RunFailure(f"--match math: math-verify's process failed: {reason}")

    def _line(self, seconds: float) -> str:
        """Its next line; "" where none came in time, or it ended."""
        poll = select.poll()  # select() cannot wait for a file beyond the process's first 1024
        poll.register(self._process.stdout, select.POLLIN)
        return self._process.stdout.readline() if poll.poll(1000 * seconds) else ""


#: The process of this one.
PROCESS = MathProcess()
