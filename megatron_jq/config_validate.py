"""F1: what is wrong with a configuration, found before any work starts, and what follows from a right one."""

import datetime
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from megatron_jq.architecture import Architecture, architecture_problems, with_overrides
from megatron_jq.architecture_files import load_architecture
from megatron_jq.config import Config
from megatron_jq.config_estimators import estimator_problems, unread_problems
from megatron_jq.config_layout import layout_problems
from megatron_jq.errors import UserError
from megatron_jq.formats.sources import is_made


@dataclass(frozen=True)
class Derived:
    """Numbers that follow from a valid Config and the number of processes."""

    architecture: Architecture  # the preset or file, with the overrides
    world_size: int
    data_parallel_size: int  # replicas
    rationales_per_step: int  # B * M
    num_resamples: int  # PAFT's K
    samples_answers: bool
    q_schedule_iters: int
    lr_decay_iters: int
    params_dtype: Literal["float32", "bfloat16"]


def resolve_architecture(config: Config) -> Architecture:
    """The model that the settings name, overrides applied. UserError where there is none of that name."""
    m = config.model
    untied = m.untie_embeddings_and_output_weights
    return with_overrides(
        load_architecture(m.model),
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        ffn_hidden_size=m.ffn_hidden_size,
        num_attention_heads=m.num_attention_heads,
        num_query_groups=m.num_query_groups,
        kv_channels=m.kv_channels,
        max_position_embeddings=m.max_position_embeddings,
        init_method_std=m.init_method_std,
        num_experts=m.num_experts,
        moe_ffn_hidden_size=m.moe_ffn_hidden_size,
        moe_router_topk=m.moe_router_topk,
        moe_aux_loss_coeff=m.moe_aux_loss_coeff,
        tie_embeddings=None if untied is None else not untied,
    )


def derive(config: Config, world_size: int) -> Derived:
    """Every derived value. UserError, as validate_training raises it, where the configuration is not a valid one."""
    validate_training(config, world_size)
    p, rationales = config.parallel, config.rollout.prompts_per_step * config.rollout.num_rationales
    replicas = world_size // (p.tensor_model_parallel_size * p.pipeline_model_parallel_size)
    return Derived(
        architecture=resolve_architecture(config),
        world_size=world_size,
        data_parallel_size=replicas,
        rationales_per_step=rationales,
        num_resamples=config.objective.num_resamples or config.rollout.num_rationales,
        samples_answers=config.objective.row.samples_answers,
        q_schedule_iters=config.objective.q_schedule_iters or max(config.training.train_iters - 1, 1),
        lr_decay_iters=config.optimizer.lr_decay_iters or config.training.train_iters,
        params_dtype=config.model.params_dtype,
    )


def validate(config: Config, world_size: int | None, architecture: Architecture | None = None) -> None:
    """Raise one UserError that lists every problem, a line each, with the flag and the fix.

    world_size None: not known yet; only then the checks that need it are left out. architecture None: the settings'.
    """
    _refuse(_problems(config, world_size, architecture or resolve_architecture(config)))


def validate_training(config: Config, world_size: int | None) -> None:
    """validate, and no setting of another estimator: an evaluation takes on those of a run, and may."""
    _refuse([*_problems(config, world_size, resolve_architecture(config)), *unread_problems(config)])


def _refuse(problems: list[str]) -> None:
    if problems:
        raise UserError("\n".join(problems))


def _problems(config: Config, world_size: int | None, architecture: Architecture) -> list[str]:
    return [
        *_range_problems(config),
        *estimator_problems(config, architecture),
        *architecture_problems(architecture),
        *layout_problems(config, architecture, world_size),
        *_length_problems(config, architecture),
        *_schedule_problems(config),
        *_checkpoint_problems(config),
        *_date_problems(config),
    ]


# Lower bounds, inclusive, of every numeric setting that has one; None (a default to be derived) passes.
AT_LEAST = {
    1: (
        "make_vocab_size_divisible_by", "tensor_model_parallel_size", "pipeline_model_parallel_size", "num_resamples",
        "num_virtual_stages_per_pipeline_rank", "context_parallel_size", "recompute_num_layers",
        "expert_model_parallel_size", "expert_tensor_parallel_size",
        "q_schedule_iters", "num_rationales", "prompts_per_step", "rationale_budget", "answer_budget",
        "rollout_batch_size", "train_examples", "max_prompt_tokens", "tokenizer_vocab_size",
        "lr_decay_iters", "train_iters", "micro_batch_size", "max_tokens_per_micro_batch",
        "pad_sequences_to_multiple_of", "log_interval", "eval_samples", "keep_last", "seq_length",
        "grpo_iterations",
    ),
    0: (
        "q", "q_final", "lr", "min_lr", "lr_warmup_iters", "weight_decay", "adam_beta1", "adam_beta2", "sgd_momentum",
        "clip_grad", "eval_examples", "sample_interval", "eval_interval", "score_check_interval", "save_interval",
        "save_interval_minutes",
        "score_mismatch_alarm", "eval_temperature", "seed", "show_example", "grpo_clamp_eps_lower",
        "grpo_clamp_eps_upper", "grpo_kl_beta",
    ),
}  # fmt: skip
AT_MOST_ONE = ("q", "q_final", "top_p", "eval_top_p", "grpo_clamp_eps_lower")
BELOW_ONE = ("adam_beta1", "adam_beta2", "sgd_momentum")
ABOVE_ZERO = (
    "temperature", "top_p", "eval_top_p", "distributed_timeout_minutes", "phase_timeout_minutes", "adam_eps",
    "exit_duration_in_mins", "loss_scale",
)  # fmt: skip


