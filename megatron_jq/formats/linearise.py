"""F1: tables and titled passages as plain text."""

from megatron_jq.formats.fields import as_text
from megatron_jq.formats.record_error import RecordError

CELL_SEPARATOR = " | "
#: Between the pieces of a prompt: passages, the table, the question.
BLOCK_SEPARATOR = "\n\n"


def table_text(table: object, place: str) -> str:
    """A row a line, cells separated by " | ". RecordError: not a list of rows of text, rows of several lengths."""
    if not isinstance(table, list) or not all(isinstance(row, list) for row in table):
        raise RecordError(place, "no table", "field 'table' is not a list of rows")
    lengths = [len(row) for row in table]
    if len(set(lengths)) > 1:
        odd = next(i for i, length in enumerate(lengths) if length != lengths[0])
        detail = f"row {odd + 1} of the table has {lengths[odd]} cells and the first has {lengths[0]}; make them even"
        raise RecordError(place, "ragged table", detail)
    rows = [
        [as_text(cell, "a cell of the table", place, kind="no table", empty_allowed=True).strip() for cell in row]
        for row in table
    ]
    return "\n".join(CELL_SEPARATOR.join(row) for row in rows)


def passages_text(passages: list[tuple[str, str]], place: str) -> str:
    """A "Title: text" for each passage. RecordError: no passage has text."""
    passages = [(title, text.strip()) for title, text in passages if text.strip()]
    if not passages:
        raise RecordError(place, "empty context", "the context is empty; without it the question cannot be answered")
    return BLOCK_SEPARATOR.join(f"{title}: {text}" for title, text in passages)


def blocks(*texts: str) -> str:
    """The pieces that hold something, a blank line between them."""
    return BLOCK_SEPARATOR.join(text for text in texts if text)
