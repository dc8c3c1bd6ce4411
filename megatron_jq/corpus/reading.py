"""F3: rows to pretrain on, in the order in which Megatron-LM would train on them: megatron.core.datasets makes it.

A row is seq_length + 1 tokens of the shuffled documents laid end to end: the first is context, the others are
predicted. Where documents end is not marked: the trainer knows it by the end of text (--eod-mask-loss and its like).
"""

import copy
import hashlib
import itertools
import math
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_jq.corpus.files import IndexedFiles, open_files, parse_data_path
from megatron_jq.data.tokenizers import Tokenizer
from megatron_jq.errors import UserError
from megatron_jq.files import reason, sync
from megatron_jq.parallel.megatron.versions import find_version
from megatron_jq.parallel.runtime import Runtime, on_all_ranks
from megatron_jq.records import Example
from megatron_jq.seeds import short_seed

TRAIN, VALID, TEST = range(3)


@dataclass(frozen=True)
class CorpusOptions:
    """data_path, split, seq_length: as the flags. cache: folder of the sample indices, which every rank can read.
    train_rows: what the run will read. heldout_rows: at most so many rows of the validation split; 0: all of them.
    """

    data_path: str
    split: str
    seq_length: int
    cache: Path
    seed: int
    train_rows: int
    heldout_rows: int


@dataclass(frozen=True)
class Corpus:
    """fingerprint: equal where the same rows come in the same order. heldout_total: rows of the validation split."""

    train: "Rows"
    heldout: "Rows | tuple[()]"
    fingerprint: str
    heldout_total: int


class Rows(Sequence[Example]):
    """The rows of one split as examples: a first token as prompt, an empty rationale, the others as answer."""

    def __init__(self, dataset: GPTDataset | BlendedDataset, count: int, vocab_size: int, data_path: str):
        self._dataset, self._count, self._vocab_size, self._data_path = dataset, count, vocab_size, data_path

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        """UserError: a token that the model does not have."""
        if not 0 <= index < self._count:
            raise IndexError(index)
        sample = self._dataset[index]
        ids = (*sample["tokens"].tolist(), sample["labels"][-1].item())
        if max(ids) >= self._vocab_size:
            raise _foreign_token(f"--data-path {self._data_path}", max(ids), self._vocab_size)
        return Example(index, "", "", ids[:1], ids[1:], rationale_ids=())


@dataclass(frozen=True)
class _Plan:
    """What to build. tokens: of each file, to train on. key: name of the folder of its sample indices."""

    files: tuple[IndexedFiles, ...]
    weights: tuple[float, ...]  # one a file
    config: GPTDatasetConfig
    tokens: tuple[int, ...]
    heldout_rows: int
    heldout_total: int
    key: str


class _IndexTokenizer:
    """What GPTDataset asks of a tokenizer. No id is padding: every token of a row is predicted."""

    pad = -1

    def __init__(self, tokenizer: Tokenizer):
        self.vocab_size, self.eod, self.eos = tokenizer.vocab_size, tokenizer.eos_id, tokenizer.eos_id
        self.unique_identifiers = {"fingerprint": tokenizer.fingerprint()}

    def __repr__(self) -> str:
        return f"{self.vocab_size} {self.eod} {self.unique_identifiers}"


def open_corpus(options: CorpusOptions, tokenizer: Tokenizer, vocab_size: int, runtime: Runtime) -> Corpus:
    """The rows of both splits. Called on all ranks; rank 0 writes the indices, the others read them.

    vocab_size: the model's. UserError on every rank: files that are missing or damaged, too few tokens, a token beyond
    vocab_size among the first ones of a file, a cache that cannot be written, no compiled helper.
    """
    plan = on_all_ranks(runtime, lambda: _plan(options, tokenizer, vocab_size))
    on_all_ranks(runtime, lambda: _write_indices(options, plan), main_only=True)
    keys = [plan.key]
    dist.broadcast_object_list(keys, src=0)
    built = on_all_ranks(runtime, lambda: _read_indices(options, plan, keys[0]))
    heldout = Rows(built[VALID], plan.heldout_rows, vocab_size, options.data_path) if plan.heldout_rows else ()
    train = Rows(built[TRAIN], options.train_rows, vocab_size, options.data_path)
    return Corpus(train, heldout, _fingerprint(options, plan, built[TRAIN]), plan.heldout_total)


class _Builder(BlendedMegatronDatasetBuilder):
    """Megatron-core's builder without its barriers: at those the other ranks would wait for one that failed."""

    @staticmethod
    def build_generic_dataset(cls, is_built_on_rank, synchronize_ranks, *args):
        return cls(*args)

    def _build_megatron_datasets_parallel(self, prefixes, split, sizes_per_dataset):
        each = zip(prefixes, sizes_per_dataset, strict=True)
        columns = [self._build_megatron_dataset_splits(prefix, split, sizes, False) for prefix, sizes in each]
        return [list(column) for column in zip(*columns, strict=True)]


def _built(options: CorpusOptions, plan: _Plan, folder: Path) -> list[GPTDataset | BlendedDataset | None]:
    """The three splits, with their indices in `folder`: written by rank 0 where they are not there, else read."""
    config = copy.copy(plan.config)  # not dataclasses.replace: that would derive the splits again
    config.path_to_cache = str(folder)
    return _Builder(GPTDataset, [options.train_rows, plan.heldout_rows, 0], lambda: True, config).build()


