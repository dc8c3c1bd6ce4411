"""F1: which command reads which setting, given the others. What nobody reads is refused as a flag, noted in a file.

A flag is what somebody asked for now: one that changes nothing is an error, which names it. A `--config` file may serve
several commands, estimators and data sets: what a command does not read of it is said in a line.

Who adds a setting: training reads it unless config_estimators.READ_BY or NEEDS says when not; `evaluate` and the tools
read what READS lists. tests/unit/test_flags.py holds all of this against the code.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_jq.architecture import Architecture
from megatron_jq.architecture_files import has_weights
from megatron_jq.config import SETTINGS, Config
from megatron_jq.config_estimators import READ_BY
from megatron_jq.errors import UserError
from megatron_jq.estimators import ESTIMATORS, ROWS, names_of
from megatron_jq.formats.sources import is_builtin, is_made
from megatron_jq.formats.table import formats_reading

_LAYOUT = {
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
    "expert_tensor_parallel_size", "num_virtual_stages_per_pipeline_rank", "pipeline_model_parallel_layout",
    "context_parallel_size", "sequence_parallel", "device", "transformer_impl",
    "model_class",
}  # fmt: skip
_RECORDS = {
    "data_format", "prompt_field", "answer_field", "id_field", "finqa_answer", "bad_records", "prompt_style",
    "prompt_template", "max_prompt_tokens", "overlong_prompts", "tokenizer_type", "tokenizer_model",
    "add_bos_token", "chat_date", "think_open", "think_close",
}  # fmt: skip
_MODEL = {name for name, (group, _) in SETTINGS.items() if group == "model"}

#: Settings that say how a sample is judged: also one that was drawn before.
JUDGING = {"match", "match_rule", "answer_extract"}

#: Command → the settings that it reads. Training is not here: it reads all that NEEDS and READ_BY do not take from it.
READS: dict[str, frozenset[str]] = {
    "evaluate": frozenset(
        _LAYOUT | _RECORDS | JUDGING
        | {"bf16", "make_vocab_size_divisible_by", "distributed_timeout_minutes", "seed", "eval_data", "eval_examples",
           "eval_samples", "eval_temperature", "eval_top_p", "rationale_budget", "answer_budget", "rollout_batch_size",
           "reward"}
    ),
    "evaluate --rescore": frozenset(JUDGING | {"seed"}),
    "tools/prepare_data.py": frozenset(
        _RECORDS | _MODEL
        | {"estimator", "train_data", "eval_data", "train_examples", "eval_examples", "rationale_field",
           "rationale_budget", "answer_budget", "tokenizer_vocab_size", "seed"}
    ),
    "tools/bench_step.py": frozenset(
        (_LAYOUT | _MODEL | {name for name, (group, _) in SETTINGS.items() if group in ("parallel", "optimizer")}
         | {name for name, (group, _) in SETTINGS.items() if group == "rollout"}
         | {"estimator", "q", "normalize", "max_prompt_tokens", "train_iters", "micro_batch_size", "seed",
            "max_tokens_per_micro_batch", "share_prompts", "pad_sequences_to_multiple_of"})
        - {"rollout_engine", "score_check_interval", "score_mismatch_alarm"}
    ),
}  # fmt: skip

# The same samples, shown: its own flags name the prompts, their golds and how many samples.
READS["generate"] = READS["evaluate"] - {"eval_data", "eval_samples", "reward"}

#: (command, setting) → what to give instead.
INSTEAD = {
    ("generate", "temperature"): "give --eval-temperature",
    ("generate", "top_p"): "give --eval-top-p",
    ("generate", "eval_data"): "give --prompts",
    ("generate", "train_data"): "give --prompts",
    ("generate", "eval_samples"): "give --samples",
    ("generate", "num_rationales"): "give --samples",
    ("generate", "model"): "give --load or --hf",
    ("evaluate", "temperature"): "give --eval-temperature",
    ("evaluate", "top_p"): "give --eval-top-p",
    ("evaluate", "train_data"): "give --eval-data",
    ("evaluate", "run_dir"): "give --output",
    ("evaluate", "num_rationales"): "give --eval-samples",
    ("evaluate", "micro_batch_size"): "give --rollout-batch-size",
    ("evaluate", "model"): "give --load or --hf",
    ("evaluate", "save"): "give --output",
}
_WHY = {
    "generate": "it trains nothing, and takes the model from the checkpoint",
    "evaluate": "it trains nothing, and takes the model from the checkpoint",
    "evaluate --rescore": "it changes no sample that is there already; evaluate again for that",
    "tools/prepare_data.py": "it does not change the set",
    "tools/bench_step.py": "it measures steps on made-up prompts, and saves nothing",
}

#: Settings that a command line of training may name although nothing reads them → why that is right.
LISTED = {
    "context_parallel_size": "1 is the only value; any other is refused",
    "show_example": "prints an example in place of training: the rest of the line is training's, and stays as it is",
}

#: Settings that a run does not read → the value that asks for what happens all the same.
SO_ANYWAY = {"sample_interval": 0, "share_prompts": "off"}


@dataclass(frozen=True)
class Need:
    """Settings that only count where another one says so. holds: whether it does; says: what it must be."""

    settings: tuple[str, ...]
    holds: Callable[[Config, Architecture], bool]
    says: str


def _sources(config: Config) -> list[str]:
    d = config.data
    return [source for source in (d.train_data, d.eval_data) if source is not None]


def _has_files(config: Config) -> bool:
    return not all(map(is_made, _sources(config)))


def _reads(config: Config, setting: str) -> bool:
    return _has_files(config) and config.data.data_format in formats_reading(setting)


NEEDS = (
    Need(("sgd_momentum",), lambda c, a: c.optimizer.optimizer == "sgd", "--optimizer sgd"),
    Need(("adam_beta1", "adam_beta2", "adam_eps"), lambda c, a: c.optimizer.optimizer == "adam", "--optimizer adam"),
    Need(
        ("min_lr", "lr_decay_iters"), lambda c, a: c.optimizer.lr_decay_style != "constant",
        "--lr-decay-style linear or cosine",
    ),
    Need(("score_check_interval",), lambda c, a: c.rollout.score_with == "rollout", "--score-with rollout"),
    Need(
        ("grpo_clamp_eps_lower", "grpo_clamp_eps_upper"), lambda c, a: c.objective.grpo_iterations > 1,
        "--grpo-iterations above 1: the first update has nothing to clip",
    ),
    Need(("train_examples",), lambda c, a: is_builtin(c.data.train_data), "--train-data builtin:KIND"),
    Need(("data_format", "bad_records"), lambda c, a: _has_files(c), "data from a file"),
    Need(
        ("prompt_field", "id_field"), lambda c, a: _reads(c, "prompt_field"),
        f"--data-format {' or '.join(formats_reading('prompt_field'))}",
    ),
    Need(
        ("answer_field",), lambda c, a: _reads(c, "answer_field"),
        f"--data-format {' or '.join(formats_reading('answer_field'))}",
    ),
    Need(("finqa_answer",), lambda c, a: _reads(c, "finqa_answer"), "FinQA's records"),
    Need(("prompt_template",), lambda c, a: c.data.prompt_style != "plain", "--prompt-style cold or warm"),
    Need(("tokenizer_vocab_size",), lambda c, a: c.data.tokenizer_model is None, "no --tokenizer-model"),
    Need(
        ("micro_batch_size",), lambda c, a: c.training.max_tokens_per_micro_batch is None,
        "no --max-tokens-per-micro-batch, which bounds a micro-batch instead",
    ),
    Need(("init_method_std",), lambda c, a: begins_at_random(c), "random weights (no --load, no --model with weights)"),
    Need(("match_rule",), lambda c, a: c.training.match != "math", "another --match: math compares by rule number"),
    Need(("eval_top_p",), lambda c, a: c.training.eval_temperature > 0, "--eval-temperature above 0"),
    Need(("ffn_hidden_size",), lambda c, a: a.num_experts is None, "a model without experts"),
    Need(
        ("moe_ffn_hidden_size", "moe_router_topk", "moe_aux_loss_coeff"), lambda c, a: a.num_experts is not None,
        "a model with experts (--num-experts)",
    ),
)  # fmt: skip
#: The same, of training alone.
NEEDS_IN_TRAINING = (
    Need(
        ("reward",), lambda c, a: c.objective.row.samples_answers or c.training.match == "reward",
        f"--estimator {names_of(row for row in ROWS if row.samples_answers)}, or --match reward",
    ),
    Need(("answer_extract",), lambda c, a: has_heldout(c), "--eval-data"),
    Need(
        ("match", "match_rule"), lambda c, a: has_heldout(c) or c.objective.row.samples_answers, "--eval-data"
    ),
    Need(
        ("eval_examples", "eval_samples", "eval_temperature", "eval_top_p"), lambda c, a: has_heldout(c), "--eval-data"
    ),
)
#: The same, of `evaluate` alone.
NEEDS_IN_EVALUATION = (Need(("tokenizer_type",), lambda c, a: c.data.tokenizer_model is not None, "--tokenizer-model"),)


def begins_at_random(config: Config) -> bool:
    """Whether a new run's weights are drawn: neither --load nor --model names any."""
    return config.checkpoint.load is None and not has_weights(config.model.model)


