"""F4: what every run does around its steps: opening lines, evaluation, the record, checkpoints."""

import gc
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

from megatron_jq.config import Config
from megatron_jq.data.sampler import InOrder, PromptSampler
from megatron_jq.errors import RunFailure, UserError
from megatron_jq.evaluate.reward import Reward
from megatron_jq.model.build import TrainingModel
from megatron_jq.objective.schedule import QSchedule
from megatron_jq.objective.table import StepTable
from megatron_jq.parallel.runtime import Runtime, on_all_ranks
from megatron_jq.records import Rollout, StepMetrics
from megatron_jq.rollout.engine import NamedWeights, RolloutEngine, RolloutRequest, SamplingOptions
from megatron_jq.train.build import Parts
from megatron_jq.train.estimators import Estimator
from megatron_jq.train.heldout import evaluate_policy
from megatron_jq.train.learner import Learner
from megatron_jq.train.numerics import Numerics
from megatron_jq.train.pace import Pace, PaceMaker
from megatron_jq.train.passes import BatchOptions
from megatron_jq.train.pretraining import Batch
from megatron_jq.train.recorder import Log, open_recorder
from megatron_jq.train.reference import Reference
from megatron_jq.train.rollouts import requests_of, sampling_options
from megatron_jq.train.saving import Saving
from megatron_jq.train.setup import DataSets
from megatron_jq.train.stages import Stages
from megatron_jq.train.start_point import StartPoint
from megatron_jq.train.stopping import StopRequest


@dataclass
class Loop(ABC):
    """One process of a run, as assemble.py puts it together.

    A subclass says what a step is: trainer.py draws rationales, imitation.py is given them.
    """

    config: Config
    data: DataSets
    parts: Parts
    estimator: Estimator
    q_schedule: QSchedule
    sampler: InOrder | PromptSampler
    score_options: BatchOptions
    train_options: BatchOptions
    engine: RolloutEngine
    named_weights: NamedWeights  # of the policy that trains
    learner: Learner
    reference: Reference | None
    numerics: Numerics
    reward: Reward | None
    runtime: Runtime
    stage: Stages
    log: Log  # where lines for the user go
    pace: PaceMaker = field(init=False)

    def __post_init__(self) -> None:
        self.pace = PaceMaker(self.runtime)

    @property
    def model(self) -> TrainingModel:
        return self.parts.model

    @abstractmethod
    def step(self, step: int) -> StepMetrics:
        """One step of training, alike on every rank."""

    def run(self, start: StartPoint, saving: Saving, stop: StopRequest) -> None:
        """Steps to --train-iters, or to the end of the step in which `stop` receives a signal, with checkpoints."""
        about = (self.config, self.data, self.estimator, self.parts, self.runtime)
        self.log.recorder = on_all_ranks(self.runtime, lambda: open_recorder(start, *about), main_only=True)
        # What stands now stays: a full collection that walks through it costs a quarter of a second every so often.
        gc.collect()
        gc.freeze()
        recorder = self.log.recorder  # rank 0's
        try:
            for step in range(start.step, self.config.training.train_iters):
                metrics = self.step(step)
                if self.data.heldout and self._evaluation_due(step):
                    metrics = self.with_evaluation(metrics)
                if recorder is not None:
                    recorder.record(metrics)
                self.stage.phase.enter_phase(step, "checkpoint")
                if saving.between_steps(metrics, recorder, stop):
                    break
            saving.writer.wait()
        except (RunFailure, UserError):
            saving.end(recorder)
            raise
        finally:
            if recorder is not None:
                recorder.close()  # TensorBoard's last events would be lost with a run that stops
            self.engine.close()

    def with_evaluation(self, metrics: StepMetrics) -> StepMetrics:
        """The step's metrics with those of the held-out examples at the current weights."""
        self.stage.phase.enter_phase(metrics.step, "evaluation")
        drawn = (self.parts.engine, self.sampling(metrics.step))
        evaluation = evaluate_policy(self.config, self.data, self.runtime, *drawn, reward=self.reward)
        return replace(
            metrics,
            eval_exact_match=evaluation.exact_match,
            eval_pass_at_k=evaluation.pass_at_k,
            eval_maj_at_k=evaluation.maj_at_k,
        )

    def show(self, step: int, pace: Pace, prompts: Batch, rollouts: list[Rollout], table: StepTable) -> None:
        """Name a slow rank, and every --sample-interval steps show a rationale."""
        if pace.remark is not None:
            self.log(pace.remark)
        interval = self.config.training.sample_interval
        due = interval > 0 and step % interval == 0 and not self.config.objective.row.pretrains
        if due and self.log.recorder is not None and rollouts:  # rank 0's replica may be an idle one
            self.log.recorder.show_sample(step, prompts, rollouts[0], table, self.data.tokenizer)

    def requests(self, prompts: Batch) -> list[RolloutRequest]:
        """What this replica's engine is asked for."""
        return requests_of(prompts, self.config, self.data, self.runtime)

    def sampling(self, step: int) -> SamplingOptions:
        """How the step's rationales, and answers where the estimator asks for them, are drawn."""
        return sampling_options(step, self.config, self.data, samples_answers=self.estimator.samples_answers)

    def _evaluation_due(self, step: int) -> bool:
        t = self.config.training
        return step + 1 == t.train_iters or (t.eval_interval > 0 and (step + 1) % t.eval_interval == 0)
