"""The process in which math-verify runs: pairs of expressions in, one JSON line each, whether they are equal out.

Started by math_judge.py as a script, not imported: math-verify uses SIGALRM and cancels whatever alarm its process has.
It imports nothing of megatron_jq.
"""

import json
import logging
import resource
import sys

#: Bytes of memory that a comparison may take: 9^{9^{9^9}} asks for more than there is.
MEMORY = 4 << 30


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints is no answer
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)  # it logs every expression that takes too long
    from math_verify import parse, verify

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        try:
            equal = bool(verify(parse(f"${gold}$"), parse(f"${answer}$")))
        except MemoryError:
            equal = None
        print(json.dumps(equal), file=answers, flush=True)


if __name__ == "__main__":
    main()