def has_heldout(config: Config) -> bool:
    """Whether a run may have data to be evaluated on: named, or brought by its training data."""
    d = config.data
    from_a_corpus = config.objective.row.pretrains
    # What a prepared folder holds is known once it is read.
    return from_a_corpus or d.eval_data is not None or is_made(d.train_data) or Path(d.train_data).is_dir()


def unread(command: str, config: Config, architecture: Architecture) -> dict[str, str]:
    """Setting → why the command does not read it, of those that it does not read with these settings."""
    needs = NEEDS
    if command == "train":
        estimator, reasons, needs = config.objective.estimator, {}, (*NEEDS, *NEEDS_IN_TRAINING)
        for name, readers in READ_BY.items():
            if estimator not in readers:
                reasons[name] = f"of --estimator {names_of(ESTIMATORS[name] for name in readers)} alone"
    else:
        reasons = {name: INSTEAD.get((command, name), _WHY[command]) for name in SETTINGS if name not in READS[command]}
        if command in ("evaluate", "generate"):
            needs = (*NEEDS, *NEEDS_IN_EVALUATION)
    for need in needs:
        if not need.holds(config, architecture):
            for name in need.settings:
                reasons.setdefault(name, f"it needs {need.says}")
    return reasons


def refuse_unread(command: str, config: Config, architecture: Architecture, flags: Collection[str]) -> None:
    """UserError with a line for each of `flags` (settings that the command line names) that is not read."""
    reasons = unread(command, config, architecture)
    by = f"--estimator {config.objective.estimator}" if command == "train" else command
    lines = [
        f"{flag_of(config, name) if command == 'train' else _plain(name)} is not read by "
        f"{_reader(by, name, config)}: {reasons[name]}"
        + (" instead" if reasons[name].startswith("give ") else "; leave it out")
        for name in SETTINGS
        if name in flags and name in reasons and not (command == "train" and _is_right(config, name))
    ]
    if lines:
        raise UserError("\n".join(lines))


