"""F4: the training loop. A step: sample prompts, roll out, score, coefficients, train, record."""

import gc
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from megatron_jq.checkpoint.export import export_hf_tensors
from megatron_jq.config import Config
from megatron_jq.config_estimators import schedule_notes
from megatron_jq.config_reads import unread_note
from megatron_jq.config_validate import Derived
from megatron_jq.data.sampler import InOrder, PromptSampler
from megatron_jq.errors import RunFailure, UserError
from megatron_jq.evaluate import Evaluation, evaluate
from megatron_jq.evaluate.judging import judge_of
from megatron_jq.evaluate.reward import reward_of
from megatron_jq.model.build import build_options, build_policies, wrap_for_training
from megatron_jq.objective.schedule import QSchedule, q_at
from megatron_jq.objective.table import StepTable
from megatron_jq.parallel.megatron import versions
from megatron_jq.parallel.runtime import Runtime, on_all_ranks
from megatron_jq.records import Coefficients, Rollout, StepMetrics, TrainingSequence
from megatron_jq.rollout.checked import CheckedEngine
from megatron_jq.rollout.engine import EngineSetup, RolloutRequest, SamplingOptions, requests_of_replica
from megatron_jq.rollout.engines import engine_row
from megatron_jq.rollout.megatron import MegatronEngine
from megatron_jq.seeds import evaluation_seed, rollout_seed
from megatron_jq.train import passes
from megatron_jq.train.estimators import Estimator
from megatron_jq.train.failures import Phase, non_finite
from megatron_jq.train.figures import Tables, step_metrics
from megatron_jq.train.mismatch import MismatchWatch
from megatron_jq.train.numerics import Numerics
from megatron_jq.train.optimizer import build_optimizer, build_schedule, learning_rate
from megatron_jq.train.pace import PaceMaker
from megatron_jq.train.pretraining import Batch, scored_tokens
from megatron_jq.train.recorder import Recorder, open_recorder, opening_line
from megatron_jq.train.reference import Reference
from megatron_jq.train.rollouts import rewards, sequences_of
from megatron_jq.train.saving import Saving
from megatron_jq.train.setup import DataSets
from megatron_jq.train.start_point import StartPoint
from megatron_jq.train.stopping import StopRequest
from megatron_jq.train.updates import Trained, Updates


