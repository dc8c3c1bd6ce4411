"""F4: puts a run's loop together: which steps, which learner, with what options."""

from dataclasses import replace
from pathlib import Path

from megatron_jq.checkpoint.export import export_hf_tensors
from megatron_jq.config import Config
from megatron_jq.config_validate import Derived
from megatron_jq.data.sampler import InOrder, PromptSampler
from megatron_jq.evaluate.reward import reward_of
from megatron_jq.objective.schedule import QSchedule
from megatron_jq.parallel.runtime import Runtime, on_all_ranks
from megatron_jq.rollout.checked import CheckedEngine
from megatron_jq.rollout.engine import EngineSetup
from megatron_jq.rollout.engines import engine_row
from megatron_jq.train.build import Parts, build
from megatron_jq.train.clipped_learner import ClippedLearner
from megatron_jq.train.estimators import Estimator
from megatron_jq.train.failures import Phase
from megatron_jq.train.imitation import Imitation
from megatron_jq.train.learner import Learner, OnPolicyLearner
from megatron_jq.train.loop import Loop
from megatron_jq.train.numerics import Numerics
from megatron_jq.train.passes import BatchOptions
from megatron_jq.train.recorder import Log
from megatron_jq.train.reference import Reference
from megatron_jq.train.setup import DataSets
from megatron_jq.train.stages import Stages
from megatron_jq.train.trainer import Trainer


def assemble(
    config: Config,
    derived: Derived,
    data: DataSets,
    runtime: Runtime,
    phase: Phase | None = None,
    parts: Parts | None = None,
) -> Loop:
    """Return the run's loop; every rank calls it. parts: built for this config already."""
    o, c, phase, log = config.objective, config.training, phase or Phase(), Log()
    if parts is None:
        vocab_size = derived.architecture.vocab_size or data.tokenizer.vocab_size
        parts = build(config, derived.architecture, vocab_size, runtime)
    setup = EngineSetup(config, runtime, parts.policies, parts.options.vocab_size)
    numerics = Numerics(config, parts.model, parts.optimizer, runtime, log)
    pretrains = o.row.pretrains  # the corpus has its own order, as long as the run
    row_tokens = len(data.train[0].answer_ids) if pretrains else 1
    estimator = Estimator.of(config, derived, row_tokens)
    options = batch_options(config, data.tokenizer.eos_id, imitates=estimator.imitates)
    reference = Reference(config, derived, parts.options, runtime) if o.grpo_kl_beta > 0 else None
    trained = replace(options, tempered_answers=estimator.samples_answers)
    B = config.rollout.prompts_per_step
    kind = Imitation if estimator.imitates else Trainer
    return kind(
        config=config,
        data=data,
        parts=parts,
        estimator=estimator,
        q_schedule=_q_schedule(config, derived),
        sampler=InOrder(B) if pretrains else PromptSampler(len(data.train), B, c.seed),
        score_options=options,
        train_options=trained,
        engine=CheckedEngine(engine_row(config), setup),
        named_weights=lambda: export_hf_tensors(parts.policies, runtime, derived.architecture, everywhere=True),
        learner=_learner(config, parts, numerics, reference, runtime, trained),
        reference=reference,
        numerics=numerics,
        reward=on_all_ranks(runtime, lambda: reward_of(config)),
        runtime=runtime,
        stage=Stages(phase, runtime, Path(c.run_dir)),
        log=log,
    )


def batch_options(config: Config, eos_id: int, *, imitates: bool) -> BatchOptions:
    """How the run's passes cut and score sequences. imitates: what is scored was not drawn from the policy."""
    c, r, d = config.training, config.rollout, config.data
    pretrains = config.objective.row.pretrains
    return BatchOptions(
        micro_batch_size=c.micro_batch_size,
        max_tokens=c.max_tokens_per_micro_batch,
        temperature=1.0 if imitates else r.temperature,
        top_p=1.0 if imitates else r.top_p,
        sequence_multiple=c.pad_sequences_to_multiple_of,
        share_prompts=c.share_prompts == "auto" and not pretrains,  # a row is a prompt of its own
        mask_loss_after_id=eos_id if d.eod_mask_loss else None,
        document_end_id=eos_id if d.reset_attention_mask else None,
    )


def _q_schedule(config: Config, derived: Derived) -> QSchedule:
    o = config.objective
    if o.q_schedule == "constant":
        return QSchedule(o.q_schedule, o.q, None, None)
    return QSchedule(o.q_schedule, o.q, o.q_final, derived.q_schedule_iters)


def _learner(
    config: Config,
    parts: Parts,
    numerics: Numerics,
    reference: Reference | None,
    runtime: Runtime,
    options: BatchOptions,
) -> Learner:
    o = config.objective
    learner = OnPolicyLearner(parts.model, parts.optimizer, parts.schedule, numerics, runtime, options)
    if o.grpo_iterations == 1 and reference is None:
        return learner
    return ClippedLearner(
        **vars(learner),
        reference=None if reference is None else reference.model,
        iterations=o.grpo_iterations,
        lower=o.grpo_clamp_eps_lower,
        upper=o.grpo_clamp_eps_upper,
    )
