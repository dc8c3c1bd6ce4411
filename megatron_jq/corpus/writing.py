"""F3: documents into Megatron's .bin and .idx files. They appear whole, the index last, or not at all."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, get_bin_path, get_idx_path

from megatron_jq.data.documents import Document
from megatron_jq.errors import UserError
from megatron_jq.files import sync


@dataclass(frozen=True)
class Written:
    """One field's files. empty: documents without text, which were left out."""

    prefix: str
    documents: int
    tokens: int
    empty: int


@dataclass(frozen=True)
class Progress:
    """Up to now: records, tokens of all fields, characters, seconds."""

    records: int
    tokens: int
    characters: int
    seconds: float

    def __str__(self) -> str:
        rate = 1.0 / max(self.seconds, 1e-9)
        return (
            f"{self.records} documents, {self.tokens} tokens in {self.seconds:.1f} s: {self.records * rate:.0f} "
            f"documents/s, {self.tokens * rate:.0f} tokens/s, {self.characters * rate / 1e6:.2f} million characters/s"
        )


def prefixes_of(output_prefix: str, fields: Sequence[str]) -> list[str]:
    """The files' names as Megatron-LM gives them. UserError: one of the files is there."""
    prefixes = [f"{output_prefix}_{field}_document" for field in fields]
    for path in (make(prefix) for prefix in prefixes for make in (get_bin_path, get_idx_path)):
        if os.path.exists(path):
            raise UserError(f"--output-prefix {output_prefix}: {path} exists; name another, or remove it")
    return prefixes


def write_documents(
    documents: Iterator[Document],
    prefixes: Sequence[str],
    vocab_size: int,
    *,
    log_interval: int,
    say: Callable[[Progress], None],
) -> tuple[list[Written], Progress]:
    """Write every document, `prefixes` one a field. say: called every log_interval records.

    UserError: a folder that cannot be written, or no text at all.
    """
    began, records, tokens, characters = time.monotonic(), 0, 0, 0
    counts, empty = [[] for _ in prefixes], [0] * len(prefixes)

    def so_far() -> Progress:
        return Progress(records, tokens, characters, time.monotonic() - began)

    with _made_whole(prefixes) as partial:
        dtype = DType.optimal_dtype(vocab_size)
        builders = [IndexedDatasetBuilder(get_bin_path(prefix), dtype=dtype) for prefix in partial]
        for document in documents:
            for field, (builder, ids) in enumerate(zip(builders, document.ids, strict=True)):
                if len(ids):
                    builder.add_document(ids, [len(ids)])
                    counts[field].append(len(ids))
                empty[field] += not len(ids)
                tokens += len(ids)
            records, characters = records + 1, characters + document.characters
            if records % log_interval == 0:
                say(so_far())
        for prefix, count in zip(prefixes, counts, strict=True):
            if not count:
                raise UserError(f"--input has no text for {prefix}; name the field with --json-keys")
        for builder, prefix in zip(builders, partial, strict=True):
            builder.finalize(get_idx_path(prefix))
    files = zip(prefixes, counts, empty, strict=True)
    return [Written(prefix, len(count), sum(count), none) for prefix, count, none in files], so_far()


@contextlib.contextmanager
def _made_whole(prefixes: Sequence[str]) -> Iterator[list[str]]:
    """Prefixes to write at, whose files move to `prefixes` once all are on disk, and go away if something fails."""
    folder = Path(prefixes[0]).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".preprocess.") as scratch:
            partial = [str(Path(scratch) / Path(prefix).name) for prefix in prefixes]
            yield partial
            for path_of in (get_bin_path, get_idx_path):  # who sees an index finds its tokens
                for source, target in zip(partial, prefixes, strict=True):
                    sync(Path(path_of(source)))
                    os.replace(path_of(source), path_of(target))
            sync(folder)
    except OSError as error:
        raise UserError(
            f"--output-prefix: {folder} cannot be written: {error.strerror}; name another folder"
        ) from error
