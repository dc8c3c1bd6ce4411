"""F4: which settings a run may change when it is resumed, and why. No Megatron: the table is for people and tests too.

FREE         may change: speed, length, place, or what is shown and evaluated; results within rounding at the most
SAME_DATA    may change where the training data stays token for token the same: the checkpoint keeps its fingerprint
SAME_MODEL   may change where the architecture stays the same: the checkpoint keeps it
SAME_TOKENS  may change where the tokenizer stays the same: the checkpoint keeps its fingerprint
FIXED        another value is another run, which --load begins

A setting that the run's estimator, optimizer or schedule does not read may change whatever its rule says.
"""

from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

from megatron_jq.config import SETTINGS, Config
from megatron_jq.config_estimators import READ_BY


class Rule(Enum):
    FREE = "free"
    SAME_DATA = "free if the data's fingerprint is equal"
    SAME_MODEL = "free if the architecture is equal"
    SAME_TOKENS = "free if the tokenizer's fingerprint is equal"
    FIXED = "fixed"


_GROUPS: tuple[tuple[Rule, str, tuple[str, ...]], ...] = (
    (Rule.FREE, "layout and kernels: results within rounding", (
        "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
        "expert_tensor_parallel_size", "num_virtual_stages_per_pipeline_rank", "pipeline_model_parallel_layout",
        "context_parallel_size", "recompute_granularity", "recompute_method", "recompute_num_layers",
        "sequence_parallel", "use_distributed_optimizer", "overlap_grad_reduce", "device", "transformer_impl",
        "model_class", "make_vocab_size_divisible_by",
    )),
    (Rule.FREE, "deadlines", ("distributed_timeout_minutes", "phase_timeout_minutes")),
    (Rule.FREE, "how a step is cut: results within rounding", (
        "micro_batch_size", "max_tokens_per_micro_batch", "share_prompts", "pad_sequences_to_multiple_of",
        "rollout_batch_size", "score_with",
    )),
    (Rule.FREE, "the run's length; a schedule that ends with it is checked by its own setting", ("train_iters",)),
    (Rule.FREE, "what is shown", (
        "log_interval", "sample_interval", "tensorboard", "show_example", "score_check_interval",
        "score_mismatch_alarm",
    )),
    (Rule.FREE, "evaluation, which no gradient reads", (
        "eval_data", "eval_examples", "eval_interval", "eval_temperature", "eval_top_p", "eval_samples", "match",
        "match_rule", "answer_extract",
    )),
    (Rule.FREE, "where and when it is saved; a folder of another run is refused", (
        "run_dir", "save", "save_interval", "save_interval_minutes", "exit_duration_in_mins", "async_save",
        "keep_last", "keep_best", "data_cache_path",
    )),
    (Rule.FREE, "read where a run begins, and by no resumed one", ("resume", "load", "finetune", "init_method_std")),
    (Rule.SAME_DATA, "where prompts and answers come from, and how they are written as tokens", (
        "train_data", "data_format", "prompt_field", "answer_field", "id_field", "rationale_field", "finqa_answer",
        "bad_records", "prompt_style", "prompt_template", "train_examples", "max_prompt_tokens", "overlong_prompts",
        "add_bos_token", "chat_date",
        "data_path", "split", "seq_length", "max_position_embeddings",
    )),
    (Rule.SAME_DATA, "the checkpoint keeps the number of tokens that a sampled answer may take", ("answer_budget",)),
    (Rule.SAME_MODEL, "what the weights are", (
        "model", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
        "kv_channels", "untie_embeddings_and_output_weights", "num_experts", "moe_ffn_hidden_size",
        "moe_router_topk", "moe_aux_loss_coeff",
    )),
    (Rule.SAME_TOKENS, "the name of the tokenizer", ("tokenizer_type", "tokenizer_model")),
    (Rule.SAME_TOKENS, "names of tokens, which the fingerprint counts in", ("think_open", "think_close")),
    (Rule.FIXED, "the tokenizer is trained once", ("tokenizer_vocab_size",)),
    (Rule.FIXED, "precision", ("bf16",)),
    (Rule.FIXED, "the loss", (
        "estimator", "q", "q_schedule", "q_final", "q_schedule_iters", "num_resamples", "normalize",
        "grpo_iterations", "grpo_clamp_eps_lower", "grpo_clamp_eps_upper", "grpo_kl_beta", "eod_mask_loss",
        "reset_attention_mask", "reward",
    )),
    (Rule.FIXED, "what is drawn", (
        "num_rationales", "prompts_per_step", "rationale_budget", "temperature", "top_p", "seed", "rollout_engine",
    )),
    (Rule.FIXED, "the update", (
        "optimizer", "lr", "min_lr", "lr_decay_style", "lr_warmup_iters", "lr_decay_iters", "weight_decay",
        "adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum", "clip_grad", "loss_scale",
    )),
)  # fmt: skip

