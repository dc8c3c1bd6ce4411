"""F1: the table of data formats. A format is one row here; --data-format, recognition, ids, rationales, answer rules,
templates and the table in docs/data.md derive from it. docs/extending.md adds one step by step.
"""

from dataclasses import replace
from typing import Literal

from megatron_jq.errors import UserError
from megatron_jq.formats import finqa, gsm8k, hotpotqa, messages, musique, named_fields, verl
from megatron_jq.formats.options import ReadOptions
from megatron_jq.formats.row import DataFormat
from megatron_jq.toml_files import did_you_mean

_ROWS = (
    DataFormat(
        name="finqa",
        recognise=finqa.is_finqa,
        pair=finqa.finqa_pair,
        settings=("finqa_answer",),
        ids=("id",),
        rationale=None,
        rule="number",
        ratios=True,
        published=None,
        template="finqa",
        pieces=("pre_text", "table", "post_text", "context", "question"),
        sample=finqa.SAMPLE,
        reads="`pre_text`, `table`, `post_text`, `qa`",
        prompt=r"text, table (one row per line, cells separated by ` \| `), text, question",
        gold="`exe_ans`, or `answer` with `--finqa-answer answer`, as the file writes it; the hub's rows have no "
        "`exe_ans`: `--finqa-answer final_result`",
    ),
    DataFormat(
        name="hotpotqa",
        recognise=hotpotqa.is_hotpotqa,
        pair=hotpotqa.hotpotqa_pair,
        settings=(),
        ids=("_id", "id"),
        rationale=None,
        rule="squad",
        ratios=False,
        published="hotpotqa",
        template="hotpotqa",
        pieces=("context", "question"),
        sample=hotpotqa.SAMPLE,
        reads="`context`, `question`, `answer`",
        prompt="`Title: text` of each paragraph, question",
        gold="`answer`",
    ),
    DataFormat(
        name="musique",
        recognise=musique.is_musique,
        pair=musique.musique_pair,
        settings=(),
        ids=("id",),
        rationale=None,
        rule="squad",
        ratios=False,
        published="musique",
        template="musique",
        pieces=("context", "question"),
        sample=musique.SAMPLE,
        reads="`paragraphs`, `question`, `answer`, `answer_aliases`",
        prompt="`Title: text` of each paragraph, question",
        gold="`answer`; the aliases count as right too",
    ),
    DataFormat(
        name="gsm8k",
        recognise=gsm8k.is_gsm8k,
        pair=gsm8k.gsm8k_pair,
        settings=(),
        ids=(),
        rationale=gsm8k.gsm8k_rationale,
        rule="number",
        ratios=False,
        published=None,
        template="gsm8k",
        pieces=(),
        sample=gsm8k.SAMPLE,
        reads="`question`, `answer`",
        prompt="question",
        gold="the line after the last `####`, without commas that group digits",
    ),
    DataFormat(
        name="jsonl",
        recognise=named_fields.has_named_fields,
        pair=named_fields.named_pair,
        settings=("prompt_field", "answer_field"),
        ids=(),
        rationale=None,
        rule="none",
        ratios=False,
        published=None,
        template="jsonl",
        pieces=(),
        sample=named_fields.SAMPLE,
        reads="the fields of `--prompt-field` and `--answer-field`",
        prompt="the field",
        gold="the field of `--answer-field`; of a list the first, the others count as right too",
    ),
    DataFormat(
        name="messages",
        recognise=messages.is_messages,
        pair=messages.messages_pair,
        settings=("prompt_field", "answer_field"),
        ids=(),
        rationale=None,
        rule="none",
        ratios=False,
        published=None,
        template="messages",
        pieces=("system", "user"),
        sample=messages.SAMPLE,
        reads="[lists of messages](#chat-files)",
        prompt="system message and user's message",
        gold="the assistant's turn, or the field of `--answer-field`",
    ),
    DataFormat(
        name="verl",
        recognise=verl.is_verl,
        pair=verl.verl_pair,
        settings=("prompt_field",),
        ids=(),
        rationale=None,
        rule="none",
        ratios=False,
        published=None,
        template="verl",
        pieces=("system", "user"),
        sample=verl.SAMPLE,
        reads="[lists of messages](#chat-files), `reward_model`",
        prompt="system message and user's message",
        gold="`reward_model.ground_truth`",
    ),
)


def by_name(rows: tuple[DataFormat, ...]) -> dict[str, DataFormat]:
    """The rows by their names. ValueError: two of one name."""
    table = {row.name: row for row in rows}
    if len(table) != len(rows):
        raise ValueError(f"two data formats have one name, of {[row.name for row in rows]}")
    return table


#: Name → row.
FORMATS = by_name(_ROWS)
#: Formats of sources that make their examples (sources.py) → how answers are compared.
MADE: dict[str, Literal["none", "number"]] = {
    "builtin": "none",
    "reasoning-gym": "none",
    "reasoning-gym-numbers": "number",
}


def format_named(name: str) -> DataFormat:
    """The row of a source's format; what makes its examples gives prompts and answers as "jsonl". UserError: an unknown
    name.
    """
    if name in MADE:
        return replace(FORMATS["jsonl"], rule=MADE[name])
    if name not in FORMATS:
        hint = did_you_mean(name, FORMATS, f"it is one of auto, {', '.join(FORMATS)}")
        raise UserError(f"--data-format {name} is not known; {hint}")
    return FORMATS[name]


def recognise(place: str, record: dict, options: ReadOptions) -> DataFormat:
    """The format that "auto" means for a record. A prompt field that the options name goes before the forms of
    published sets; a record of no form is read by --prompt-field and --answer-field, whose errors name what it lacks.

    UserError: a record of several forms.
    """
    forms = [row for row in FORMATS.values() if row.recognise(record, options)]
    forms = [row for row in forms if "prompt_field" in row.settings] or forms
    if len(forms) > 1:
        names = " and of ".join(row.name for row in forms)
        choices = "; ".join(f"--data-format {row.name} takes {row.gold.replace('`', '')}" for row in forms)
        raise UserError(f"{place}: the record has the form of {names}, which take different gold answers: {choices}")
    return forms[0] if forms else FORMATS["jsonl"]


def formats_reading(setting: str) -> tuple[str, ...]:
    """Values of --data-format under which a setting of ReadOptions is read, "auto" among them."""
    return ("auto", *(row.name for row in FORMATS.values() if setting in row.settings))


