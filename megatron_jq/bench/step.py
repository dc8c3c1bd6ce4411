"""F4: the trainer's step on random weights and random tokens, phase by phase under the instruments.

Every rationale is as long as asked for, whatever is drawn: the close and end token is a padding row of the vocabulary,
which the sampler gives probability zero. So each rationale spends its whole budget and is then closed by force.
"""

import contextlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_jq.architecture import padded_vocab_size
from megatron_jq.bench.copies import CopyingEngine
from megatron_jq.bench.figures import (
    PHASES,
    BenchReport,
    Load,
    RankRecord,
    matrix_parameters,
    phase_figures,
    positions_needed,
)
from megatron_jq.bench.meters import Meter, gemm_rate
from megatron_jq.config import Config
from megatron_jq.config_validate import Derived
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.records import Example
from megatron_jq.rollout.megatron import MegatronEngine
from megatron_jq.seeds import short_seed
from megatron_jq.train.assemble import assemble
from megatron_jq.train.build import build
from megatron_jq.train.setup import DataSets
from megatron_jq.train.stages import Instrument


@dataclass(frozen=True)
class UnsampledEnd:
    """As much of a tokenizer as a step asks for: `end` closes rationales and answers, and is never drawn."""

    end: int

    @property
    def think_close_id(self) -> int:
        return self.end

    @property
    def eos_id(self) -> int:
        return self.end


@dataclass(frozen=True)
class EveryStep:
    """Samples the same prompts in every step."""

    count: int

    def batch(self, step: int) -> list[int]:
        """As PromptSampler.batch."""
        return list(range(self.count))


class StepBench:
    """One process of a benchmark."""

    def __init__(self, config: Config, derived: Derived, load: Load, runtime: Runtime):
        # No comparison of scores: with --score-with rollout a step's "score" is the engine's alone.
        asked = replace(config.rollout, rationale_budget=load.rationale_tokens, score_check_interval=0)
        config = replace(config, rollout=asked)
        self.config, self.derived, self.load, self.runtime = config, derived, load, runtime
        tp, count = config.parallel.tensor_model_parallel_size, config.rollout.prompts_per_step
        self.vocab_rows = padded_vocab_size(load.vocab_size, config.model.make_vocab_size_divisible_by, tp)
        # Where the vocabulary fills all rows, its last token is made a padding row.
        unsampled_id = min(load.vocab_size, self.vocab_rows - 1)
        self.prompts = random_examples(load, count, unsampled_id, config.training.seed)
        data = DataSets(UnsampledEnd(unsampled_id), self.prompts, (), 0, load.answer_tokens, Path("none"), "jsonl")
        engine = CopyingEngine if load.copied_prompts else MegatronEngine
        parts = build(config, derived.architecture, unsampled_id, runtime, engine=engine)
        self.loop = assemble(config, derived, data, runtime, parts=parts)
        self.loop.sampler, self.loop.engine = EveryStep(count), parts.engine
        self.params_dtype, self.engine = parts.options.params_dtype, parts.engine
        self.meter = Meter(parts.policies[0], runtime)

    def run(self) -> BenchReport | None:
        """Warm up, time the steps, examine one more. Rank 0 gets the report."""
        groups, load = self.runtime.groups, self.load
        stands_for_replica = groups.tp.rank() == 0 and groups.pp.rank() == 0
        record = RankRecord(stands_for_replica, self.meter.memory.baseline)
        before = self._gemm_rate()
        for step in range(load.warmup):
            self.step(step, lambda phase: contextlib.nullcontext())
        for step in range(load.warmup, load.warmup + load.steps):
            self.step(step, lambda phase: self.meter.time(record.seconds[phase].append))
        note = record.findings.__setitem__
        self.step(load.warmup + load.steps, lambda phase: self.meter.examine(partial(note, phase)))
        record.cache_bytes = self.engine.cache_bytes_peak
        record.gemm_flop_per_second = max(before, self._gemm_rate())  # the less disturbed of the two
        records: list[RankRecord | None] = [None] * self.runtime.world_size
        dist.all_gather_object(records, record)
        return self._report(records) if self.runtime.is_main else None

    def step(self, step: int, instrument: Instrument) -> None:
        """The trainer's own step, under an instrument for each of PHASES."""
        self.loop.stage.instrument = lambda name: instrument(name) if name in PHASES else contextlib.nullcontext()
        metrics = self.loop.step(step)
        assert metrics.forced_fraction == 1 and metrics.rationale_tokens_mean == self.load.rationale_tokens + 1, (
            "a padding row was sampled"
        )

    def _gemm_rate(self) -> float:
        self.meter.wait_for_all()
        return gemm_rate(self.params_dtype, self.runtime.device)

    def _report(self, records: list[RankRecord]) -> BenchReport:
        m, p, r, load = self.config.model, self.config.parallel, self.config.rollout, self.load
        lengths = [len(example.prompt_ids) for example in self.prompts]
        needed = positions_needed(lengths, r.num_rationales, load, score_with_rollout=r.score_with == "rollout")
        parameters = matrix_parameters(self.derived.architecture, self.vocab_rows)
        return BenchReport(
            model=m.model,
            params_dtype=m.params_dtype,
            layer_parameters=parameters[0],
            head_parameters=parameters[1],
            tensor_model_parallel_size=p.tensor_model_parallel_size,
            pipeline_model_parallel_size=p.pipeline_model_parallel_size,
            data_parallel_size=self.derived.data_parallel_size,
            sequence_parallel=p.sequence_parallel,
            device=self.runtime.device.type,
            threads_per_process=torch.get_num_threads(),
            prompts_per_step=r.prompts_per_step,
            num_rationales=r.num_rationales,
            prompt_lengths=lengths,
            rationale_tokens=load.rationale_tokens,
            answer_tokens=load.answer_tokens,
            micro_batch_size=self.loop.train_options.micro_batch_size,
            max_tokens_per_micro_batch=self.loop.train_options.max_tokens,
            score_with=r.score_with,
            steps=load.steps,
            warmup=load.warmup,
            gemm_flop_per_second=sum(record.gemm_flop_per_second for record in records),
            baseline_memory_bytes=max(record.baseline_memory_bytes for record in records),
            copied_prompts=load.copied_prompts,
            share_prompts=self.loop.train_options.share_prompts,
            cache_bytes=max(record.cache_bytes for record in records),
            phases=phase_figures(records, needed, parameters),
        )


def random_examples(load: Load, count: int, vocab_size: int, seed: int) -> list[Example]:
    """Prompts and answers of random tokens, alike on every rank."""
    generator = torch.Generator().manual_seed(short_seed(seed))

    def draw(low: int, high: int, size: int) -> tuple[int, ...]:
        return tuple(torch.randint(low, high, (size,), generator=generator).tolist())

    lengths = draw(load.prompt_low, load.prompt_high + 1, count)
    return [
        Example(i, "", "", draw(0, vocab_size, length), draw(0, vocab_size, load.answer_tokens))
        for i, length in enumerate(lengths)
    ]
