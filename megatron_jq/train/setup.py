"""F4: everything that must be right before the first step: tokenizer and data. Ranks fail together."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_jq.architecture import Architecture
from megatron_jq.architecture_files import has_weights
from megatron_jq.checkpoint.contents import TOKENIZER_FILES
from megatron_jq.config import Config, DataConfig
from megatron_jq.config_validate import resolve_architecture
from megatron_jq.corpus.reading import Corpus, CorpusOptions, open_corpus
from megatron_jq.data.dataset import train_tokenizer
from megatron_jq.data.prepared import is_prepared
from megatron_jq.data.prompts import EncodedExamples, OverlongReport, fingerprint, longest_bridge, select_fitting
from megatron_jq.data.rationale_markers import ANY_MARKERS
from megatron_jq.data.reading import Encoded, Reading, encode_reading, heldout_source, read_source
from megatron_jq.data.round_trips import describe_changed
from megatron_jq.data.show import described
from megatron_jq.data.tokenizer_choice import HUGGING_FACE, SENTENCEPIECE, kind_of, marker_choice, tokenizer_in
from megatron_jq.data.tokenizers import Tokenizer, load_tokenizer
from megatron_jq.errors import UserError
from megatron_jq.files import sync
from megatron_jq.formats.pair import Pair
from megatron_jq.formats.sources import is_builtin, is_reasoning_gym
from megatron_jq.parallel.runtime import Runtime, on_all_ranks, on_main_rank
from megatron_jq.records import Example
from megatron_jq.train.run_directory import writing


@dataclass(frozen=True)
class DataSets:
    """Tokenised examples. answer_budget: tokens a sampled answer may take, its terminator included. heldout_format: the
    held-out data's, as it was found; the training data's where there is none.
    """

    tokenizer: Tokenizer
    train: Sequence[Example]
    heldout: Sequence[Example]
    dropped: int
    answer_budget: int
    tokenizer_path: Path
    heldout_format: str
    train_where: tuple[str, ...] = ()  # "file:line" of each training example
    heldout_total: int = 0  # good examples of the held-out source, of which --eval-examples takes the first ones
    corpus: Corpus | None = None  # of pretraining, whose rows stand above

    @property
    def fingerprint(self) -> str:
        """Of the training examples, in order: a resumed run must find the same."""
        return fingerprint(self.train) if self.corpus is None else self.corpus.fingerprint


def prepare_data(
    config: Config,
    architecture: Architecture,
    runtime: Runtime | None,
    run_dir: Path,
    *,
    carried: Path | None = None,
) -> DataSets:
    """Read both sources, train the tokenizer on first use (rank 0, into the run directory), tokenise.

    carried: the tokenizer folder of the checkpoint that the run begins from, used where --tokenizer-model names none.
    A prepared set brings its own tokenizer. Pretraining reads --data-path instead of both.
    """
    d = config.data
    if config.objective.row.pretrains:
        assert runtime is not None, "--show-example refuses pretraining"
        return _prepare_corpus(config, architecture, runtime, run_dir, carried)
    count = d.train_examples if is_builtin(d.train_data) else None
    train = _read(config, runtime, d.train_data, "train", "--train-data", count)
    heldout, source = None, heldout_source(config)
    if source is not None:
        heldout = _read(config, runtime, source, "heldout", "--eval-data", d.eval_examples)
    if d.tokenizer_model is not None:
        kind, path = kind_of(d.tokenizer_type, d.tokenizer_model)
    elif train.prepared is not None:
        kind, path = train.prepared.tokenizer_type, train.prepared.tokenizer_path
        on_all_ranks(runtime, lambda: _check_carried(config, train, carried))
    else:
        assert train.source is not None, "data that is not prepared has a source"
        kind, path = _run_tokenizer(config, runtime, train.source.pairs, run_dir, carried)
    choice = on_all_ranks(runtime, lambda: marker_choice(config, d.train_data))
    tokenizer = on_all_ranks(runtime, lambda: load_tokenizer(kind, path, choice))
    sources = [train] if heldout is None else [train, heldout]
    encoded = on_all_ranks(runtime, lambda: [encode_reading(config, reading, tokenizer) for reading in sources])
    if runtime is None or runtime.is_main:
        for reading, encoding in zip(sources, encoded, strict=True):
            changed = describe_changed(encoding.placed, tokenizer)
            for remark in (*encoding.remarks, *([changed] if changed else [])):
                print(f"warning: {reading.label}: {remark}", flush=True)
    data, overlong = on_all_ranks(runtime, lambda: _fitted(config, architecture, tokenizer, path, encoded))
    if runtime is None or runtime.is_main:
        for reading, report in zip(sources, overlong, strict=True):
            if report.count:
                print(f"warning: {reading.label}: {report}", flush=True)
    return data


def _read(
    config: Config, runtime: Runtime | None, source: str, split: str, flag: str, count: int | None
) -> Reading:
    """What read_source gives, on every rank. Another package's items, slow in some sets, are made once, on rank 0."""
    on_ranks = on_main_rank if is_reasoning_gym(source) else on_all_ranks
    return on_ranks(runtime, lambda: read_source(config, source, split, flag, count=count))


