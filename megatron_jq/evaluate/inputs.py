"""F4: the inputs of an evaluation: a checkpoint's weights, settings and tokenizer, and the held-out examples."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_jq.architecture import Architecture
from megatron_jq.architecture_files import read_hugging_face_config, refuse_gguf
from megatron_jq.checkpoint.convert import architecture_of
from megatron_jq.checkpoint.folder import (
    DamagedCheckpoint,
    Manifest,
    candidates,
    none_found,
    read_manifest,
)
from megatron_jq.checkpoint.hugging_face_weights import digests, open_folder
from megatron_jq.checkpoint.huggingface import CONFIG as HF_CONFIG
from megatron_jq.checkpoint.loader import Checkpoint, find_checkpoint
from megatron_jq.config import Config, settings_of_text
from megatron_jq.data.prompts import Placed, longest_bridge, select_fitting
from megatron_jq.data.reading import Reading, encode_reading, heldout_source, number_of, read_source
from megatron_jq.data.round_trips import describe_changed
from megatron_jq.data.tokenizer_choice import kind_of, marker_choice, tokenizer_in
from megatron_jq.data.tokenizers import Tokenizer, load_tokenizer
from megatron_jq.errors import UserError
from megatron_jq.formats.sources import is_builtin
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.records import Example

#: Where neither flag nor file names them: the paper's number of samples per prompt.
_SAMPLING = {"eval_samples": 16, "eval_temperature": 1.0}


def first_settings(load: Path | None, hf: Path | None) -> tuple[Config, Architecture]:
    """Read settings and architecture from the newest readable manifest, or config.json; no weights are verified.

    UserError where there is none.
    """
    for path, flag in ((hf, "--hf"), (load, "--load")):
        if path is not None:
            refuse_gguf(path, flag)
    if hf is not None:
        default = Config()
        settings = replace(
            default, data=replace(default.data, eval_examples=0), training=replace(default.training, **_SAMPLING)
        )
        return settings, read_hugging_face_config(hf / HF_CONFIG)
    damage = []
    for folder in candidates(load):
        try:
            manifest = read_manifest(folder)
            return settings_of(Checkpoint(folder, manifest)), architecture_of(manifest)
        except DamagedCheckpoint as error:
            damage.append(str(error))
    raise none_found(load, damage, "--load")


def checkpoint_to_evaluate(load: Path | None, hf: Path | None, runtime: Runtime) -> Checkpoint:
    """Open the newest whole checkpoint in (or at) `load`, or the Hugging Face folder `hf`. All ranks.

    UserError on every rank where there is none.
    """
    if hf is not None:
        checkpoint = open_folder(hf, "--hf", runtime)
        return replace(checkpoint, manifest=replace(checkpoint.manifest, files=digests(checkpoint.weights, runtime)))
    checkpoint = find_checkpoint(load, "--load", runtime, print)
    if checkpoint is None:
        raise none_found(load, [], "--load")
    return checkpoint


def _settings_of_run(checkpoint: Checkpoint) -> Config | None:
    """Return the settings of the run that wrote the checkpoint. None where they do not determine an evaluation: a
    conversion has none, and pretraining knows neither prompts nor rationales.
    """
    if checkpoint.manifest.config is None:
        return None
    saved = settings_of_text(checkpoint.manifest.config, f"{checkpoint.folder}: its settings")
    return None if saved.objective.row.pretrains else saved


def settings_of(checkpoint: Checkpoint) -> Config:
    """Return the checkpoint's settings as far as an evaluation has them: data, budgets, sampling, seed.

    The layout is the job's, the tokenizer the checkpoint's, and the held-out data all there is. There are 16
    samples per prompt, at the run's evaluation temperature, or that of its rollouts where the run evaluated greedily.
    """
    manifest, default = checkpoint.manifest, Config()
    saved = _settings_of_run(checkpoint) or default
    t = saved.training
    return replace(
        default,
        model=replace(default.model, bf16=manifest.bf16),
        objective=saved.objective,
        rollout=saved.rollout,
        data=replace(
            saved.data,
            eval_examples=0,
            tokenizer_model=None,
            tokenizer_type="sentencepiece",
            tokenizer_vocab_size=None,
        ),
        training=replace(
            default.training,
            seed=t.seed,
            eval_samples=_SAMPLING["eval_samples"],
            eval_temperature=t.eval_temperature or saved.rollout.temperature,
            eval_top_p=t.eval_top_p,
            match=t.match,
            match_rule=t.match_rule,
            answer_extract=t.answer_extract,
            max_tokens_per_micro_batch=t.max_tokens_per_micro_batch,
        ),
    )


def reward_note(config: Config, checkpoint: Checkpoint) -> str | None:
    """Return a note where the run had a reward of the user's and the evaluation has none: code that a checkpoint names
    is not run by itself.
    """
    saved = _settings_of_run(checkpoint)
    if saved is None or saved.training.reward is None or config.training.reward is not None:
        return None
    name = saved.training.reward
    return f"note: the run was trained with --reward {name}, which is not run here; for its values give it again"


def digest_of(manifest: Manifest) -> str:
    """Return a digest of the checkpoint's tensor files."""
    kinds = (".distcp", ".safetensors")
    files = {name: entry["sha256"] for name, entry in manifest.files.items() if name.endswith(kinds)}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def tokenizer_of(config: Config, checkpoint: Checkpoint, architecture: Architecture) -> Tokenizer:
    """Load --tokenizer-model's tokenizer, or else the checkpoint's. UserError: missing, or too large for the model."""
    choice = marker_choice(config, _heldout_source(config, checkpoint), "--eval-data")
    if config.data.tokenizer_model is not None:
        tokenizer = load_tokenizer(*kind_of(config.data.tokenizer_type, config.data.tokenizer_model), choice)
    elif (carried := tokenizer_in(checkpoint.tokenizer)) is not None:
        tokenizer = load_tokenizer(*carried, choice)
    else:
        raise UserError(f"{checkpoint.folder} holds no tokenizer; give --tokenizer-model")
    if tokenizer.vocab_size > architecture.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, more than the model's vocabulary of "
            f"{architecture.vocab_size}; give the model's own with --tokenizer-model"
        )
    return tokenizer


