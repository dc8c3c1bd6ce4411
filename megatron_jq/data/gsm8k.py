"""F2: GSM8K's official record, {"question", "answer"}, whose answer is a worked solution with the gold after "####".

Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems". The worked solution is not used: the rationale is
latent here.
"""

import re
from pathlib import Path

from megatron_jq.data.jsonl import read_jsonl
from megatron_jq.data.pair import Pair
from megatron_jq.errors import UserError

GOLD_MARK = "####"


def read_gsm8k(path: str | Path, *, flag: str = "--train-data") -> list[Pair]:
    """(question, gold) for every line. UserError as in read_jsonl, and for an answer without its mark or gold."""
    return [
        Pair(p.prompt, gold_answer(p.answer, p.where), p.where)
        for p in read_jsonl(path, "question", "answer", flag=flag)
    ]


def gold_answer(solution: str, where: str) -> str:
    """What follows the last "####", without the commas that group digits: "… #### 1,080" gives "1080"."""
    _, mark, gold = solution.rpartition(GOLD_MARK)
    gold = re.sub(r"(?<=\d),(?=\d)", "", gold.strip())
    if not mark or not gold:
        fault = f"nothing follows {GOLD_MARK!r}" if mark else f"the answer has no {GOLD_MARK!r} before its gold"
        raise UserError(f"{where}: {fault}; mend the line, or use --data-format jsonl to take the answer as it stands")
    return gold


def is_gsm8k(record: dict) -> bool:
    """Whether a parsed line has GSM8K's form."""
    answer = record.get("answer")
    return "question" in record and isinstance(answer, str) and GOLD_MARK in answer
