"""F1: how records are read, as the flags of the same names say it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ReadOptions:
    """How records become pairs. The names are the flags'. id_field: None takes the format's own, if it has one.
    rationales: every record must give one, in rationale_field; None takes the format's own, if it has one.
    """

    data_format: str = "auto"
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    id_field: str | None = None
    finqa_answer: str = "exe_ans"
    bad_records: str = "error"
    rationale_field: str | None = None
    rationales: bool = False
