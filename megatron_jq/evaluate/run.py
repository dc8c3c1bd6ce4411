"""F4: `megatron-jq evaluate` from the process group to the results."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_jq.architecture import Architecture
from megatron_jq.checkpoint.convert import architecture_of
from megatron_jq.checkpoint.loader import Checkpoint, load_weights
from megatron_jq.config import Config
from megatron_jq.config_reads import refuse_unread, unread_note
from megatron_jq.config_validate import validate
from megatron_jq.data.prompts import fingerprint
from megatron_jq.data.tokenizers import Tokenizer
from megatron_jq.errors import UserError
from megatron_jq.evaluate.inputs import (
    HeldOut,
    checkpoint_to_evaluate,
    digest_of,
    first_settings,
    heldout_examples,
    reward_note,
    settings_of,
    tokenizer_of,
)
from megatron_jq.evaluate.judging import Interval, judge_of, read_metrics
from megatron_jq.evaluate.loop import sample_into
from megatron_jq.evaluate.report import make_folder, write_results
from megatron_jq.evaluate.reward import Reward, reward_of
from megatron_jq.evaluate.samples import Header, SampleFile, read_samples
from megatron_jq.parallel import runtime as runtime_module
from megatron_jq.parallel.runtime import Runtime, on_all_ranks
from megatron_jq.rollout.build import build_sampler
from megatron_jq.rollout.engine import SamplingOptions
from megatron_jq.rollout.megatron import MegatronEngine
from megatron_jq.seeds import evaluation_seed

SAMPLES = "samples.jsonl"
#: Its name in config_reads.
COMMAND = "evaluate"


@dataclass(frozen=True)
class EvaluateArgs:
    """What the command's own flags say. metrics None: pass@1, pass@n, maj@n."""

    load: Path | None
    hf: Path | None
    output: Path
    metrics: str | None
    resamples: int
    confidence: float
    flags: frozenset[str] = frozenset()  # settings that the command line names


@dataclass(frozen=True)
class EvaluationJob:
    """Everything of an evaluation that every rank knows before weights are loaded."""

    config: Config
    architecture: Architecture
    tokenizer: Tokenizer
    heldout: HeldOut
    header: Header
    reward: Reward | None


def evaluate_policy(
    args: EvaluateArgs, apply_flags: Callable[[Config], Config], enter_phase: Callable[[str], None]
) -> None:
    """Evaluate a checkpoint or Hugging Face folder at this job's layout; all ranks call it.

    apply_flags: puts the flags on top of the checkpoint's settings. enter_phase: called with what this process does
    next. UserError on every rank for bad input.
    """
    # Before there is a process group, so that a layout that cannot be is refused by its flag.
    base, architecture = first_settings(args.load, args.hf)
    config = apply_flags(base)
    validate(config, runtime_module.world_size_from_environment(), architecture)
    refuse_unread(COMMAND, config, architecture, args.flags)
    runtime = runtime_module.start_configured(config.parallel, config.training.seed)
    on_all_ranks(runtime, lambda: make_folder(args.output), main_only=True)
    checkpoint = checkpoint_to_evaluate(args.load, args.hf, runtime)
    if runtime.is_main:
        print(f"evaluates the weights of {checkpoint.description}", flush=True)
    job = on_all_ranks(runtime, lambda: _job(args, checkpoint, apply_flags, runtime))
    # Before the weights: a folder that holds another evaluation is refused in a second.
    file = on_all_ranks(runtime, lambda: _open(args.output / SAMPLES, job), main_only=True)
    enter_phase("loading weights")
    engine = load_engine(job.config, job.architecture, checkpoint, runtime)
    _generate(file, engine, job, runtime, enter_phase)
    enter_phase("results")
    on_all_ranks(runtime, lambda: _write_results(args, job), main_only=True)
    runtime_module.stop()


