"""F4: everything that must be right before the first step: run directory, tokenizer, data. Ranks fail together."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_jq.architecture import Architecture
from megatron_jq.config import Config, to_toml
from megatron_jq.data.dataset import is_builtin, load_pairs, train_tokenizer
from megatron_jq.data.pair import Pair
from megatron_jq.data.prompts import EncodedExamples, encode_examples
from megatron_jq.data.tokenizers import Tokenizer, load_tokenizer
from megatron_jq.errors import UserError
from megatron_jq.parallel.runtime import Runtime, agree
from megatron_jq.records import Example

T = TypeVar("T")


@dataclass(frozen=True)
class DataSets:
    """Tokenised examples. answer_budget: tokens a sampled answer may take, its terminator included."""

    tokenizer: Tokenizer
    train: tuple[Example, ...]
    heldout: tuple[Example, ...]
    dropped: int
    answer_budget: int
    tokenizer_path: Path

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the training examples' token ids, in order: a run that is taken up again must find the same."""
        digest = hashlib.sha256()
        for example in self.train:
            for ids in (example.prompt_ids, example.answer_ids):
                digest.update(len(ids).to_bytes(8, "little") + array("q", ids).tobytes())
        return digest.hexdigest()


def together(runtime: Runtime, work: Callable[[], T], *, main_only: bool = False) -> T | None:
    """Do `work` on every rank (or rank 0 alone), and raise a rank's UserError on all of them."""
    result, error = None, None
    if runtime.is_main or not main_only:
        try:
            result = work()
        except UserError as fault:
            error = str(fault)
    agree(runtime, error)
    return result


def check_run_directory(run_dir: Path, *, resume: bool = False) -> None:
    """Make the folder and try to write there. UserError when that fails, or when the folder belongs to another run
    (resume: it may be this one's).
    """
    with _writing("--run-dir", run_dir):
        if not resume and ((run_dir / "config.toml").exists() or (run_dir / "metrics.jsonl").exists()):
            raise _taken(run_dir)
        _try_to_write(run_dir)


def check_save_folder(save: Path) -> None:
    """Make the folder of checkpoints and try to write there. UserError when that fails."""
    with _writing("--save", save):
        _try_to_write(save)


def _try_to_write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as scratch:
        scratch.write(b"x")


def claim_run_directory(run_dir: Path, config: Config, *, resume: bool = False) -> None:
    """Write config.toml, which makes the folder this run's. UserError as above, also for a run that was quicker."""
    with _writing("--run-dir", run_dir):
        if resume:
            (run_dir / ".config.toml").write_text(to_toml(config), encoding="utf-8")
            os.replace(run_dir / ".config.toml", run_dir / "config.toml")
            return
        try:
            with open(run_dir / "config.toml", "x", encoding="utf-8") as file:
                file.write(to_toml(config))
        except FileExistsError as fault:
            raise _taken(run_dir) from fault


@contextlib.contextmanager
def _writing(flag: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as fault:
        raise UserError(f"{flag} {folder} cannot be written: {fault.strerror}; name a folder that can") from fault


def _taken(run_dir: Path) -> UserError:
    return UserError(
        f"--run-dir {run_dir} holds another run; give --resume to go on with it, name a new folder, or remove that one"
    )


def prepare_data(
    config: Config, architecture: Architecture, runtime: Runtime, run_dir: Path, *, carried: Path | None = None
) -> DataSets:
    """Read both sources, train the tokenizer on first use (rank 0, into the run directory), tokenise.

    carried: the tokenizer folder of the checkpoint that the run begins from, used where --tokenizer-model names none.
    """
    d = config.data
    pairs = together(runtime, lambda: _read(config, d.train_data, d.train_examples, "train", "--train-data"))
    heldout_pairs: list[Pair] = []
    # A built-in task brings a held-out split of its own.
    eval_source = d.eval_data or (d.train_data if is_builtin(d.train_data) else None)
    if eval_source is not None:
        read = lambda: _read(config, eval_source, d.eval_examples, "heldout", "--eval-data")  # noqa: E731
        heldout_pairs = together(runtime, read)
    path = Path(d.tokenizer_model) if d.tokenizer_model else run_dir / "tokenizer.model"
    if d.tokenizer_model is None:
        together(runtime, lambda: _own_tokenizer(config, pairs, path, carried), main_only=True)
    tokenizer = together(runtime, lambda: load_tokenizer(d.tokenizer_type, path))
    return together(runtime, lambda: _tokenise(config, architecture, tokenizer, path, pairs, heldout_pairs))


def _own_tokenizer(config: Config, pairs: list[Pair], path: Path, carried: Path | None) -> None:
    """The run directory's tokenizer: there already where the run is taken up again, else the checkpoint's, else new."""
    if config.checkpoint.resume and path.exists() and (path.parent / "config.toml").exists():
        return
    if carried is not None and (carried / "tokenizer.model").is_file():
        partial = path.with_name(f".{path.name}")
        shutil.copyfile(carried / "tokenizer.model", partial)
        os.replace(partial, path)
    elif carried is not None and carried.is_dir():
        flags = f"--tokenizer-type huggingface --tokenizer-model {carried}"
        raise UserError(f"--load: the checkpoint's tokenizer is a Hugging Face one; give {flags}")
    else:
        train_tokenizer(config.data.train_data, pairs, path, vocab_size=config.data.tokenizer_vocab_size)


def _read(config: Config, source: str, count: int, split: str, flag: str) -> list[Pair]:
    d = config.data
    return load_pairs(
        source,
        prompt_field=d.prompt_field,
        answer_field=d.answer_field,
        data_format=d.data_format,
        count=count if is_builtin(source) or split == "heldout" else None,
        seed=config.training.seed,
        split=split,
        flag=flag,
    )


def _tokenise(config, architecture, tokenizer, tokenizer_path, pairs, heldout_pairs) -> DataSets:
    d, r = config.data, config.rollout
    if architecture.vocab_size is not None and tokenizer.vocab_size > architecture.vocab_size:
        raise UserError(
            f"--tokenizer-model has {tokenizer.vocab_size} pieces, more than the model's vocabulary of "
            f"{architecture.vocab_size}; use the model's own tokenizer"
        )
    # A micro-batch holds at least one whole sequence.
    context = architecture.max_position_embeddings
    context = min(context, config.training.max_tokens_per_micro_batch or context)
    longest_answer = max(len(tokenizer.encode(pair.answer)) + 1 for pair in [*pairs, *heldout_pairs])
    answer_budget = r.answer_budget or longest_answer
    # Prompt, rationale, a forced close token and the answer share the context.
    room = context - r.rationale_budget - 1 - answer_budget
    if room < 1:
        raise UserError(
            f"--rationale-budget {r.rationale_budget} and {answer_budget} answer tokens leave no room for a prompt "
            f"in {context} tokens (context, or --max-tokens-per-micro-batch); lower --rationale-budget or "
            "--answer-budget, or raise --max-position-embeddings or --max-tokens-per-micro-batch"
        )

    def encode(some: list[Pair]) -> EncodedExamples:
        return encode_examples(
            some,
            tokenizer,
            max_prompt_tokens=min(room, d.max_prompt_tokens or room),
            answer_budget=answer_budget,
            overlong=d.overlong_prompts,
        )

    train = encode(pairs)
    heldout = encode(heldout_pairs) if heldout_pairs else None
    return DataSets(
        tokenizer,
        train.examples,
        heldout.examples if heldout else (),
        train.overlong.count + (heldout.overlong.count if heldout else 0),
        answer_budget,
        tokenizer_path,
    )
