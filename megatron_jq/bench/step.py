"""F4: the trainer's step on random weights and random tokens, phase by phase under the instruments.

Every rationale is as long as asked for, whatever is drawn: the close and end token is a padding row of the vocabulary,
which the sampler gives probability zero. So each rationale spends its whole budget and is then closed by force.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_jq.architecture import padded_vocab_size
from megatron_jq.bench.copies import CopyingEngine
from megatron_jq.bench.figures import (
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
from megatron_jq.model.build import build_options, build_policies, wrap_for_training
from megatron_jq.objective.table import StepTable
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.records import Example, Rollout, TrainingSequence
from megatron_jq.rollout.engine import RolloutRequest, SamplingOptions, requests_of_replica
from megatron_jq.rollout.megatron import MegatronEngine
from megatron_jq.seeds import short_seed
from megatron_jq.train import passes
from megatron_jq.train.estimators import Estimator
from megatron_jq.train.optimizer import build_optimizer, build_schedule, clip_and_step, gradient_norm
from megatron_jq.train.rollouts import sequences_of

#: Runs one phase's work, given its name, and returns the work's result.
Observer = Callable[[str, Callable[[], Any]], Any]


class StepBench:
    """One process of a benchmark."""

    def __init__(self, config: Config, derived: Derived, load: Load, runtime: Runtime):
        self.config, self.derived, self.load, self.runtime = config, derived, load, runtime
        r, t = config.rollout, config.training
        tp = config.parallel.tensor_model_parallel_size
        self.vocab_rows = padded_vocab_size(load.vocab_size, config.model.make_vocab_size_divisible_by, tp)
        # Where the vocabulary fills all rows, its last token is made a padding row.
        self.unsampled_id = min(load.vocab_size, self.vocab_rows - 1)
        options = build_options(config, self.unsampled_id)
        policies = build_policies(derived.architecture, options, runtime)
        self.params_dtype = options.params_dtype
        self.model = wrap_for_training(policies, options, runtime)
        self.optimizer = build_optimizer(self.model, config, runtime)
        self.schedule = build_schedule(self.optimizer, config)
        engine = CopyingEngine if load.copied_prompts else MegatronEngine
        self.engine = engine(policies, runtime, max_rows=r.rollout_batch_size)
        self.estimator = Estimator.of(config, derived)
        self.score_with_rollout = r.score_with == "rollout"
        self.batch_options = passes.BatchOptions(
            micro_batch_size=t.micro_batch_size,
            max_tokens=t.max_tokens_per_micro_batch,
            temperature=r.temperature,
            top_p=r.top_p,
            sequence_multiple=t.pad_sequences_to_multiple_of,
            share_prompts=t.share_prompts == "auto",
        )
        self.prompts = random_examples(load, r.prompts_per_step, self.unsampled_id, t.seed)
        self.meter = Meter(policies[0], runtime)

    def run(self) -> BenchReport | None:
        """Warm up, time the steps, examine one more. Rank 0 gets the report."""
        groups, load = self.runtime.groups, self.load
        stands_for_replica = groups.tp.rank() == 0 and groups.pp.rank() == 0
        record = RankRecord(stands_for_replica, self.meter.memory.baseline)

        def timed(phase, work):
            result, seconds = self.meter.time(work)
            record.seconds[phase].append(seconds)
            return result

        def examined(phase, work):
            result, record.findings[phase] = self.meter.examine(work)
            return result

        observers: list[Observer] = [lambda phase, work: work()] * load.warmup + [timed] * load.steps + [examined]
        before = self._gemm_rate()
        for step, observer in enumerate(observers):
            self._step(step, observer)
        record.cache_bytes = self.engine.cache_bytes_peak
        record.gemm_flop_per_second = max(before, self._gemm_rate())  # the less disturbed of the two
        records: list[RankRecord | None] = [None] * self.runtime.world_size
        dist.all_gather_object(records, record)
        return self._report(records) if self.runtime.is_main else None

    def _gemm_rate(self) -> float:
        self.meter.together()
        return gemm_rate(self.params_dtype, self.runtime.device)

    def _step(self, step: int, observe: Observer) -> None:
        rollouts = observe("rollout", lambda: self.engine.generate(self._requests(), self._sampling(step)))
        assert all(r.num_sampled == self.load.rationale_tokens for r in rollouts), "a padding row was sampled"
        sequences = sequences_of(rollouts, self.prompts, gold=True)
        scores = observe("score", lambda: self._score(rollouts, sequences))
        observe("train", lambda: self._train(step, sequences, scores))

    def _score(self, rollouts: list[Rollout], sequences: list[TrainingSequence]) -> passes.Scores:
        shape = (len(self.prompts), self.config.rollout.num_rationales)
        if self.score_with_rollout:
            return passes.scores_of_rollouts(rollouts, shape, self.runtime)
        return passes.score(self.model, sequences, shape, self.runtime, self.batch_options)

    def _train(self, step: int, sequences: list[TrainingSequence], scores: passes.Scores) -> None:
        """Coefficients, forward and backward pass, update."""
        table = StepTable(scores.log_answer_BM, scores.present_BM)
        coefficients = self.estimator.coefficients(table, q=self.config.objective.q, step=step)
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        passes.train(self.model, sequences, coefficients, self.runtime, self.batch_options)
        with self.runtime.megatron():
            self.schedule.step(increment=1)
            self.optimizer.prepare_grads()
            clip_and_step(self.optimizer, self.config, norm=gradient_norm(self.optimizer))

    def _requests(self) -> list[RolloutRequest]:
        count, dp = self.config.rollout.num_rationales, self.runtime.groups.dp
        return requests_of_replica(self.prompts, count, dp.rank(), dp.size(), score=self.score_with_rollout)

    def _sampling(self, step: int) -> SamplingOptions:
        r = self.config.rollout
        return SamplingOptions(
            rationale_budget=self.load.rationale_tokens,
            answer_budget=0,
            temperature=r.temperature,
            top_p=r.top_p,
            close_id=self.unsampled_id,
            eos_id=self.unsampled_id,
            seed=self.config.training.seed,
            step=step,
        )

    def _report(self, records: list[RankRecord]) -> BenchReport:
        m, p, r, load = self.config.model, self.config.parallel, self.config.rollout, self.load
        lengths = [len(example.prompt_ids) for example in self.prompts]
        needed = positions_needed(lengths, r.num_rationales, load, score_with_rollout=self.score_with_rollout)
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
            micro_batch_size=self.batch_options.micro_batch_size,
            max_tokens_per_micro_batch=self.batch_options.max_tokens,
            score_with=r.score_with,
            steps=load.steps,
            warmup=load.warmup,
            gemm_flop_per_second=sum(record.gemm_flop_per_second for record in records),
            baseline_memory_bytes=max(record.baseline_memory_bytes for record in records),
            copied_prompts=load.copied_prompts,
            share_prompts=self.batch_options.share_prompts,
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