#: Every setting → its rule and the reason. A test demands that none is missing.
RULES: dict[str, tuple[Rule, str]] = {name: (rule, why) for rule, why, names in _GROUPS for name in names}

#: Settings whose meaning depends on others: name → what the run makes of it (None: it is not read).
_MEANING: dict[str, Callable[[Config], Any]] = {
    "lr_decay_iters": lambda c: (
        None if c.optimizer.lr_decay_style == "constant" else c.optimizer.lr_decay_iters or c.training.train_iters
    ),
    "min_lr": lambda c: None if c.optimizer.lr_decay_style == "constant" else c.optimizer.min_lr,
    "q_schedule_iters": lambda c: (
        None
        if c.objective.q_schedule == "constant"
        else c.objective.q_schedule_iters or max(c.training.train_iters - 1, 1)
    ),
    "num_resamples": lambda c: (
        (c.objective.num_resamples or c.rollout.num_rationales) if c.objective.row.resamples else None
    ),
    "sgd_momentum": lambda c: c.optimizer.sgd_momentum if c.optimizer.optimizer == "sgd" else None,
    **{
        name: lambda c, name=name: getattr(c.optimizer, name) if c.optimizer.optimizer == "adam" else None
        for name in ("adam_beta1", "adam_beta2", "adam_eps")
    },
}
#: Schedules that end with the run where their own length is not set.
_SCHEDULES = {"lr_decay_iters": "the learning rate", "q_schedule_iters": "q"}


def changed(
    before: Config, after: Config, rule: Rule = Rule.FIXED, names: Iterable[str] = tuple(SETTINGS)
) -> list[str]:
    """A line per setting of `rule` that a resumed run reads and that `after` changes: flag, old value, new value."""
    return [
        _line(name, before, after)
        for name in names
        if rule_of(name) is rule and _read(name, before, after) and meaning(before, name) != meaning(after, name)
    ]


def rule_of(name: str) -> Rule:
    """A setting that nobody has classified is fixed."""
    return RULES[name][0] if name in RULES else Rule.FIXED


def meaning(config: Config, name: str) -> Any:
    """What a run makes of a setting: schedules without a length of their own end with the run."""
    return _MEANING[name](config) if name in _MEANING else _value(config, name)


def _read(name: str, before: Config, after: Config) -> bool:
    """Whether it is read, then and now: where that changed, the setting on which it depends says so."""
    if name in _MEANING:
        return None not in (meaning(before, name), meaning(after, name))
    return name not in READ_BY or after.objective.estimator in READ_BY[name]


def _line(name: str, before: Config, after: Config) -> str:
    flag, old = f"--{name.replace('_', '-')}", meaning(before, name)
    if name in _SCHEDULES and _value(after, name) is None and old is not None:
        return (
            f"--train-iters {after.training.train_iters} would move the end of {_SCHEDULES[name]}'s schedule, "
            f"step {old}: give {flag} {old} to keep it"
        )
    return f"{flag} was {old} and is {meaning(after, name)}"


def _value(config: Config, name: str) -> Any:
    return getattr(getattr(config, SETTINGS[name][0]), name)
