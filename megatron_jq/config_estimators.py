"""F1: what each estimator needs of the settings, and which of them it does not read."""

from collections.abc import Iterable

from megatron_jq.architecture import Architecture
from megatron_jq.architecture_files import has_weights
from megatron_jq.config import SETTINGS, Config
from megatron_jq.estimators import GENERATOR, REFUSED_ELSEWHERE, ROWS, names_of, row_problems
from megatron_jq.toml_files import did_you_mean

#: Settings that only some estimators read → those. What says how a run is computed, watched or saved is not here.
READ_BY = {
    setting: tuple(row.name for row in ROWS if setting in row.all_settings)
    for setting in dict.fromkeys(setting for row in ROWS for setting in row.all_settings)
}
_REFUSED = tuple(setting for setting in READ_BY if setting in REFUSED_ELSEWHERE)


def unread(config: Config, settings: Iterable[str] = READ_BY) -> list[str]:
    """Those of the settings that are not the default's and that the estimator does not read."""
    default = Config()

    def changed(name: str) -> bool:
        group = SETTINGS[name][0]
        return getattr(getattr(config, group), name) != getattr(getattr(default, group), name)

    return [name for name in settings if config.objective.estimator not in READ_BY[name] and changed(name)]


def unread_problems(config: Config, settings: Iterable[str] = _REFUSED) -> list[str]:
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
    o, problems = config.objective, [*row_problems(config.objective.row), *_unknown_settings(config)]
    least, can = o.row.minimum_rationales, [row for row in ROWS if row.minimum_rationales == 1 and not row.imitates]
    if 1 <= config.rollout.num_rationales < least:
        problems.append(
            f"--num-rationales must be at least {least} for --estimator {o.estimator}: its baseline is the other "
            f"rationales of the prompt ({names_of(can)} can do with 1)"
        )
    if o.q_schedule == "constant" and (o.q_final is not None or o.q_schedule_iters is not None):
        problems.append("--q-final and --q-schedule-iters need --q-schedule step, linear or cosine")
    if o.q_schedule != "constant" and o.q_final is None:
        problems.append(f"--q-schedule {o.q_schedule} needs --q-final")
    if o.q_schedule == "step" and o.q_schedule_iters is None:
        problems.append("--q-schedule step needs --q-schedule-iters: the step at which q jumps to --q-final")
    return problems


def _unknown_settings(config: Config) -> list[str]:
    row = config.objective.row
    objective = {name for name, (group, _) in SETTINGS.items() if group == "objective"} | {GENERATOR}
    return [
        f"megatron_jq/estimators.py, row {row.name}: reads says {name}, which is no setting of [objective]; "
        f"{did_you_mean(name, objective, 'megatron_jq/settings.py has them')}"
        for name in row.reads
        if name not in objective
    ] + [
        f"megatron_jq/estimators.py, row {row.name}: settings says {name}, which is no setting; "
        f"{did_you_mean(name, SETTINGS, 'megatron_jq/settings.py has them')}"
        for name in row.settings
        if name not in SETTINGS
    ]


def _grpo_problems(config: Config) -> list[str]:
    o = config.objective
    several = o.grpo_iterations > 1 or o.grpo_kl_beta > 0
    if several and config.rollout.top_p < 1 and "grpo_iterations" in o.row.settings:
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
    o = config.objective
    if not o.row.imitates or config.rollout.num_rationales == 1:
        return []
    return [f"--num-rationales must be 1 for --estimator {o.estimator}: the data gives one and none is drawn"]


def _pretraining_problems(config: Config, architecture: Architecture) -> list[str]:
    d, problems = config.data, []
    name = config.objective.estimator
    if not config.objective.row.pretrains:
        return []
    if d.data_path is None:
        problems.append(f"--estimator {name} needs --data-path: the files that tools/preprocess_data.py writes")
    if d.tokenizer_model is None and config.checkpoint.load is None and not has_weights(config.model.model):
        problems.append(f"--estimator {name} needs --tokenizer-model: the one that --data-path was written with")
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
