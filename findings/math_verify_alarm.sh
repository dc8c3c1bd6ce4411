#!/usr/bin/env bash
# math-verify 0.9.0: parse() and verify() guard themselves with SIGALRM and leave the timer at zero. A deadline that the
# caller set with signal.alarm or setitimer is gone after the first parse, and nothing says so: the handler stays in its
# place and is never called. A reader who knows that the library has timeouts would expect it to restore what it found.
# Seen: Python 3.11, 2026-11. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "math-verify==0.9.0" "latex2sympy2_extended==1.11.0" "sympy==1.14.0"
"$folder/env/bin/python" - <<'PYTHON'
import signal, sys, time
from importlib.metadata import version

from math_verify import parse, verify

rang = []
signal.signal(signal.SIGALRM, lambda *_: rang.append(1))


def left_after(work):
    """Seconds that a deadline of 1 s has left after `work`, and how often it rang within 1.5 s."""
    rang.clear()
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    result = work()
    left = signal.getitimer(signal.ITIMER_REAL)[0]
    time.sleep(1.5)
    return result, round(left, 1), len(rang)


print("python", sys.version.split()[0], "math-verify", version("math-verify"))
gold, answer = parse("2"), parse("3")
cases = {"nothing": left_after(lambda: None), "parse": left_after(lambda: parse("2")),
         "verify": left_after(lambda: verify(gold, answer))}
for name, (result, left, rings) in cases.items():
    print(f"{name}: {result}; {left} s left, rang {rings} time(s)")
assert cases["nothing"][1:] == (1.0, 1), "this machine's timers"
assert cases["parse"][1:] == (0.0, 0) and cases["verify"][1:] == (0.0, 0), "it keeps the caller's timer now"
assert cases["parse"][0] and cases["verify"][0] is False
PYTHON