def _prepare_corpus(
    config: Config, architecture: Architecture, runtime: Runtime, run_dir: Path, carried: Path | None
) -> DataSets:
    """The rows of --data-path that the run trains on and is evaluated on. UserError: bad input, on every rank."""
    d = config.data
    for flag, is_given in (
        ("--train-data", d.train_data != DataConfig().train_data),
        ("--eval-data", d.eval_data is not None),
    ):
        if is_given:
            raise UserError(
                f"{flag} is not read by --estimator {config.objective.estimator}: leave it out; --data-path and "
                "--split say what is trained and validated on"
            )
    if d.tokenizer_model is not None:
        kind, path = kind_of(d.tokenizer_type, d.tokenizer_model)
    else:
        kind, path = _run_tokenizer(config, runtime, None, run_dir, carried)
    tokenizer = on_all_ranks(runtime, lambda: load_tokenizer(kind, path, ANY_MARKERS))
    on_all_ranks(runtime, lambda: _check_vocabulary(architecture, tokenizer))
    assert d.data_path is not None, "validated: pretraining needs --data-path"
    options = CorpusOptions(
        data_path=d.data_path,
        split=d.split,
        seq_length=d.seq_length or architecture.max_position_embeddings,
        cache=Path(d.data_cache_path or run_dir / "data_cache"),
        seed=config.training.seed,
        train_rows=config.training.train_iters * config.rollout.prompts_per_step,
        heldout_rows=d.eval_examples,
    )
    corpus = open_corpus(options, tokenizer, architecture.vocab_size or tokenizer.vocab_size, runtime)
    if config.training.eval_interval > 0 and not corpus.heldout:
        raise UserError(
            f"--eval-interval: --split {d.split} leaves no row of {options.seq_length + 1} tokens of --data-path to "
            "validate on; give validation a larger share, or leave --eval-interval out"
        )
    return DataSets(tokenizer, corpus.train, corpus.heldout, 0, 1, path, "corpus", (), corpus.heldout_total, corpus)


def show_example(config: Config) -> int:
    """Print --show-example's training example as the model sees it: one process, nothing built, nothing kept.

    Returns the exit code. UserError: bad input, or no such example.
    """
    if config.objective.row.pretrains:
        raise UserError("--show-example shows prompts and answers; rows of pretraining have neither")
    number, architecture = config.data.show_example, resolve_architecture(config)
    assert number is not None
    has_tokenizer = config.data.tokenizer_model is not None or is_prepared(config.data.train_data)
    if config.checkpoint.load is not None and not has_tokenizer:
        raise UserError("--show-example does not open checkpoints; name the tokenizer with --tokenizer-model")
    carried = Path(config.model.model) if has_weights(config.model.model) else None
    if carried is not None and not has_tokenizer and tokenizer_in(carried) is not None:
        # Read where it lies: an error names the user's folder, not the copy that a run would make.
        config = replace(config, data=replace(config.data, tokenizer_model=str(carried)))
    with tempfile.TemporaryDirectory() as scratch:
        data = prepare_data(config, architecture, None, Path(scratch), carried=carried)
    if number >= len(data.train):
        raise UserError(f"--show-example {number}: there are {len(data.train)} training examples, counted from 0")
    if os.environ.get("RANK", "0") == "0":
        text = described(
            data.train[number],
            data.train_where[number],
            data.tokenizer,
            rationale_budget=config.rollout.rationale_budget,
            answer_budget=data.answer_budget,
            row=config.objective.row,
        )
        print(f"training example {number} of {len(data.train)}, {text}")
    return 0


def _check_carried(config: Config, train: Reading, carried: Path | None) -> None:
    """A checkpoint's weights belong to its tokenizer: a prepared set's must be the same."""
    if carried is None or not carried.is_dir():
        return
    carried_tokenizer, choice = tokenizer_in(carried), marker_choice(config, config.data.train_data)
    assert train.prepared is not None
    if carried_tokenizer is None:
        return
    if load_tokenizer(*carried_tokenizer, choice).fingerprint() != train.prepared.tokenizer:
        raise UserError(f"{train.label} was prepared with another tokenizer than the checkpoint's, {carried}")


