"""F4: `megatron-jq generate`: what a policy writes for a prompt, by the functions that evaluate it."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from megatron_jq.architecture import Architecture
from megatron_jq.checkpoint.convert import architecture_of
from megatron_jq.checkpoint.loader import Checkpoint
from megatron_jq.config import Config
from megatron_jq.config_reads import refuse_unread
from megatron_jq.config_validate import validate
from megatron_jq.data.dataset import Source
from megatron_jq.data.prompts import Placed
from megatron_jq.data.reading import Reading, encode_reading, read_source
from megatron_jq.data.tokenizers import Tokenizer
from megatron_jq.errors import UserError
from megatron_jq.evaluate.drawing import draw
from megatron_jq.evaluate.inputs import checkpoint_to_evaluate, first_settings, settings_of, tokenizer_of
from megatron_jq.evaluate.judging import Judge, judge_of, log_p_of_prompts
from megatron_jq.evaluate.loop import ROWS_A_BLOCK, samples_of
from megatron_jq.evaluate.run import load_engine, sampling_options
from megatron_jq.evaluate.writing import GeneratedSample, TokenStream, generated, line_of, text_of_sample
from megatron_jq.formats.pair import Pair
from megatron_jq.parallel import runtime as runtime_module
from megatron_jq.parallel.runtime import Runtime, on_all_ranks
from megatron_jq.records import Example
from megatron_jq.rollout.engine import SamplingOptions, request_for
from megatron_jq.rollout.megatron import MegatronEngine

#: Its name in config_reads.
COMMAND = "generate"
#: Most tokens of an answer, where neither --answer-budget nor the checkpoint nor a gold answer says.
ANSWER_TOKENS = 64


@dataclass(frozen=True)
class GenerateArgs:
    """What the command's own flags say. prompt, prompts None: standard input's lines are the prompts."""

    load: Path | None
    hf: Path | None
    prompt: str | None
    prompts: Path | None
    gold: str | None
    as_json: bool
    flags: frozenset[str] = frozenset()  # settings that the command line names


@dataclass(frozen=True)
class GenerateJob:
    """Everything that every rank knows before weights are loaded. is_scored: whether there are gold answers."""

    config: Config
    architecture: Architecture
    tokenizer: Tokenizer
    examples: tuple[Example, ...]
    is_scored: bool
    judge: Judge
    options: SamplingOptions


def generate(args: GenerateArgs, apply_flags: Callable[[Config], Config], enter_phase: Callable[[str], None]) -> None:
    """Sample and print; all ranks call it, the main one prints. See evaluate_policy for the parameters.

    UserError on every rank for bad input.
    """
    base, architecture = first_settings(args.load, args.hf)
    config = apply_flags(base)
    validate(config, runtime_module.world_size_from_environment(), architecture)
    refuse_unread(COMMAND, config, architecture, args.flags)
    runtime = runtime_module.start_configured(config.parallel, config.training.seed)
    lines = [on_all_ranks(runtime, lambda: _typed_prompts(args), main_only=True)]
    dist.broadcast_object_list(lines, src=0)
    checkpoint = checkpoint_to_evaluate(args.load, args.hf, runtime)
    job = on_all_ranks(runtime, lambda: _job(args, lines[0], checkpoint, apply_flags, runtime))
    if runtime.is_main:
        _note(_heading(job, checkpoint))
    enter_phase("loading weights")
    engine = load_engine(job.config, job.architecture, checkpoint, runtime)
    enter_phase("generation")
    if len(job.examples) == 1 and not args.as_json and runtime.groups.dp.size() == 1:
        _stream(engine, job, runtime)
    else:
        for prompt, samples in _blocks(engine, job, runtime):
            if runtime.is_main:
                _print_prompt(job, prompt, samples, as_json=args.as_json)
    runtime_module.stop()


def _note(line: str) -> None:
    """For people: standard output is for what was generated."""
    print(line, file=sys.stderr, flush=True)


def _typed_prompts(args: GenerateArgs) -> list[str] | None:
    """The prompts of --prompt, a text file or standard input; None for a file of records."""
    if args.prompt is not None:
        return [args.prompt]
    if args.prompts is not None and args.prompts.suffix != ".txt":
        return None
    try:
        text = sys.stdin.read() if args.prompts is None else args.prompts.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        origin = "standard input" if args.prompts is None else f"--prompts {args.prompts}"
        raise UserError(f"{origin} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise UserError(
            f"--prompts {args.prompts} holds no prompt; write one per line"
            if args.prompts is not None
            else "no prompt: give --prompt TEXT, --prompts FILE, or a prompt per line on standard input"
        )
    return lines


def _reading(args: GenerateArgs, typed: list[str] | None, config: Config) -> Reading:
    if typed is None:
        return read_source(config, str(args.prompts), "heldout", "--prompts", count=config.data.eval_examples)
    origin = "--prompt" if args.prompt is not None else f"--prompts {args.prompts}" if args.prompts else "stdin"
    # Without a gold answer the prompt stands in its place until it is encoded (_job): the tokenizer can read it. A
    # prompt that is typed is a user's message to a chat file's template.
    places = [origin if len(typed) == 1 else f"{origin}:{n}" for n in range(1, len(typed) + 1)]
    pairs = tuple(
        Pair(line, line if args.gold is None else args.gold, place, parts=(("user", line), ("system", "")))
        for line, place in zip(typed, places, strict=True)
    )
    data_format = "jsonl" if config.data.data_format == "auto" else config.data.data_format
    return Reading(origin, Source(pairs, data_format, len(pairs)), None)


def _job(
    args: GenerateArgs,
    typed: list[str] | None,
    checkpoint: Checkpoint,
    apply_flags: Callable[[Config], Config],
    runtime: Runtime,
) -> GenerateJob:
    config, architecture = apply_flags(settings_of(checkpoint)), architecture_of(checkpoint.manifest)
    validate(config, runtime.world_size, architecture)
    tokenizer = tokenizer_of(config, checkpoint, architecture)
    reading = _reading(args, typed, config)
    encoded = encode_reading(config, reading, tokenizer)
    if encoded.remarks and runtime.is_main:
        _note(f"warning: {reading.label}: {'; '.join(encoded.remarks)}")
    is_scored = typed is None or args.gold is not None
    longest = max((len(entry.example.answer_ids) for entry in encoded.placed), default=0) if is_scored else 0
    answer_budget = config.rollout.answer_budget or max(ANSWER_TOKENS, longest)
    _check_room(encoded.placed, config, architecture, max(answer_budget, longest))
    examples = tuple(entry.example for entry in encoded.placed)
    if not is_scored:
        examples = tuple(replace(example, answer_text="", answer_ids=()) for example in examples)
    options = sampling_options(config, tokenizer, checkpoint.manifest.step, answer_budget)
    judge = judge_of(config.training, reading.data_format)
    return GenerateJob(config, architecture, tokenizer, examples, is_scored, judge, options)


def _check_room(placed: Sequence[Placed], config: Config, architecture: Architecture, answer_tokens: int) -> None:
    """UserError for a prompt that leaves no room in the model's context for what is to be sampled."""
    budget, context = config.rollout.rationale_budget, architecture.max_position_embeddings
    for entry in placed:
        prompt, bridge = len(entry.example.prompt_ids), len(entry.example.bridge_ids)
        if prompt + budget + 1 + bridge + answer_tokens > context:
            raise UserError(
                f"{entry.place} has {prompt} tokens: with --rationale-budget {budget} and {answer_tokens} answer "
                f"tokens it exceeds the model's context of {context}; shorten it, or lower --rationale-budget or "
                "--answer-budget"
            )


