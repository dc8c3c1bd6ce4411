"""F1: what each estimator needs of the settings, and which of them it does not read."""

from collections.abc import Iterable

from megatron_jq.architecture import Architecture
from megatron_jq.architecture_files import has_weights
from megatron_jq.config import GIVEN_RATIONALES, SETTINGS, Config

#: Estimators that need another rationale of the same prompt, for a baseline or a group mean.
LEAVE_ONE_OUT = ("garl", "grpo", "rloo", "maxrl")
#: Estimators whose reward is the exact match of an answer that was sampled; GARL and PAFT score y* itself.
SAMPLES_ANSWERS = ("grpo", "rloo", "maxrl", "star")

_POWERS = ("garl", "paft")  # of P: estimators that know q
_DRAWING = (*_POWERS, *SAMPLES_ANSWERS)
_PROMPTED = (*_DRAWING, "sft")

#: Settings that only some estimators read → those. What says how a run is computed, watched or saved is not here.
READ_BY = {
    **dict.fromkeys(("q", "q_schedule", "q_final", "q_schedule_iters", "normalize"), _POWERS),
    "num_resamples": ("paft",),
    **dict.fromkeys(("grpo_iterations", "grpo_clamp_eps_lower", "grpo_clamp_eps_upper", "grpo_kl_beta"), ("grpo",)),
    **dict.fromkeys(
        ("rollout_engine", "temperature", "top_p", "score_with", "score_check_interval", "score_mismatch_alarm"),
        _DRAWING,
    ),
    "rationale_field": ("sft",),
    **dict.fromkeys(
        ("data_path", "split", "seq_length", "eod_mask_loss", "reset_attention_mask", "data_cache_path"), ("pretrain",)
    ),
    **dict.fromkeys(("rationale_budget", "answer_budget", "max_prompt_tokens", "overlong_prompts"), _PROMPTED),
    **dict.fromkeys(("prompt_field", "answer_field", "id_field", "data_format", "finqa_answer"), _PROMPTED),
    **dict.fromkeys(("bad_records", "prompt_style", "prompt_template", "train_examples"), _PROMPTED),
    **dict.fromkeys(("tokenizer_vocab_size", "match", "normalise", "answer_extract"), _PROMPTED),
    **dict.fromkeys(("eval_temperature", "eval_top_p", "eval_samples"), _PROMPTED),
    **dict.fromkeys(("train_data", "eval_data", "rollout_batch_size", "share_prompts", "sample_interval"), _PROMPTED),
    **dict.fromkeys(("add_bos_token", "chat_date"), _PROMPTED),
}


#: Of these, what makes no sense elsewhere. The others may stay in a file that serves several estimators.
_OF_ONE_ALONE = tuple(name for name, readers in READ_BY.items() if len(readers) == 1 and name != "rationale_field")


def unread(config: Config, settings: Iterable[str] = READ_BY) -> list[str]:
    """Those of the settings that are not the default's and that the estimator does not read."""
    default = Config()

    def changed(name: str) -> bool:
        group = SETTINGS[name][0]
        return getattr(getattr(config, group), name) != getattr(getattr(default, group), name)

    return [name for name in settings if config.objective.estimator not in READ_BY[name] and changed(name)]


def unread_problems(config: Config, settings: Iterable[str] = _OF_ONE_ALONE) -> list[str]:
    """A line for each of them."""
    name = config.objective.estimator
    return [
        f"{_flag(config, setting)} is for --estimator {' or '.join(READ_BY[setting])} alone, not {name}"
        for setting in unread(config, settings)
    ]


def schedule_notes(config: Config) -> list[str]:
    """What the run's output says of schedules whose given length does not fit the run. Steps count from 0."""
    o, objective, last, notes = config.optimizer, config.objective, config.training.train_iters - 1, []
    length = objective.q_schedule_iters
    if objective.q_schedule != "constant" and length is not None and length > last:
        notes.append(
            f"q does not reach --q-final {objective.q_final:g} in this run: --q-schedule-iters {length} says from step "
            f"{length} on, and the last step is {last}"
        )
    if o.lr_decay_style == "constant" or o.lr_decay_iters is None:
        return notes
    if o.lr_decay_iters <= last and o.min_lr == 0:
        notes.append(
            f"warning: steps {o.lr_decay_iters} to {last} train at rate 0 (--lr-decay-iters {o.lr_decay_iters}, "
            "--min-lr 0): nothing is learnt in them"
        )
    if o.lr_decay_iters > last + 1:
        notes.append(
            f"the learning rate does not reach --min-lr {o.min_lr:g} in this run: --lr-decay-iters {o.lr_decay_iters}, "
            f"--train-iters {last + 1}"
        )
    return notes


