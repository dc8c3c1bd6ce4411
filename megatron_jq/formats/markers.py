"""F1: texts that spell `<think>` or `</think>`, as files of sampled rationales do.

The model's own rationale stands between two tokens, and data that spells them out is tokenised as ordinary characters
(data/prompts.py): a rationale that brings them would be trained with a second, spelled pair inside the real one.
"""

from megatron_jq.formats.record_error import RecordError

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
MARKERS = (THINK_OPEN, THINK_CLOSE)
KIND = "<think> in the text"


def bare_rationale(text: str, what: str, place: str) -> str:
    """A given rationale without blanks at its ends, and without the one pair of markers around all of it; a close
    marker at its end is enough, for chat templates open the rationale themselves.

    RecordError: markers elsewhere, or nothing left.
    """
    bare = text.strip()
    if bare.endswith(THINK_CLOSE):
        bare = bare.removesuffix(THINK_CLOSE).removeprefix(THINK_OPEN).strip()
    if spells_markers(bare):
        fix = f"give the rationale alone, with one {THINK_OPEN} … {THINK_CLOSE} around all of it or none"
        raise RecordError(place, KIND, f"{what} spells {_first_marker(bare)}; {fix}")
    if not bare:
        raise RecordError(place, "no rationale", f"{what} is empty; fill it or remove the record")
    return bare


def split_completion(text: str, what: str, place: str) -> tuple[str | None, str]:
    """A model's whole turn as (rationale, answer): "<think>…</think> answer", or an answer alone with None.

    RecordError: another number or order of markers, an empty rationale or answer.
    """
    if not spells_markers(text):
        return None, text
    rationale, _, answer = text.partition(THINK_CLOSE)
    if THINK_CLOSE not in text or spells_markers(answer) or not answer.strip():
        form = f"{THINK_OPEN} rationale {THINK_CLOSE} answer, each marker once"
        raise RecordError(place, KIND, f"{what} spells {_first_marker(text)} and is not of the form {form}")
    return bare_rationale(rationale + THINK_CLOSE, f"the rationale in {what}", place), answer.strip()


def refuse_markers(text: str, what: str, fix: str, place: str) -> None:
    """RecordError where a text that becomes a gold answer spells a marker."""
    if spells_markers(text):
        raise RecordError(place, KIND, f"{what} spells {_first_marker(text)}; {fix}")


def spells_markers(text: str) -> bool:
    return any(marker in text for marker in MARKERS)


def _first_marker(text: str) -> str:
    return min((marker for marker in MARKERS if marker in text), key=text.index)
