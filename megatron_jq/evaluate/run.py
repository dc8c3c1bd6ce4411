"""F4: `megatron-jq evaluate` from the process group to the results."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_jq.architecture import Architecture
from megatron_jq.checkpoint.convert import architecture_of
from megatron_jq.checkpoint.store import Found, load_weights
from megatron_jq.config import Config
from megatron_jq.config_reads import refuse_unread, unread_note
from megatron_jq.config_validate import validate
from megatron_jq.data.prompts import fingerprint
from megatron_jq.data.tokenizers import Tokenizer
from megatron_jq.errors import UserError
from megatron_jq.evaluate.judging import Interval, judge_of, read_metrics
from megatron_jq.evaluate.loop import fill
from megatron_jq.evaluate.report import conclude, make_folder
from megatron_jq.evaluate.reward import Reward, reward_of
from megatron_jq.evaluate.samples import Header, SampleFile, read_samples
from megatron_jq.evaluate.subject import (
    HeldOut,
    at_first_sight,
    checkpoint_to_evaluate,
    digest_of,
    heldout_examples,
    settings_of,
    tokenizer_of,
    unasked_reward,
)
from megatron_jq.model.build import build_options, build_policies
from megatron_jq.parallel import runtime as runtime_module
from megatron_jq.parallel.runtime import Runtime, on_all_ranks
from megatron_jq.rollout.engine import SamplingOptions
from megatron_jq.rollout.megatron import MegatronEngine
from megatron_jq.seeds import evaluation_seed

SAMPLES = "samples.jsonl"
#: Its name in config_reads.
COMMAND = "evaluate"


@dataclass(frozen=True)
class Order:
    """What the command's own flags say. metrics None: pass@1, pass@n, maj@n."""

    load: Path | None
    hf: Path | None
    output: Path
    metrics: str | None
    resamples: int
    confidence: float
    flags: frozenset[str] = frozenset()  # settings that the command line names


@dataclass(frozen=True)
class Subject:
    """Everything of an evaluation that every rank knows before weights are loaded."""

    config: Config
    architecture: Architecture
    tokenizer: Tokenizer
    heldout: HeldOut
    header: Header
    reward: Reward | None


def evaluate_policy(order: Order, settle: Callable[[Config], Config], enter: Callable[[str], None]) -> None:
    """Evaluate a checkpoint or Hugging Face folder at this job's layout; all ranks call it.

    settle: puts the flags on top of the checkpoint's settings. enter: told what this process does. UserError on every
    rank for bad input.
    """
    # Before there is a process group, so that a layout that cannot be is refused by its flag.
    base, architecture = at_first_sight(order.load, order.hf)
    config = settle(base)
    validate(config, runtime_module.world_size_from_environment(), architecture)
    refuse_unread(COMMAND, config, architecture, order.flags)
    runtime = runtime_module.start_configured(config.parallel, config.training.seed)
    on_all_ranks(runtime, lambda: make_folder(order.output), main_only=True)
    found = checkpoint_to_evaluate(order.load, order.hf, runtime)
    if runtime.is_main:
        print(f"evaluates the weights of {found.description}", flush=True)
    subject = on_all_ranks(runtime, lambda: _subject(order, found, settle, runtime))
    # Before the weights: a folder that holds another evaluation is refused in a second.
    file = on_all_ranks(runtime, lambda: _open(order.output / SAMPLES, subject), main_only=True)
    enter("loading weights")
    engine = _engine(subject, found, runtime)
    _generate(file, engine, subject, runtime, enter)
    enter("results")
    on_all_ranks(runtime, lambda: _conclude(order, subject), main_only=True)
    runtime_module.stop()


def _subject(order: Order, found: Found, settle: Callable[[Config], Config], runtime: Runtime) -> Subject:
    config, architecture = settle(settings_of(found)), architecture_of(found.manifest)
    validate(config, runtime.world_size, architecture)
    read_metrics(order.metrics, config.training.eval_samples)
    Interval(order.resamples, order.confidence, config.training.seed).check()
    note = unread_note(COMMAND, config, architecture, order.flags, settings_of(found))
    if note is not None and runtime.is_main:
        print(note, flush=True)
    reward = reward_of(config)
    if (unasked := unasked_reward(config, found)) is not None and runtime.is_main:
        print(unasked, flush=True)
    tokenizer = tokenizer_of(config, found, architecture)
    heldout = heldout_examples(config, found, tokenizer, architecture)
    if heldout.warning and runtime.is_main:
        print(heldout.warning, flush=True)
    t, judge = config.training, judge_of(config.training, heldout.data_format)
    header = Header(
        source=str(order.hf or found.folder),
        data_source=heldout.source,
        data_format=heldout.data_format,
        weights=digest_of(found.manifest),
        data=fingerprint(heldout.examples),
        checkpoint_step=found.manifest.step,
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
    )
    return Subject(config, architecture, tokenizer, heldout, header, reward)


def _open(path: Path, subject: Subject) -> SampleFile:
    try:
        return SampleFile(path, subject.header)
    except OSError as fault:
        raise UserError(f"--output: {path} cannot be written: {fault.strerror}; name another folder") from fault


def _engine(subject: Subject, found: Found, runtime: Runtime) -> MegatronEngine:
    config, bf16 = subject.config, subject.config.model.bf16
    options = build_options(config, subject.architecture.vocab_size)
    policies = build_policies(subject.architecture, options, runtime)
    if bf16:
        policies = [policy.bfloat16() for policy in policies]  # as Megatron-core's mixed-precision wrapper does
    load_weights(found, policies, runtime)
    return MegatronEngine(policies, runtime, max_rows=config.rollout.rollout_batch_size)


def _generate(
    file: SampleFile | None,
    engine: MegatronEngine,
    subject: Subject,
    runtime: Runtime,
    enter: Callable[[str], None],
) -> None:
    config, header, tokenizer = subject.config, subject.header, subject.tokenizer
    options = SamplingOptions(
        rationale_budget=header.rationale_budget,
        answer_budget=header.answer_budget,
        temperature=header.temperature,
        top_p=header.top_p,
        close_id=tokenizer.think_close_id,
        eos_id=tokenizer.eos_id,
        # The run that wrote the checkpoint evaluated it with these: the same samples come again.
        seed=evaluation_seed(header.seed),
        step=max(0, header.checkpoint_step - 1),
    )
    fill(
        file,
        engine,
        subject.heldout.examples,
        tokenizer,
        runtime,
        options,
        num_samples=header.num_samples,
        judge=header.judge,
        reward=subject.reward,
        rows=config.rollout.rollout_batch_size,
        enter=enter,
    )
    if file is not None:
        file.close()


def _conclude(order: Order, subject: Subject) -> None:
    interval = Interval(order.resamples, order.confidence, subject.header.seed)
    header, prompts = read_samples(order.output / SAMPLES)
    conclude(header, prompts, header.judge, order.metrics, interval, order.output)
    print(f"samples and results: {order.output}")