class Trainer:
    """One process of a run. `run` reads like the algorithm; every tensor-sized decision lies in the rooms below.

    `phase` is told what the process does, for the errors of whoever watches it.
    """

    def __init__(self, config: Config, derived: Derived, data: DataSets, runtime: Runtime, phase: Phase | None = None):
        self.config, self.data, self.runtime, self.phase = config, data, runtime, phase or Phase()
        self.derived = derived
        c, o, r = config.training, config.objective, config.rollout
        pretrains = o.row.pretrains  # the corpus has its own order, as long as the run
        B = r.prompts_per_step
        self.sampler = InOrder(B) if pretrains else PromptSampler(len(data.train), B, c.seed)
        vocab_size = derived.architecture.vocab_size or data.tokenizer.vocab_size
        self.build_options = options = build_options(config, vocab_size)
        policies = build_policies(derived.architecture, options, runtime)
        self.model = wrap_for_training(policies, options, runtime)
        self.optimizer = build_optimizer(self.model, config, runtime)
        self.schedule = build_schedule(self.optimizer, config)
        self.numerics = Numerics(config, self.model, self.optimizer, runtime, self._say)
        self.evaluation_engine = MegatronEngine(policies, runtime, max_rows=r.rollout_batch_size)
        row_tokens = len(data.train[0].answer_ids) if pretrains else 1
        self.estimator = Estimator.of(config, derived, row_tokens)
        self.engine = CheckedEngine(engine_row(config), EngineSetup(config, runtime, policies, vocab_size))
        constant = o.q_schedule == "constant"
        self.q_schedule = QSchedule(
            o.q_schedule, o.q, None if constant else o.q_final, None if constant else derived.q_schedule_iters
        )
        self.score_options = passes.BatchOptions(
            micro_batch_size=c.micro_batch_size,
            max_tokens=c.max_tokens_per_micro_batch,
            temperature=1.0 if self.estimator.imitates else r.temperature,  # of what was sampled, and it was not
            top_p=1.0 if self.estimator.imitates else r.top_p,
            sequence_multiple=c.pad_sequences_to_multiple_of,
            share_prompts=c.share_prompts == "auto" and not pretrains,  # a row is a prompt of its own
            mask_loss_after_id=data.tokenizer.eos_id if config.data.eod_mask_loss else None,
            document_end_id=data.tokenizer.eos_id if config.data.reset_attention_mask else None,
        )
        self.train_options = replace(self.score_options, tempered_answers=self.estimator.samples_answers)
        self.reference = Reference(config, derived, options, runtime) if o.grpo_kl_beta > 0 else None
        self.reward = on_all_ranks(runtime, lambda: reward_of(config))
        self.pace = PaceMaker(runtime)
        self.mismatch = MismatchWatch(config, runtime, self._say)
        self.recorder: Recorder | None = None  # rank 0's, while it runs

    def run(self, beginning: StartPoint, saving: Saving, stop: StopRequest) -> None:
        """Steps to --train-iters, or to the end of the step in which `stop` receives a signal, with checkpoints."""
        t = self.config.training
        self.recorder = on_all_ranks(self.runtime, lambda: open_recorder(t, beginning), main_only=True)
        if self.recorder is not None:
            has_experts = self.model.config.num_moe_experts is not None
            given = (self.config, self.data, self.estimator, self.build_options, self.runtime)
            self.recorder.say(opening_line(*given, with_experts=has_experts))
            unread = unread_note("train", self.config, self.derived.architecture)
            for note in (unread, *schedule_notes(self.config), versions.deprecation_note()):
                if note is not None:
                    self.recorder.say(note)
        # What stands now stays: a full collection that walks through it costs a quarter of a second every so often.
        gc.collect()
        gc.freeze()
        try:
            for step in range(beginning.step, t.train_iters):
                metrics = self.step(step)
                if self.data.heldout and self._evaluation_due(step):
                    metrics = self._with_evaluation(metrics)
                if self.recorder is not None:
                    self.recorder.record(metrics)
                self.phase.enter(step, "checkpoint")
                if saving.between_steps(metrics, self.recorder, stop):
                    break
            saving.writer.wait()
        except (RunFailure, UserError):
            saving.end(self.recorder)
            raise
        finally:
            self.engine.close()
            if self.recorder is not None:
                self.recorder.close()  # TensorBoard's last events would be lost with a run that stops

    def step(self, step: int) -> StepMetrics:
        """prompts → rollouts → scores → coefficients → gradient → update. Alike on every rank."""
        self.phase.enter(step, "rollout")
        began = time.monotonic()
        q = q_at(step, self.q_schedule)
        prompts = Batch(self.data.train, self.sampler.batch(step))
        self.engine.update_weights(step, self._named_weights)
        rollouts = self.engine.generate(self._requests(prompts), self._sampling(step))
        rolled = time.monotonic()

        self.phase.enter(step, "score")
        gold = sequences_of(rollouts, prompts, gold=True)
        shape = (len(prompts), self.config.rollout.num_rationales)
        scores, mismatch = self._score(step, rollouts, gold, shape)
        log_w_BM, valid_BM = scores.log_answer_BM, scores.present_BM
        reward_BM = torch.zeros(shape)
        if self.estimator.samples_answers:
            reward_BM = rewards(rollouts, prompts, shape, self.data.tokenizer, self.runtime, self.reward)
        self._check(step, prompts, gold, "ln p(y*|x,z)", log_w_BM[valid_BM])
        if not self.estimator.imitates:
            self.numerics.scored(step, log_w_BM, valid_BM, self._answer_tokens(prompts))
        scored = time.monotonic()

        self.phase.enter(step, "train")
        estimator = self.estimator
        if self.score_options.mask_loss_after_id is not None:
            estimator = replace(estimator, row_tokens=max(self._scored_tokens(gold), 1) / len(prompts))
        table = StepTable(log_w_BM, valid_BM, reward_BM=reward_BM)
        coefficients = estimator.coefficients(table, q=q, step=step)
        self._check(step, prompts, gold, "coefficient of ln p(z|x)", coefficients.rationale_BM)
        self._check(step, prompts, gold, "coefficient of ln p(y|x,z)", coefficients.answer_BM)
        sequences = gold
        if self.estimator.samples_answers:
            sequences = sequences_of(rollouts, prompts, gold=False)
        updates = self._updates(step, prompts, sequences, coefficients, valid_BM)
        pace = self.pace.compare((rolled - began, scored - rolled, time.monotonic() - scored))

        self.phase.enter(step, "metrics")
        if pace.remark is not None and self.recorder is not None:
            self.recorder.say(pace.remark)
        if self.estimator.imitates:
            log_w_BM = updates.scores.log_answer_BM
            self.numerics.scored(step, log_w_BM, valid_BM, self._answer_tokens(prompts))
        if self._samples_due(step) and self.recorder is not None and rollouts:  # rank 0's replica may be an idle one
            self._show_sample(step, prompts, rollouts, log_w_BM)
        sampled = reward_BM if self.estimator.samples_answers else None
        tables = Tables(log_w_BM, valid_BM, sampled, coefficients, scores, updates)
        log_prob_mismatch = None
        if not self.estimator.imitates:
            trained = updates.scores
            log_prob_mismatch = self.mismatch.log_prob(step, rollouts, trained.log_rationale_BM, trained.present_BM)
        return step_metrics(
            step, q, self.estimator, tables, rollouts, sequences, self.runtime,
            log_prob_mismatch=log_prob_mismatch, log_w_mismatch=mismatch, grad_norm=updates.grad_norm,
            lr=learning_rate(self.optimizer),
            pace=pace, share_prompts=self.train_options.share_prompts,
        )  # fmt: skip

    def _with_evaluation(self, metrics: StepMetrics) -> StepMetrics:
        if self.config.objective.row.pretrains:
            return replace(metrics, eval_loss=self.heldout_loss(metrics.step))
        found = self.evaluate(metrics.step)
        return replace(
            metrics,
            eval_exact_match=found.exact_match,
            eval_pass_at_k=found.pass_at_k,
            eval_maj_at_k=found.maj_at_k,
        )

    def heldout_loss(self, step: int) -> float:
        """Cross-entropy of the corpus's held-out rows with the current weights, nats a token."""
        self.phase.enter(step, "evaluation")
        rows = Batch(self.data.heldout, range(len(self.data.heldout)))
        rollouts = self.engine.generate(self._requests(rows), self._sampling(step))
        sequences = sequences_of(rollouts, rows, gold=True)
        scores = passes.score(self.model, sequences, (len(rows), 1), self.runtime, self.score_options)
        return -scores.log_answer_BM.sum().item() / max(self._scored_tokens(sequences), 1)

    def _scored_tokens(self, sequences: list[TrainingSequence]) -> int:
        return scored_tokens(sequences, self.score_options.mask_loss_after_id, self.runtime)

    def evaluate(self, step: int) -> Evaluation:
        """Accuracy on the held-out examples with the current weights."""
        self.phase.enter(step, "evaluation")
        t = self.config.training
        options = replace(
            self._sampling(step),
            answer_budget=self.data.answer_budget,
            temperature=t.eval_temperature,
            top_p=t.eval_top_p,
            seed=evaluation_seed(t.seed),
        )
        judge = judge_of(t, self.data.heldout_format)
        return evaluate(
            self.evaluation_engine,
            self.data.heldout,
            self.data.tokenizer,
            self.runtime,
            options,
            num_samples=t.eval_samples,
            judge=judge,
            reward=self.reward,
        )

    def _score(
        self, step: int, rollouts: list[Rollout], gold: list[TrainingSequence], shape: tuple[int, int]
    ) -> tuple[passes.Scores, float | None]:
        """ln w by the trainer's own forward pass, or by the engine; with the engine, compared on some steps.

        Zeros for an estimator that imitates: none of its coefficients asks for ln w, and the training pass brings it.
        """
        r = self.config.rollout
        if self.estimator.imitates:
            zero_BM = torch.zeros(shape, dtype=torch.float64)
            return passes.Scores(zero_BM, zero_BM, torch.ones(shape, dtype=torch.bool)), None
        if r.score_with == "trainer":
            return passes.score(self.model, gold, shape, self.runtime, self.score_options), None
        scores = passes.scores_of_rollouts(rollouts, shape, self.runtime)
        if r.score_check_interval == 0 or step % r.score_check_interval:
            return scores, None
        trainers = passes.score(self.model, gold, shape, self.runtime, self.score_options)
        return scores, self.mismatch.log_w(step, scores.log_answer_BM, trainers.log_answer_BM, scores.present_BM)

    def _named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return export_hf_tensors(self.model.policies, self.runtime, self.derived.architecture, everywhere=True)

    def _requests(self, prompts: Batch) -> list[RolloutRequest]:
        r, dp = self.config.rollout, self.runtime.groups.dp
        scored = r.score_with == "rollout"
        ask = lambda: requests_of_replica(prompts, r.num_rationales, dp.rank(), dp.size(), score=scored)  # noqa: E731
        # A corpus's rows are read here, each by its replica alone: one that is bad must end all of them.
        return ask() if self.data.corpus is None else on_all_ranks(self.runtime, ask)

    def _sampling(self, step: int) -> SamplingOptions:
        r = self.config.rollout
        return SamplingOptions(
            rationale_budget=r.rationale_budget,
            answer_budget=self.data.answer_budget if self.estimator.samples_answers else 0,
            temperature=r.temperature,
            top_p=r.top_p,
            close_id=self.data.tokenizer.think_close_id,
            eos_id=self.data.tokenizer.eos_id,
            seed=rollout_seed(self.config.training.seed),
            step=step,
        )

    def _updates(
        self,
        step: int,
        prompts: Batch,
        sequences: list[TrainingSequence],
        coefficients: Coefficients,
        valid_BM: torch.Tensor,
    ) -> Trained:
        """The step's update, or GRPO's several. The learning-rate schedule counts steps, however many they are."""
        o = self.config.objective
        self.schedule.step(increment=1)
        kl_weight_BM = None if self.reference is None else self.estimator.kl_weights(valid_BM, o.grpo_kl_beta)
        q = q_at(step, self.q_schedule) if self.estimator.uses_q else None
        sequence_count = int(valid_BM.sum())
        scale = self.numerics.begin(step, coefficients, kl_weight_BM, sequences=sequence_count, q=q)
        updates = Updates(
            self.model,
            self.optimizer,
            None if self.reference is None else self.reference.model,
            o.grpo_iterations,
            o.grpo_clamp_eps_lower,
            o.grpo_clamp_eps_upper,
            self.runtime,
            replace(self.train_options, loss_scale=scale),
        )
        update = lambda trained: self._update(step, prompts, sequences, trained)  # noqa: E731
        return updates.run(sequences, coefficients, kl_weight_BM, update)

    def _update(self, step: int, prompts: Batch, sequences: list[TrainingSequence], trained: passes.Scores) -> float:
        """Check the loss's inputs and the gradient, then let the optimizer step. Returns the norm before clipping."""
        present_BM = trained.present_BM
        self._check(step, prompts, sequences, "ln p(z|x)", trained.log_rationale_BM[present_BM])
        self._check(step, prompts, sequences, "ln p(y|x,z)", trained.log_answer_BM[present_BM])
        with self.runtime.megatron():
            norm = self.numerics.prepare()
            if not math.isfinite(norm):
                self._check(step, prompts, sequences, self.numerics.nonfinite(), torch.tensor(norm))
            return self.numerics.apply(norm)

    def _check(self, step, prompts, sequences: list[TrainingSequence], what: str, values: torch.Tensor) -> None:
        """Stop the run on every rank when `values` (alike on all ranks) are not finite; rank 0 keeps the batch."""
        if not torch.isfinite(values).all():
            run_dir = Path(self.config.training.run_dir)
            raise non_finite(what, step, prompts, sequences, self.runtime, run_dir)

    def _answer_tokens(self, prompts: Batch) -> list[float]:
        """Tokens of each prompt's gold answer; a row of pretraining is all answer."""
        if self.config.objective.row.pretrains:
            return [self.estimator.row_tokens] * len(prompts)
        return [float(len(example.answer_ids)) for example in prompts]

    def _say(self, text: str) -> None:
        if self.recorder is not None:
            self.recorder.say(text)

    def _show_sample(self, step: int, prompts: Batch, rollouts: list[Rollout], log_w_BM: torch.Tensor) -> None:
        first, decode = rollouts[0], self.data.tokenizer.decode
        example = prompts[first.prompt_slot]
        self.recorder.sample(
            step,
            prompt=example.prompt_text,
            rationale=decode(list(first.rationale_ids[: first.num_sampled])),
            forced=first.forced,
            gold=example.answer_text,
            answer=decode(list(first.answer_ids)) if first.answer_ids else "(none sampled)",
            log_w=log_w_BM[first.prompt_slot, first.rationale_slot].item(),
        )

    def _samples_due(self, step: int) -> bool:
        interval = self.config.training.sample_interval
        if self.config.objective.row.pretrains:
            return False  # nothing is sampled, and a row has no gold answer
        return interval > 0 and step % interval == 0

    def _evaluation_due(self, step: int) -> bool:
        t = self.config.training
        return step + 1 == t.train_iters or (t.eval_interval > 0 and (step + 1) % t.eval_interval == 0)
