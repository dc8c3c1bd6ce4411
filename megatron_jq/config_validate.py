"""F1: what is wrong with a configuration, found before any work starts, and what follows from a right one."""

import datetime
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from megatron_jq.architecture import Architecture, architecture_problems, with_overrides
from megatron_jq.architecture_files import load_architecture
from megatron_jq.config import Config, ParallelConfig
from megatron_jq.config_estimators import estimator_problems, unread_problems
from megatron_jq.errors import UserError


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
        *_layout_problems(config, architecture, world_size),
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


def _layout_problems(config: Config, architecture: Architecture, world_size: int | None) -> list[str]:
    p, a, problems = config.parallel, architecture, []
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    if tp < 1 or pp < 1:
        return []  # said by _range_problems; nothing can be divided
    split = ["num_attention_heads", "num_query_groups"] + ["ffn_hidden_size"] * (a.num_experts is None)
    for name in split:
        if getattr(a, name) % tp:
            problems.append(f"--tensor-model-parallel-size {tp} does not divide {name} ({getattr(a, name)})")
    problems.extend(_pipeline_problems(config, architecture))
    if p.use_distributed_optimizer and config.optimizer.optimizer != "adam":
        problems.append("--use-distributed-optimizer is Megatron-core's for --optimizer adam alone; choose one of them")
    if p.sequence_parallel and tp == 1:
        problems.append("--sequence-parallel needs --tensor-model-parallel-size above 1")
    problems.extend(_expert_layout_problems(p, a, world_size))
    if world_size is None:
        return problems
    if world_size % (tp * pp):
        problems.append(
            f"{world_size} process(es) cannot be cut into tensor x pipeline groups of {tp} x {pp} = {tp * pp}: start a "
            "multiple of that (torchrun --nproc-per-node), or change --tensor-model-parallel-size or "
            "--pipeline-model-parallel-size"
        )
    return problems


def _expert_layout_problems(p: ParallelConfig, a: Architecture, world_size: int | None) -> list[str]:
    tp, ep = p.tensor_model_parallel_size, p.expert_model_parallel_size
    etp = tp if p.expert_tensor_parallel_size is None else p.expert_tensor_parallel_size
    if a.num_experts is None:
        if ep > 1 or p.expert_tensor_parallel_size is not None:
            return ["--expert-model-parallel-size and --expert-tensor-parallel-size need a model with experts"]
        return []
    if min(ep, etp, a.num_experts, a.moe_ffn_hidden_size or 0) < 1:
        return []  # said elsewhere; nothing can be divided
    problems = []
    if a.num_experts % ep:
        problems.append(f"--expert-model-parallel-size {ep} does not divide num_experts ({a.num_experts})")
    if a.moe_ffn_hidden_size % etp:
        flag = "tensor" if p.expert_tensor_parallel_size is None else "expert-tensor"
        problems.append(f"--{flag}-parallel-size {etp} does not divide moe_ffn_hidden_size ({a.moe_ffn_hidden_size})")
    if tp > 1 and not p.sequence_parallel:
        problems.append(
            f"--tensor-model-parallel-size {tp} with experts needs --sequence-parallel: Megatron-core refuses to train "
            "them without, since every tensor-parallel rank would send all tokens to the experts"
        )
    if etp != tp and (ep == 1 or etp * ep % tp):
        problems.append(
            f"--expert-tensor-parallel-size {etp}, other than --tensor-model-parallel-size {tp}, needs "
            f"--expert-model-parallel-size above 1, and their product to be a multiple of {tp}: give that size "
            f"{tp // math.gcd(tp, etp)} or leave the first flag out"
        )
    elif world_size is not None and world_size % (etp * ep * p.pipeline_model_parallel_size):
        replicas = f"(tensor {tp} x data {world_size // (tp * p.pipeline_model_parallel_size)} processes)"
        problems.append(
            f"--expert-model-parallel-size {ep} x {etp} processes an expert do not divide a pipeline stage {replicas}"
        )
    return problems


def _pipeline_problems(config: Config, architecture: Architecture) -> list[str]:
    p, layers, problems = config.parallel, architecture.num_layers, []
    pp, virtual = p.pipeline_model_parallel_size, p.num_virtual_stages_per_pipeline_rank
    if virtual > 1 and pp == 1:
        problems.append("--num-virtual-stages-per-pipeline-rank needs --pipeline-model-parallel-size above 1")
    layout = p.pipeline_model_parallel_layout
    if layout is not None:
        parts = layout.split("|")
        if re.fullmatch(r"Et*(\|t*)*L", layout) is None:
            problems.append(
                f"--pipeline-model-parallel-layout {layout}: write E, a t a layer, L, with | between stages: Et|ttL"
            )
        elif len(parts) != pp * virtual or layout.count("t") != layers:
            problems.append(
                f"--pipeline-model-parallel-layout {layout} has {len(parts)} stage(s), {layout.count('t')} layer(s); "
                f"{pp} x {virtual} stages and {layers} layers are asked for"
            )
    elif virtual > 0 and layers % (pp * virtual):
        times = f" x --num-virtual-stages-per-pipeline-rank {virtual}" if virtual > 1 else ""
        problems.append(
            f"--pipeline-model-parallel-size {pp}{times} does not divide num_layers ({layers}); "
            "--pipeline-model-parallel-layout takes uneven stages"
        )
    if p.context_parallel_size > 1:
        problems.append(
            f"--context-parallel-size {p.context_parallel_size}: attention over a sequence that is split needs "
            "Transformer Engine's attention, and this build attends through torch's; use --context-parallel-size 1"
        )
    if p.recompute_granularity == "full" and (p.recompute_method is None or p.recompute_num_layers is None):
        problems.append(
            "--recompute-granularity full needs --recompute-method uniform|block and --recompute-num-layers; "
            "uniform and 1 keep one activation a layer"
        )
    if p.recompute_granularity != "full" and (p.recompute_method is not None or p.recompute_num_layers is not None):
        problems.append("--recompute-method and --recompute-num-layers need --recompute-granularity full")
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
    brings_its_own = source.startswith("builtin:") or (Path(source) / "validation.jsonl").is_file()  # a prepared set
    brings_its_own |= config.objective.row.pretrains  # --split
    if t.eval_interval > 0 and config.data.eval_data is None and not brings_its_own:
        problems.append("--eval-interval needs --eval-data")
    return problems
