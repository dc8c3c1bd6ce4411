"""F4: exact match and F1 as the scripts of HotPotQA and MuSiQue define them, of a sampled text as it is.

HotPotQA: hotpot_evaluate_v1.py (Yang et al. 2018); where either text is yes, no or noanswer, F1 is exact match.
MuSiQue: metrics/answer.py (Trivedi et al. 2022); the best over the answer and its aliases; where either text has no
word, F1 is exact match. Both normalise as SQuAD's script (Rajpurkar et al. 2016): lower case, no punctuation, no
articles.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation))
_CLOSED = {"yes", "no", "noanswer"}

#: Scripts, as `published` of a data format names them.
FORMATS = ("hotpotqa", "musique")


def scores(answer: str, golds: Sequence[str], data_format: str) -> tuple[float, float]:
    """(exact match, F1) of an answer, the best over the gold answers; data_format: whose script, of FORMATS."""
    answer_words, gold_words = _words(answer), [_words(gold) for gold in golds]
    return float(answer_words in gold_words), max(_f1(answer_words, gold, data_format) for gold in gold_words)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(answer_words: list[str], gold: list[str], data_format: str) -> float:
    closed = data_format == "hotpotqa" and (" ".join(answer_words) in _CLOSED or " ".join(gold) in _CLOSED)
    if closed or not answer_words or not gold:
        return float(answer_words == gold and (bool(answer_words) or data_format == "musique"))
    shared = sum((Counter(answer_words) & Counter(gold)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(answer_words), shared / len(gold)
    return 2 * precision * recall / (precision + recall)
