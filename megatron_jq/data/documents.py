"""F2: text records as token ids, a document each, in the file's order, by several processes."""

import collections
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy

from megatron_jq.data.bad_records import BadRecords
from megatron_jq.data.jsonl import read_records
from megatron_jq.data.rationale_markers import ANY_MARKERS
from megatron_jq.data.tokenizers import Tokenizer, load_tokenizer
from megatron_jq.errors import UserError
from megatron_jq.formats.fields import as_text, text_field
from megatron_jq.formats.record_error import RecordError

FLAG = "--input"
_DOCUMENTS_A_TASK = 64
_TASKS_A_WORKER = 4  # that wait: what was read ahead is held in memory


@dataclass(frozen=True)
class Text:
    """One record's texts, by field. place: "path:line"."""

    place: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """One record's token ids, by field; an empty text has none. characters: of its texts."""

    ids: tuple[numpy.ndarray, ...]
    characters: int


def read_texts(path: str | Path, fields: Sequence[str], bad: BadRecords) -> Iterator[Text]:
    """The records' texts. A text may be empty. Faults go to `bad`; the first one is raised where it says "error"."""
    for record in read_records(path, flag=FLAG):
        try:
            if isinstance(record, RecordError):
                raise record
            yield _text_of(*record, fields)
        except RecordError as error:
            _note(bad, error)


def encode_texts(
    texts: Iterator[Text], tokenizer: tuple[str, str], *, append_eod: bool, workers: int, bad: BadRecords
) -> Iterator[Document]:
    """The documents in order. tokenizer: kind and path, to be loaded in every worker; one worker is this process.

    UserError: a tokenizer that cannot be loaded, or a worker that was ended from outside.
    """
    tasks = iter(lambda: list(itertools.islice(texts, _DOCUMENTS_A_TASK)), [])
    if workers == 1:
        encoder = load_tokenizer(*tokenizer, ANY_MARKERS)
        done = ([_encoded(encoder, text, append_eod) for text in task] for task in tasks)
    else:
        done = _in_workers(tasks, tokenizer, append_eod, workers)
    for item in itertools.chain.from_iterable(done):
        if isinstance(item, Document):
            yield item
        else:
            _note(bad, RecordError(*item))


def _in_workers(tasks: Iterator[list[Text]], tokenizer: tuple[str, str], append_eod: bool, workers: int):
    load_tokenizer(*tokenizer, ANY_MARKERS)  # what is wrong with it is said once, and by this process
    waiting: collections.deque[Future] = collections.deque()
    with ProcessPoolExecutor(workers, initializer=_begin, initargs=(*tokenizer, append_eod)) as pool:
        for task in tasks:
            waiting.append(pool.submit(_encode_task, task))
            if len(waiting) >= _TASKS_A_WORKER * workers:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())


def _result(future: Future):
    from concurrent.futures.process import BrokenProcessPool

    try:
        return future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "--workers: a process was ended from outside, for want of memory perhaps; give fewer"
        ) from error


_worker: tuple[Tokenizer, bool] | None = None


def _begin(kind: str, path: str, append_eod: bool) -> None:
    global _worker
    _worker = load_tokenizer(kind, path, ANY_MARKERS), append_eod


def _encode_task(task: list[Text]) -> list[Document | tuple[str, str, str]]:
    tokenizer, append_eod = _worker
    return [_encoded(tokenizer, text, append_eod) for text in task]


def _encoded(tokenizer: Tokenizer, text: Text, append_eod: bool) -> Document | tuple[str, str, str]:
    """Return the document, or an error's place, kind and detail."""
    end = [tokenizer.eos_id] if append_eod else []
    try:
        ids = tuple(numpy.array([*tokenizer.encode(t), *end] if t.strip() else [], numpy.int64) for t in text.texts)
    except UserError as error:
        return text.place, "not in the tokenizer", str(error)
    return Document(ids, sum(map(len, text.texts)))


def _text_of(place: str, record: dict, fields: Sequence[str]) -> Text:
    texts = []
    for field in fields:
        if isinstance(record.get(field), str):
            texts.append(as_text(record[field], f"field {field!r}", place, kind=f"no {field}", empty_allowed=True))
        else:
            texts.append(text_field(record, field, place, "--json-keys"))
    return Text(place, tuple(texts))


def _note(bad: BadRecords, error: RecordError) -> None:
    if bad.policy == "error":  # a corpus is long: it is not read to its end first
        raise UserError(f"{error} (--bad-records drop leaves such records out)")
    bad.errors.append(error)