def _job(
    args: EvaluateArgs, checkpoint: Checkpoint, apply_flags: Callable[[Config], Config], runtime: Runtime
) -> EvaluationJob:
    config, architecture = apply_flags(settings_of(checkpoint)), architecture_of(checkpoint.manifest)
    validate(config, runtime.world_size, architecture)
    read_metrics(args.metrics, config.training.eval_samples)
    Interval(args.resamples, args.confidence, config.training.seed).check()
    note = unread_note(COMMAND, config, architecture, args.flags, settings_of(checkpoint))
    if note is not None and runtime.is_main:
        print(note, flush=True)
    reward = reward_of(config)
    if (note := reward_note(config, checkpoint)) is not None and runtime.is_main:
        print(note, flush=True)
    tokenizer = tokenizer_of(config, checkpoint, architecture)
    heldout = heldout_examples(config, checkpoint, tokenizer, architecture)
    if heldout.warning and runtime.is_main:
        print(heldout.warning, flush=True)
    t, judge = config.training, judge_of(config.training, heldout.data_format)
    header = Header(
        source=str(args.hf or checkpoint.folder),
        data_source=heldout.source,
        data_format=heldout.data_format,
        weights=digest_of(checkpoint.manifest),
        data=fingerprint(heldout.examples),
        checkpoint_step=checkpoint.manifest.step,
        dtype=config.model.params_dtype,
        num_prompts=len(heldout.examples),
        num_samples=t.eval_samples,
        temperature=t.eval_temperature,
        top_p=t.eval_top_p,
        seed=t.seed,
        rationale_budget=config.rollout.rationale_budget,
        answer_budget=heldout.answer_budget,
        match=judge.match,
        rule=judge.rule,
        answer_extract=judge.extract,
        reward=t.reward,
        num_available=heldout.total,
        think_close=tokenizer.think_close,
    )
    return EvaluationJob(config, architecture, tokenizer, heldout, header, reward)


def _open(path: Path, job: EvaluationJob) -> SampleFile:
    try:
        return SampleFile(path, job.header)
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written: {error.strerror}; name another folder") from error


def load_engine(config: Config, architecture: Architecture, checkpoint: Checkpoint, runtime: Runtime) -> MegatronEngine:
    """An engine with the checkpoint's weights at this job's layout; all ranks call it."""
    sampler = build_sampler(config, architecture, architecture.vocab_size, runtime)
    if config.model.bf16:
        for policy in sampler.policies:
            policy.bfloat16()  # as Megatron-core's mixed-precision wrapper does
    load_weights(checkpoint, sampler.policies, runtime)
    return sampler.engine


def sampling_options(config: Config, tokenizer: Tokenizer, step: int, answer_budget: int) -> SamplingOptions:
    """How a checkpoint of `step` is sampled. The run that wrote it evaluated it so: the same samples come again."""
    t = config.training
    return SamplingOptions(
        rationale_budget=config.rollout.rationale_budget,
        answer_budget=answer_budget,
        temperature=t.eval_temperature,
        top_p=t.eval_top_p,
        close_id=tokenizer.think_close_id,
        eos_id=tokenizer.eos_id,
        seed=evaluation_seed(t.seed),
        step=max(0, step - 1),
    )


def _generate(
    file: SampleFile | None,
    engine: MegatronEngine,
    job: EvaluationJob,
    runtime: Runtime,
    enter_phase: Callable[[str], None],
) -> None:
    config, header, tokenizer = job.config, job.header, job.tokenizer
    options = sampling_options(config, tokenizer, header.checkpoint_step, header.answer_budget)
    sample_into(
        file,
        engine,
        job.heldout.examples,
        tokenizer,
        runtime,
        options,
        num_samples=header.num_samples,
        judge=header.judge,
        reward=job.reward,
        rows=config.rollout.rollout_batch_size,
        enter=enter_phase,
    )
    if file is not None:
        file.close()


def _write_results(args: EvaluateArgs, job: EvaluationJob) -> None:
    interval = Interval(args.resamples, args.confidence, job.header.seed)
    header, prompts = read_samples(args.output / SAMPLES)
    write_results(header, prompts, header.judge, args.metrics, interval, args.output)
    print(f"samples and results: {args.output}")