def _flag(config: Config, setting: str) -> str:
    off = getattr(getattr(config, SETTINGS[setting][0]), setting) is False
    return f"--{'no-' if off else ''}{setting.replace('_', '-')}"


def estimator_problems(config: Config, architecture: Architecture) -> list[str]:
    """A line for each setting that the estimator lacks or cannot do with."""
    return [
        *_objective_problems(config),
        *_grpo_problems(config),
        *_given_problems(config),
        *_judge_problems(config),
        *_pretraining_problems(config, architecture),
    ]


def _objective_problems(config: Config) -> list[str]:
    o, problems = config.objective, []
    if o.estimator in LEAVE_ONE_OUT and config.rollout.num_rationales == 1:
        problems.append(
            f"--num-rationales must be at least 2 for --estimator {o.estimator}: its baseline is the other rationales "
            "of the prompt (paft can do with 1)"
        )
    if o.q_schedule == "constant" and (o.q_final is not None or o.q_schedule_iters is not None):
        problems.append("--q-final and --q-schedule-iters need --q-schedule step, linear or cosine")
    if o.q_schedule != "constant" and o.q_final is None:
        problems.append(f"--q-schedule {o.q_schedule} needs --q-final")
    if o.q_schedule == "step" and o.q_schedule_iters is None:
        problems.append("--q-schedule step needs --q-schedule-iters: the step at which q jumps to --q-final")
    return problems


def _grpo_problems(config: Config) -> list[str]:
    o = config.objective
    several = o.grpo_iterations > 1 or o.grpo_kl_beta > 0
    if o.estimator == "grpo" and several and config.rollout.top_p < 1:
        return [
            "--grpo-iterations above 1 and --grpo-kl-beta need --top-p 1: a token can lie outside another policy's "
            "nucleus, where its probability is 0"
        ]
    return []


def _judge_problems(config: Config) -> list[str]:
    if config.training.match != "reward" or config.training.reward is not None:
        return []
    return [
        "--match reward needs --reward MODULE:FUNCTION; one that a checkpoint's settings name is not run unless you "
        "give it again"
    ]


def _given_problems(config: Config) -> list[str]:
    name = config.objective.estimator
    if name not in GIVEN_RATIONALES or config.rollout.num_rationales == 1:
        return []
    return [f"--num-rationales must be 1 for --estimator {name}: the data gives one and none is drawn"]


def _pretraining_problems(config: Config, architecture: Architecture) -> list[str]:
    d, problems = config.data, []
    if config.objective.estimator != "pretrain":
        return []
    if d.data_path is None:
        problems.append("--estimator pretrain needs --data-path: the files that tools/preprocess_data.py writes")
    if d.tokenizer_model is None and config.checkpoint.load is None and not has_weights(config.model.model):
        problems.append("--estimator pretrain needs --tokenizer-model: the one that --data-path was written with")
    context, most = architecture.max_position_embeddings, config.training.max_tokens_per_micro_batch
    if d.seq_length is not None and d.seq_length > context:
        problems.append(
            f"--seq-length {d.seq_length} exceeds the model's context of {context} tokens; lower it, or raise "
            "--max-position-embeddings"
        )
    if most is not None and most < (d.seq_length or context) + 1:
        problems.append(
            f"--max-tokens-per-micro-batch {most} is below a row of {(d.seq_length or context) + 1} tokens "
            "(--seq-length, and the first one); raise it, or lower --seq-length"
        )
    if config.checkpoint.keep_best is not None and config.checkpoint.keep_best != "log_p_mean":
        problems.append(f"--keep-best {config.checkpoint.keep_best} is not known in pretraining; log_p_mean is")
    return problems