@dataclass(frozen=True)
class HeldOut:
    """The examples to evaluate on. total: good examples of the source. warning: what was left out, and which golds the
    tokenizer changes; or nothing.
    """

    source: str
    data_format: str
    examples: tuple[Example, ...]
    total: int
    answer_budget: int
    warning: str


def heldout_examples(
    config: Config, checkpoint: Checkpoint, tokenizer: Tokenizer, architecture: Architecture
) -> HeldOut:
    """Read, encode and select the held-out examples. UserError: no source, or one without readable, fitting ones."""
    d, r = config.data, config.rollout
    source = _heldout_source(config, checkpoint)
    if source is None:
        raise UserError("--eval-data is missing: name the prompts and answers to evaluate on")
    count = d.eval_examples
    if is_builtin(source):  # it has no end: as many as the run's own evaluation had
        count = count or (_settings_of_run(checkpoint) or Config()).data.eval_examples
    reading = read_source(config, source, "heldout", "--eval-data", count=count)
    encoded = encode_reading(config, reading, tokenizer)
    answer_budget = r.answer_budget or max(len(placed.example.answer_ids) for placed in encoded.placed)
    context = architecture.max_position_embeddings
    room = context - r.rationale_budget - 1 - longest_bridge(encoded.placed) - answer_budget
    if room < 1:
        raise UserError(
            f"--rationale-budget {r.rationale_budget} and {answer_budget} answer tokens leave no room for a prompt in "
            f"the model's context of {context} tokens; lower --rationale-budget or --answer-budget"
        )
    fitting = select_fitting(
        encoded.placed,
        max_prompt_tokens=min(room, d.max_prompt_tokens or room),
        answer_budget=answer_budget,
        overlong=d.overlong_prompts,
    )
    changed = describe_changed(tuple(map(Placed, fitting.examples, fitting.places)), tokenizer)
    left_out = [remark for remark in (*encoded.remarks, str(fitting.overlong), changed, _first_ones(reading)) if remark]
    warning = f"warning: {reading.label}: {'; '.join(left_out)}" if left_out else ""
    return HeldOut(source, reading.data_format, fitting.examples, reading.total, answer_budget, warning)


def _heldout_source(config: Config, checkpoint: Checkpoint) -> str | None:
    # Without a run's settings the default is a task that the policy never saw.
    return config.data.eval_data if _settings_of_run(checkpoint) is None else heldout_source(config)


def _first_ones(reading: Reading) -> str:
    if reading.total == reading.taken:
        return ""
    return f"the first {number_of(reading.taken, reading.total)} examples are evaluated; --eval-examples 0 takes all"
