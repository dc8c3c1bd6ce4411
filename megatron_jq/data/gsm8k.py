"""F2: GSM8K's official record, {"question", "answer"}, whose answer is a worked solution with the gold after "####".

Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems". The worked solution is read as a given rationale
alone (SFT); elsewhere the rationale is latent.
"""

import re

from megatron_jq.data.faults import RecordError
from megatron_jq.data.jsonl import text_field
from megatron_jq.data.pair import Pair

GOLD_MARK = "####"


def gsm8k_pair(where: str, record: dict) -> Pair:
    """RecordError: no question, no answer, or an answer without its mark or gold."""
    question, solution = (text_field(record, field, where) for field in ("question", "answer"))
    return Pair(question, gold_answer(solution, where), where)


def gold_answer(solution: str, where: str) -> str:
    """What follows the last "####", without the commas that group digits: "… #### 1,080" gives "1080"."""
    _, mark, gold = solution.rpartition(GOLD_MARK)
    gold = re.sub(r"(?<=\d),(?=\d)", "", gold.strip())
    if not mark or not gold:
        fault = f"nothing follows {GOLD_MARK!r}" if mark else f"the answer has no {GOLD_MARK!r} before its gold"
        cure = "mend the line, or use --data-format jsonl to take the answer as it stands"
        raise RecordError(where, "no answer", f"{fault}; {cure}")
    return gold


def gsm8k_rationale(where: str, record: dict) -> str:
    """The worked solution, which is what stands before the last "####", without blanks at its ends.

    The calculator's annotations, <<48/2=24>>, stay: they are part of the solutions as published. RecordError: no
    solution.
    """
    solution, _, _ = text_field(record, "answer", where).rpartition(GOLD_MARK)
    if not solution.strip():
        raise RecordError(where, "no rationale", f"no worked solution stands before {GOLD_MARK!r}; write one")
    return solution.strip()


def is_gsm8k(record: dict) -> bool:
    """Whether a parsed line has GSM8K's form."""
    answer = record.get("answer")
    return "question" in record and isinstance(answer, str) and GOLD_MARK in answer
