"""F4: a step of imitation: rationales come with the data (sft), or a row is all answer (pretrain). Nothing is drawn.

No coefficient asks for ln w, so there is no scoring pass: the training pass brings it, for the metrics.
"""

from dataclasses import replace

import torch

from megatron_jq.objective.schedule import q_at
from megatron_jq.objective.table import StepTable
from megatron_jq.records import StepMetrics, TrainingSequence
from megatron_jq.train.estimators import Estimator
from megatron_jq.train.failures import check_finite
from megatron_jq.train.figures import step_metrics
from megatron_jq.train.loop import Loop
from megatron_jq.train.passes import score
from megatron_jq.train.pretraining import Batch, scored_tokens
from megatron_jq.train.rollouts import sequences_of


class Imitation(Loop):
    """A run that learns rationales and answers as they are given."""

    def step(self, step: int) -> StepMetrics:
        """prompts → given rationales → coefficients → update → metrics. Alike on every rank."""
        q, prompts = q_at(step, self.q_schedule), Batch(self.data.train, self.sampler.batch(step))
        with self.stage(step, "rollout", prompts):
            rollouts = self.engine.generate(self.requests(prompts), self.sampling(step))
        with self.stage(step, "train", prompts):
            sequences = sequences_of(rollouts, prompts, gold=True)
            valid_BM = torch.ones(len(prompts), self.config.rollout.num_rationales, dtype=torch.bool)
            estimator = self._for_rows_of(sequences, len(prompts))
            coefficients = estimator.coefficients(StepTable(None, valid_BM), q=q, step=step)
            check_finite("coefficient of ln p(z|x)", coefficients.rationale_BM, sequences)
            check_finite("coefficient of ln p(y|x,z)", coefficients.answer_BM, sequences)
            self.numerics.start(step, None, sequences=valid_BM.numel())
            update = self.learner.update(sequences, coefficients)
        pace = self.pace.compare(self.stage.seconds)
        with self.stage(step, "metrics", prompts):
            table = replace(update.trained.table, valid_BM=valid_BM)
            assert table.log_w_BM is not None, "a scoring or training pass computes it"
            self.numerics.scored(table.log_w_BM, valid_BM, self._answer_tokens(prompts))
            self.show(step, pace, prompts, rollouts, table)
            return step_metrics(
                step, q, self.estimator, table, coefficients, None, update, rollouts, sequences, self.runtime,
                lr=self.parts.learning_rate, pace=pace, share_prompts=self.train_options.share_prompts,
            )  # fmt: skip

    def with_evaluation(self, metrics: StepMetrics) -> StepMetrics:
        """As Loop.with_evaluation; pretraining has the cross-entropy of the held-out rows instead, nats per token."""
        if self._pretrains:
            return replace(metrics, eval_loss=self._heldout_loss(metrics.step))
        return super().with_evaluation(metrics)

    def _heldout_loss(self, step: int) -> float:
        self.stage.phase.enter_phase(step, "evaluation")
        rows = Batch(self.data.heldout, range(len(self.data.heldout)))
        sequences = sequences_of(self.engine.generate(self.requests(rows), self.sampling(step)), rows, gold=True)
        scored = score(self.model, sequences, (len(rows), 1), self.runtime, self.score_options)
        assert scored.table.log_w_BM is not None, "a scoring or training pass computes it"
        return -scored.table.log_w_BM.sum().item() / max(self._scored_tokens(sequences), 1)

    def _for_rows_of(self, sequences: list[TrainingSequence], count: int) -> Estimator:
        """The estimator for this step's rows: their loss is a mean over tokens that are scored."""
        if self.score_options.mask_loss_after_id is None:
            return self.estimator
        return replace(self.estimator, row_tokens=max(self._scored_tokens(sequences), 1) / count)

    def _scored_tokens(self, sequences: list[TrainingSequence]) -> int:
        return scored_tokens(sequences, self.score_options.mask_loss_after_id, self.runtime)

    def _answer_tokens(self, prompts: Batch) -> list[float]:
        if self._pretrains:  # a row is all answer
            return [float(self.estimator.row_tokens)] * len(prompts)
        return [float(len(example.answer_ids)) for example in prompts]

    @property
    def _pretrains(self) -> bool:
        return self.config.objective.row.pretrains