def _heading(job: GenerateJob, checkpoint: Checkpoint) -> str:
    o, t = job.options, job.config.training
    drawn = "greedy" if o.temperature == 0 else f"temperature {o.temperature:g}, seed {t.seed}"
    nucleus = f", top-p {o.top_p:g}" if o.temperature and o.top_p < 1 else ""
    return (
        f"{checkpoint.description}: {len(job.examples)} prompt(s) x {t.eval_samples} sample(s), {drawn}{nucleus}, "
        f"prompt style {job.config.data.prompt_style}, up to {o.rationale_budget} + {o.answer_budget} tokens"
    )


def _stream(engine: MegatronEngine, job: GenerateJob, runtime: Runtime) -> None:
    """The samples of one prompt, one after another, each token by token. Slots key the draws, as in one batch."""
    stream = TokenStream(job.tokenizer, job.options) if runtime.is_main else None
    engine.on_token = stream
    log_w = []
    for m in range(job.config.training.eval_samples):
        if stream is not None:
            stream.begin(m if job.config.training.eval_samples > 1 else None)
        [rollout] = engine.generate([request_for(job.examples[0], 0, (m,), score=job.is_scored)], job.options)
        sample = _checked(job, [rollout])[0]
        if stream is not None:
            stream.end(sample)
        log_w.append(sample.log_w)
    if job.is_scored and len(log_w) > 1 and runtime.is_main:
        _print_log_p(log_w)


def _blocks(engine: MegatronEngine, job: GenerateJob, runtime: Runtime) -> Iterator[tuple[int, list[GeneratedSample]]]:
    """(prompt, its samples), as they come."""
    n = job.config.training.eval_samples
    rows = job.config.rollout.rollout_batch_size or ROWS_A_BLOCK
    block = max(1, rows * runtime.groups.dp.size() // n)
    for first in range(0, len(job.examples), block):
        examples = job.examples[first : first + block]
        drawn = draw(engine, examples, runtime, job.options, num_samples=n, first=first, score=job.is_scored)
        samples = _checked(job, drawn)
        for b in range(len(examples)):
            yield first + b, samples[b * n : (b + 1) * n]


def _checked(job: GenerateJob, rollouts: Sequence) -> list[GeneratedSample]:
    """UserError where ln p(y*|x,z) is not finite."""
    scored = samples_of(rollouts, job.examples, job.tokenizer, job.judge) if job.is_scored else [None] * len(rollouts)
    return [
        generated(rollout, sample, job.tokenizer, job.options) for rollout, sample in zip(rollouts, scored, strict=True)
    ]


def _print_prompt(job: GenerateJob, prompt: int, samples: list[GeneratedSample], *, as_json: bool) -> None:
    example = job.examples[prompt]
    log_w = [sample.log_w for sample in samples]
    log_p = log_p_of_prompts([log_w])[0] if job.is_scored else None
    if as_json:
        for sample in samples:
            print(json.dumps(line_of(sample, example, log_p), ensure_ascii=False), flush=True)
        return
    print(f"prompt {prompt + 1} of {len(job.examples)}: {example.prompt_text}")
    for sample in samples:
        if len(samples) > 1:
            print(f"sample {sample.sample + 1}")
        print(text_of_sample(sample))
    if job.is_scored and len(samples) > 1:
        _print_log_p(log_w)
    print(flush=True)


def _print_log_p(log_w: Sequence[float]) -> None:
    print(f"ln P̂ {log_p_of_prompts([log_w])[0]:.4f} over {len(log_w)} samples", flush=True)