def _write_indices(options: CorpusOptions, plan: _Plan) -> None:
    """The sample indices, on disk whole or not at all: Megatron-core takes whatever has a file's name for the file.

    UserError where the cache cannot be written.
    """
    folder = options.cache / plan.key
    if folder.is_dir():
        return
    try:
        options.cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=options.cache, prefix=f".{plan.key}.") as scratch:
            partial = Path(scratch) / plan.key
            _built(options, plan, partial)
            for path in [*partial.iterdir(), partial]:
                sync(path)
            try:
                partial.rename(folder)
            except OSError:
                if not folder.is_dir():  # it is, where another run was quicker
                    raise
    except OSError as error:
        problem = f"--data-cache-path {options.cache} cannot be written: {reason(error)}"
        raise UserError(f"{problem}; name a folder that can") from error


def _read_indices(options: CorpusOptions, plan: _Plan, key: str) -> list[GPTDataset | BlendedDataset | None]:
    """UserError where this rank's files are not rank 0's, whose key is `key`, or the indices cannot be read."""
    folder = options.cache / plan.key
    if plan.key != key:
        raise UserError(
            f"--data-path {options.data_path}: the files on {socket.gethostname()} are not those that rank 0 reads; "
            "give all nodes the same"
        )
    try:
        return _built(options, plan, folder)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"--data-cache-path: the sample indices in {folder} cannot be read on {socket.gethostname()}: {error}; "
            "every node must see this folder, and if they are damaged, remove it"
        ) from error


def _plan(options: CorpusOptions, tokenizer: Tokenizer, vocab_size: int) -> _Plan:
    _check_helper()
    prefixes = parse_data_path(options.data_path)
    files = tuple(open_files(prefix) for prefix, _ in prefixes)
    for indexed in files:
        largest = indexed.largest_of_first_tokens()
        if largest >= vocab_size:
            raise _foreign_token(f"--data-path {indexed.prefix}", largest, vocab_size)
    shares = _split_shares(options.split)
    train, heldout = ([indexed.tokens_between(*shares[split]) for indexed in files] for split in (TRAIN, VALID))
    for indexed, tokens in zip(files, train, strict=True):
        if tokens < options.seq_length + 1:
            raise UserError(
                f"--data-path {indexed.prefix}: --split {options.split} leaves {tokens} tokens to train on, fewer than "
                f"a row of {options.seq_length + 1} (--seq-length, and the first one); lower it or give more text"
            )
    rows = [max(0, tokens - 1) // options.seq_length for tokens in heldout]
    available = sum(rows) if all(rows) else 0
    heldout_rows = min(options.heldout_rows or available, available)
    # Files without weights count by their tokens: so a run may read them more than once.
    weights = tuple(float(tokens) if w is None else w for (_, w), tokens in zip(prefixes, train, strict=True))
    config = GPTDatasetConfig(
        random_seed=short_seed(options.seed),
        sequence_length=options.seq_length,
        blend=([indexed.prefix for indexed in files], list(weights) if len(files) > 1 else None),
        split=options.split,
        path_to_cache=str(options.cache),
        tokenizer=_IndexTokenizer(tokenizer),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    config.split_matrix = [shares[TRAIN], shares[VALID] if heldout_rows else None, None]
    key = _key(options, files, config, heldout_rows)
    return _Plan(files, weights, config, tuple(train), heldout_rows, available, key)


def _key(options: CorpusOptions, files: tuple[IndexedFiles, ...], config: GPTDatasetConfig, heldout_rows: int) -> str:
    """Of all that the sample indices depend on: Megatron-core finds them by the files' names, whatever is in these."""
    identities = [indexed.identity() for indexed in files]
    rows = (options.train_rows, heldout_rows, options.seq_length, options.seed)
    parts = (find_version(), identities, config.blend, config.split_matrix, rows, config.tokenizer)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _split_shares(split: str) -> list[tuple[float, float]]:
    """--split's bounds as fractions of the documents: of training, validation and test. UserError: not 1-3 numbers."""
    try:
        numbers = [float(number) for number in split.split(",")]
    except ValueError:
        numbers = []
    if not (1 <= len(numbers) <= 3 and all(math.isfinite(n) and n >= 0 for n in numbers) and numbers[0] > 0):
        raise UserError(f"--split {split}: write the shares to train, validate and test on, such as 969,30,1")
    bounds = [0.0, *itertools.accumulate(parse_and_normalize_split(split))]
    return list(itertools.pairwise(bounds))


def _check_helper() -> None:
    """UserError where Megatron-core's C++ helper is not there: its wheels bring it, a build without a compiler not."""
    try:
        from megatron.core.datasets import helpers  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--estimator pretrain needs the compiled helper of megatron.core.datasets, which this installation lacks "
            f"({error}); install megatron-core from a wheel, or with a C++ compiler"
        ) from error


def _foreign_token(label: str, token: int, vocab_size: int) -> UserError:
    return UserError(
        f"{label} holds token {token}, and the model's vocabulary has {vocab_size}: it was written with another "
        "tokenizer; write it again with the one that --tokenizer-model names"
    )


def _fingerprint(options: CorpusOptions, plan: _Plan, built: GPTDataset | BlendedDataset) -> str:
    """Of what the order of the rows depends on. A longer run over files that it does not read to their end keeps its
    order; once it reads them again, Megatron-core shuffles its rounds together, and the run's length is part of it.
    """
    parts = built.datasets if isinstance(built, BlendedDataset) else [built]
    lines = [f"{options.seed} {options.seq_length} {plan.config.split_matrix[TRAIN]}"]
    for indexed, weight, tokens, part in zip(plan.files, plan.weights, plan.tokens, parts, strict=True):
        once = part.num_samples * options.seq_length + 1 <= tokens
        share = weight / math.fsum(plan.weights)
        lines.append(f"{indexed.identity()} {share!r} {'once' if once else part.num_samples}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
