"""F4: a training step: draw rationales, make the step's table, coefficients, update, metrics."""

from dataclasses import replace

from megatron_jq.errors import RunFailure
from megatron_jq.objective.schedule import q_at
from megatron_jq.objective.table import StepTable
from megatron_jq.records import Coefficients, Rollout, StepMetrics, TrainingSequence
from megatron_jq.train.failures import check_finite
from megatron_jq.train.figures import step_metrics
from megatron_jq.train.loop import Loop
from megatron_jq.train.mismatch import MismatchWatch
from megatron_jq.train.passes import PassResult, score, table_of_rollouts
from megatron_jq.train.pretraining import Batch
from megatron_jq.train.rollouts import rewards, sequences_of


class Trainer(Loop):
    """A run whose rationales are drawn from the policy that they train."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mismatch = MismatchWatch(self.config, self.runtime, self.log)

    def step(self, step: int) -> StepMetrics:
        """prompts → rollouts → table → coefficients → update → metrics. Alike on every rank."""
        q, prompts = q_at(step, self.q_schedule), Batch(self.data.train, self.sampler.batch(step))
        with self.stage(step, "rollout", prompts):
            self.engine.update_weights(step, self.named_weights)
            rollouts = self.engine.generate(self.requests(prompts), self.sampling(step))
        with self.stage(step, "score", prompts):
            gold = sequences_of(rollouts, prompts, gold=True)
            scored = self._score(step, rollouts, gold, (len(prompts), self.config.rollout.num_rationales))
            table = self._with_rewards(scored.table, rollouts, prompts)
            self._judge(step, q, table, prompts, gold)
        with self.stage(step, "train", prompts):
            coefficients = self._coefficients(step, q, table, gold)
            sequences = sequences_of(rollouts, prompts, gold=False) if self.estimator.samples_answers else gold
            update = self.learner.update(sequences, coefficients)
        pace = self.pace.compare(self.stage.seconds)
        with self.stage(step, "metrics", prompts):
            self.show(step, pace, prompts, rollouts, table)
            return step_metrics(
                step, q, self.estimator, table, coefficients, scored, update, rollouts, sequences, self.runtime,
                lr=self.parts.learning_rate, pace=pace, share_prompts=self.train_options.share_prompts,
                log_prob_mismatch=self.mismatch.log_prob(step, rollouts, update.trained.table),
            )  # fmt: skip

    def _score(
        self, step: int, rollouts: list[Rollout], gold: list[TrainingSequence], shape: tuple[int, int]
    ) -> PassResult:
        """ln w by the trainer's own forward pass, or by the engine; with the engine, compared on some steps."""
        r = self.config.rollout
        if r.score_with == "trainer":
            return score(self.model, gold, shape, self.runtime, self.score_options)
        scored = table_of_rollouts(rollouts, shape, self.runtime)
        if r.score_check_interval == 0 or step % r.score_check_interval:
            return scored
        exact = score(self.model, gold, shape, self.runtime, self.score_options).table
        assert scored.table.log_w_BM is not None and exact.log_w_BM is not None, "a scoring pass computes it"
        mismatch = self.mismatch.log_w(step, scored.table.log_w_BM, exact.log_w_BM, scored.table.valid_BM)
        return replace(scored, log_w_mismatch_max=mismatch)

    def _with_rewards(self, table: StepTable, rollouts: list[Rollout], prompts: Batch) -> StepTable:
        if not self.estimator.samples_answers:
            return table
        reward_BM = rewards(rollouts, prompts, table.shape, self.data.tokenizer, self.runtime, self.reward)
        return replace(table, reward_BM=reward_BM)

    def _judge(self, step: int, q: float, table: StepTable, prompts: Batch, gold: list[TrainingSequence]) -> None:
        """Refuse a table that has nothing to train on, or is not finite, and weights that the last update destroyed."""
        assert table.log_w_BM is not None, "a scoring or training pass computes it"
        least = self.estimator.minimum_rationales
        if not (table.valid_BM.sum(dim=1) >= least).any():
            raise RunFailure(
                f"step {step}: nothing to train on: {int(table.valid_BM.sum())} of {table.valid_BM.numel()} rationales "
                f"are valid, and no prompt has the {least} that --estimator {self.estimator.name} needs"
            )
        check_finite("ln p(y*|x,z)", table.log_w_BM[table.valid_BM], gold)
        self.numerics.start(step, q if self.estimator.uses_q else None, sequences=int(table.valid_BM.sum()))
        self.numerics.scored(table.log_w_BM, table.valid_BM, [float(len(p.answer_ids)) for p in prompts])

    def _coefficients(self, step: int, q: float, table: StepTable, gold: list[TrainingSequence]) -> Coefficients:
        coefficients = self.estimator.coefficients(table, q=q, step=step)
        if self.reference is not None:
            kl_weight_BM = self.estimator.kl_weights(table.valid_BM, self.config.objective.grpo_kl_beta)
            coefficients = replace(coefficients, kl_weight_BM=kl_weight_BM)
        check_finite("coefficient of ln p(z|x)", coefficients.rationale_BM, gold)
        check_finite("coefficient of ln p(y|x,z)", coefficients.answer_BM, gold)
        return coefficients