def _is_right(config: Config, name: str) -> bool:
    return name in LISTED or (name in SO_ANYWAY and _value(config, name) == SO_ANYWAY[name])


def _reader(by: str, name: str, config: Config) -> str:
    of_another = name in READ_BY and config.objective.estimator not in READ_BY[name]
    return "this run" if by.startswith("--estimator") and not of_another else by


def unread_note(
    command: str,
    config: Config,
    architecture: Architecture,
    flags: Collection[str] = (),
    base: Config = Config(),  # noqa: B008 (frozen)
) -> str | None:
    """What the output says of settings other than `base`'s that are not read. None: there are none."""
    reasons = unread(command, config, architecture)
    names = [n for n in SETTINGS if n in reasons and n not in flags and _value(config, n) != _value(base, n)]
    of_others = [name for name in names if name in READ_BY or command != "train"]
    parts = []
    if of_others:
        by = f"--estimator {config.objective.estimator}" if command == "train" else command
        parts.append(f"not read by {by}: {', '.join(flag_of(config, name) for name in of_others)}")
    rest = [f"{flag_of(config, name)} ({reasons[name]})" for name in names if name not in of_others]
    if rest:
        parts.append(f"not read by this run: {', '.join(rest)}")
    return "; ".join(parts) or None


def without_unread(config: Config, architecture: Architecture) -> Config:
    """The same training without the settings that it does not read: what a command line may hold (to_argv)."""
    for name in unread("train", config, architecture):
        group = SETTINGS[name][0]
        changed = replace(getattr(config, group), **{name: _value(Config(), name)})
        config = replace(config, **{group: changed})
    return config


def flag_of(config: Config, name: str) -> str:
    """As a command line would have it."""
    return f"--{'no-' if _value(config, name) is False else ''}{_plain(name).removeprefix('--')}"


def _plain(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _value(config: Config, name: str) -> Any:
    return getattr(getattr(config, SETTINGS[name][0]), name)