def _range_problems(config: Config) -> list[str]:
    values = {f.name: getattr(getattr(config, g.name), f.name) for g in fields(config) for f in fields(g.type)}
    numbers = {n: v for n, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    least = {name: bound for bound, names in AT_LEAST.items() for name in names}
    problems = []
    for name, value in numbers.items():
        flag = f"--{name.replace('_', '-')}"
        if not math.isfinite(value):
            problems.append(f"{flag} must be finite, not {value}")
        elif name in ABOVE_ZERO and value <= 0:
            problems.append(f"{flag} must be above 0, not {value}")
        elif name in BELOW_ONE and value >= 1:
            problems.append(f"{flag} must be below 1, not {value}")
        elif name in AT_MOST_ONE and not least.get(name, 0) <= value <= 1:
            problems.append(f"{flag} must lie between 0 and 1, not {value}")
        elif value < least.get(name, value):
            problems.append(f"{flag} must be at least {least[name]}, not {value}")
    if config.training.seed >= 1 << 63:
        problems.append(f"--seed must be below 2^63, not {config.training.seed}")
    for name in (
        "train_data",
        "prompt_field",
        "answer_field",
        "id_field",
        "prompt_template",
        "rationale_field",
        "data_path",
        "data_cache_path",
        "run_dir",
        "eval_data",
        "tokenizer_model",
        "think_open",
        "think_close",
        "save",
        "load",
    ):
        if values[name] == "":
            problems.append(f"--{name.replace('_', '-')} must not be empty")
    return problems


def _date_problems(config: Config) -> list[str]:
    date = config.data.chat_date
    if date is None:
        return []
    try:
        datetime.datetime.strptime(date, "%Y-%m-%d")
    except ValueError:
        return [f"--chat-date must be a date as YYYY-MM-DD, not {date!r}"]
    return []


def _checkpoint_problems(config: Config) -> list[str]:
    c, problems = config.checkpoint, []
    if c.finetune and c.load is None:
        problems.append("--finetune needs --load: the checkpoint whose weights to begin from")
    if c.keep_best is not None and c.keep_last is None:
        problems.append("--keep-best needs --keep-last: without it every checkpoint stays")
    every, evaluated = c.save_interval, config.training.eval_interval
    if (c.keep_best or "").startswith("eval_") and every > 0 and (evaluated == 0 or every % evaluated):
        problems.append(
            f"--keep-best {c.keep_best} is known after evaluations alone: give --eval-interval, and a --save-interval "
            f"({every}) that is a multiple of it"
        )
    return problems


def _length_problems(config: Config, architecture: Architecture) -> list[str]:
    r, d, problems = config.rollout, config.data, []
    pretrains = config.objective.row.pretrains  # its rows are as long as --seq-length says
    prompt, answer = d.max_prompt_tokens or 1, r.answer_budget or 1
    if not pretrains and prompt + r.rationale_budget + 1 + answer > architecture.max_position_embeddings:
        problems.append(
            f"the model's context of {architecture.max_position_embeddings} tokens cannot hold a prompt of {prompt}, "
            f"a rationale of {r.rationale_budget} (--rationale-budget), its close token and an answer of {answer}: "
            "lower the budget, or raise --max-position-embeddings"
        )
    pieces, vocabulary = d.tokenizer_vocab_size, architecture.vocab_size
    if pieces is not None and vocabulary is not None and pieces > vocabulary:
        problems.append(f"--tokenizer-vocab-size ({pieces}) must not be above the model's vocabulary ({vocabulary})")
    if d.tokenizer_type == "huggingface" and d.tokenizer_model is None:
        problems.append("--tokenizer-type huggingface needs --tokenizer-model: a tokenizer.json, or a folder with one")
    return problems


def _schedule_problems(config: Config) -> list[str]:
    o, t, problems = config.optimizer, config.training, []
    if o.min_lr > o.lr:
        problems.append(f"--min-lr ({o.min_lr}) must not be above --lr ({o.lr})")
    decay_iters = t.train_iters if o.lr_decay_iters is None else o.lr_decay_iters
    if o.lr_decay_style != "constant" and o.lr_warmup_iters >= decay_iters:
        problems.append(f"--lr-warmup-iters ({o.lr_warmup_iters}) must be below --lr-decay-iters ({decay_iters})")
    if t.eval_samples > 1 and t.eval_temperature == 0:
        problems.append("--eval-samples above 1 needs --eval-temperature above 0: greedy samples are all the same")
    source = config.data.train_data
    brings_its_own = is_made(source) or (Path(source) / "validation.jsonl").is_file()  # a prepared set
    brings_its_own |= config.objective.row.pretrains  # --split
    if t.eval_interval > 0 and config.data.eval_data is None and not brings_its_own:
        problems.append("--eval-interval needs --eval-data")
    return problems
