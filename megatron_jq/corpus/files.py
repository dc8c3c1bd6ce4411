"""F3: pairs of .bin and .idx files: which ones a run names, and whether they are whole."""

import hashlib
import math
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, get_bin_path, get_idx_path

from megatron_jq.errors import UserError

#: Megatron's format: a magic number, a version, the code of the tokens' type, counts of sequences and documents.
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_FIRST_TOKENS = 1 << 22
_FIRST_BYTES = 1 << 20


@dataclass(frozen=True)
class IndexedFiles:
    """One whole pair of files. prefix: their path without .bin and .idx."""

    prefix: str
    num_sequences: int
    dtype: type[numpy.number]

    @cached_property
    def _dataset(self) -> IndexedDataset:
        return IndexedDataset(self.prefix)

    def tokens_between(self, start: float, end: float) -> int:
        """Tokens of the documents between two fractions of the file, rounded as Megatron-core's builder does."""
        first, last = (int(round(share * float(self.num_sequences))) for share in (start, end))
        return int(self._dataset.sequence_lengths[first:last].sum(dtype=numpy.int64))

    def largest_of_first_tokens(self) -> int:
        """The largest id among the first millions of tokens; a whole corpus would take too long."""
        return int(numpy.memmap(get_bin_path(self.prefix), dtype=self.dtype, mode="r")[:_FIRST_TOKENS].max())

    def identity(self) -> str:
        """Equal for files of equal contents, as far as the index and the start of the tokens tell."""
        data = Path(get_bin_path(self.prefix))
        digest = hashlib.sha256(Path(get_idx_path(self.prefix)).read_bytes())
        digest.update(data.stat().st_size.to_bytes(8, "little"))
        with open(data, "rb") as file:
            digest.update(file.read(_FIRST_BYTES))
        return digest.hexdigest()


def parse_data_path(text: str) -> list[tuple[str, float | None]]:
    """(prefix, weight) pairs of --data-path: "PREFIX", "PREFIX PREFIX …" without weights, or "WEIGHT PREFIX …".

    UserError: a weight for some of them alone, or one that is not above 0.
    """
    words = text.split()
    weights = [_number(word) for word in words[::2]]
    if len(words) % 2 or all(weight is None for weight in weights):
        weighted = [(word, None) for word in words]
    elif any(weight is None for weight in weights):
        raise UserError(f"--data-path {text}: write a weight before every prefix, or before none")
    else:
        weighted = list(zip(words[1::2], weights, strict=True))
    for prefix, weight in weighted:
        if weight is not None and not (math.isfinite(weight) and weight > 0):
            raise UserError(f"--data-path {text}: the weight of {prefix} must be above 0")
    if not weighted:
        raise UserError("--data-path is empty; give the prefix of .bin and .idx files")
    return weighted


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def open_files(prefix: str) -> IndexedFiles:
    """UserError: a file is missing or empty, or the pair is not whole, or not Megatron's."""
    index, data = Path(get_idx_path(prefix)), Path(get_bin_path(prefix))
    label, fix = f"--data-path {prefix}", "write the files with tools/preprocess_data.py"
    for path in (index, data):
        if not path.is_file():
            raise UserError(f"{label}: there is no {path}; {fix}, and give their path without .bin")
    try:
        with open(index, "rb") as file:
            header = file.read(_HEADER.size)
        data_size, index_size = data.stat().st_size, index.stat().st_size
    except OSError as error:
        raise UserError(f"{label}: {index}: {error.strerror}; give files that can be read") from error
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise UserError(f"{label}: {index} is not an index of Megatron's; {fix}")
    _, version, code, num_sequences, num_documents = _HEADER.unpack(header)
    if version != 1 or code not in (dtype.value for dtype in DType):
        raise UserError(f"{label}: {index} is of version {version}, type {code}, which is not known; {fix}")
    if num_sequences == 0 or data_size == 0:
        raise UserError(f"{label} holds no tokens; {fix} from files with text")
    if index_size < _HEADER.size + 12 * num_sequences + 8 * num_documents:
        raise UserError(f"{label}: {index} is cut off; {fix} again")
    files = IndexedFiles(prefix, num_sequences, DType.dtype_from_code(code))
    try:
        tokens = files.tokens_between(0.0, 1.0)
    except AssertionError as error:
        raise UserError(f"{label}: {index} is damaged: its documents are not its sequences; {fix} again") from error
    if data_size < tokens * DType.size(files.dtype):
        raise UserError(f"{label}: {data} is cut off: its index counts {tokens} tokens; {fix} again")
    return files