def _run_tokenizer(
    config: Config, runtime: Runtime | None, pairs: Sequence[Pair] | None, run_dir: Path, carried: Path | None
) -> tuple[str, Path]:
    """(kind, path) of the run directory's tokenizer, alike on every rank; rank 0 puts it there.

    It is there already where the run is resumed, else it is the checkpoint's, else new. pairs None: there is no text to
    train a new one on.
    """
    kind = on_main_rank(runtime, lambda: _place_tokenizer(config, pairs, run_dir, carried))
    return kind, run_dir / ("tokenizer.model" if kind == SENTENCEPIECE else "tokenizer")


def _place_tokenizer(config: Config, pairs: Sequence[Pair] | None, run_dir: Path, carried: Path | None) -> str:
    model, folder = run_dir / "tokenizer.model", run_dir / "tokenizer"
    if config.checkpoint.resume and (run_dir / "config.toml").exists():
        if model.exists():
            return SENTENCEPIECE
        if (folder / "tokenizer.json").exists():
            return HUGGING_FACE
    carried_tokenizer = None if carried is None else tokenizer_in(carried)
    if carried_tokenizer is None and carried is not None and carried.is_dir():
        raise UserError(f"{carried} holds no tokenizer (tokenizer.json, tokenizer.model); give --tokenizer-model")
    if carried_tokenizer is None:
        if pairs is None:
            raise UserError("--load: the checkpoint brings no tokenizer; name it with --tokenizer-model")
        train_tokenizer(config.data.train_data, pairs, model, vocab_size=config.data.tokenizer_vocab_size)
        return SENTENCEPIECE
    kind, source = carried_tokenizer
    with writing("--run-dir", model if kind == SENTENCEPIECE else folder):
        if kind == SENTENCEPIECE:
            _copy(source, model)
        else:
            folder.mkdir(exist_ok=True)
            # tokenizer.json last: where it lies, the others do.
            for name in sorted(TOKENIZER_FILES, key="tokenizer.json".__eq__):
                if (source / name).is_file():
                    _copy(source / name, folder / name)
    return kind


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(f".{target.name}")
    shutil.copyfile(source, partial)
    sync(partial)
    os.replace(partial, target)


def _check_vocabulary(architecture: Architecture, tokenizer: Tokenizer) -> None:
    if architecture.vocab_size is not None and tokenizer.vocab_size > architecture.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, more than the vocabulary of --model, "
            f"{architecture.vocab_size}; give the model's own with --tokenizer-model, or its model with --model"
        )


def _fitted(
    config: Config, architecture: Architecture, tokenizer: Tokenizer, tokenizer_path: Path, encoded: list[Encoded]
) -> tuple[DataSets, list[OverlongReport]]:
    """The examples that the context holds, and a report for each source. encoded: of the training data, and of the
    held-out data if there is any.
    """
    d, r = config.data, config.rollout
    _check_vocabulary(architecture, tokenizer)
    # A micro-batch holds at least one whole sequence.
    context = architecture.max_position_embeddings
    context = min(context, config.training.max_tokens_per_micro_batch or context)
    answer_budget = r.answer_budget or max(
        len(placed.example.answer_ids) for encoding in encoded for placed in encoding.placed
    )
    # Prompt, rationale, a forced close token, the template's bridge and the answer share the context.
    bridge = max(longest_bridge(encoding.placed) for encoding in encoded)
    room = context - r.rationale_budget - 1 - bridge - answer_budget
    if room < 1:
        raise UserError(
            f"--rationale-budget {r.rationale_budget} and {answer_budget} answer tokens leave no room for a prompt "
            f"in {context} tokens (context, or --max-tokens-per-micro-batch); lower --rationale-budget or "
            "--answer-budget, or raise --max-position-embeddings or --max-tokens-per-micro-batch"
        )

    def fit(encoding: Encoded) -> EncodedExamples:
        imitated = config.objective.row.reads_rationales and encoding is encoded[0]
        return select_fitting(
            encoding.placed,
            max_prompt_tokens=min(room, d.max_prompt_tokens or room),
            answer_budget=answer_budget,
            rationale_budget=r.rationale_budget if imitated else None,
            overlong=d.overlong_prompts,
        )

    train, *heldout = fitted = [fit(encoding) for encoding in encoded]
    overlong = [encoding.overlong for encoding in fitted]
    data = DataSets(
        tokenizer,
        train.examples,
        heldout[0].examples if heldout else (),
        sum(report.count for report in overlong),
        answer_budget,
        tokenizer_path,
        encoded[-1].data_format,
        train.places,
        encoded[1].total if heldout else 0,
    )
    return data, overlong
