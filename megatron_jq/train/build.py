"""F4: builds what a run trains: a policy, the engine over it, gradients, optimizer and schedule."""

from dataclasses import dataclass

from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_jq.architecture import Architecture
from megatron_jq.config import Config
from megatron_jq.model.build import TrainingModel, wrap_for_training
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.rollout.build import Sampler, build_sampler
from megatron_jq.rollout.megatron import MegatronEngine
from megatron_jq.train.optimizer import build_optimizer, build_schedule, learning_rate


@dataclass(frozen=True)
class Parts(Sampler):
    """A policy that draws and is trained. model: `policies` inside Megatron-core's wrappers."""

    model: TrainingModel
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler

    @property
    def learning_rate(self) -> float:
        """Of the latest update."""
        return learning_rate(self.optimizer)


def build(
    config: Config,
    architecture: Architecture,
    vocab_size: int,
    runtime: Runtime,
    *,
    engine: type[MegatronEngine] = MegatronEngine,
) -> Parts:
    """As build_sampler, with gradients, optimizer and learning-rate schedule."""
    sampler = build_sampler(config, architecture, vocab_size, runtime, engine=engine)
    model = wrap_for_training(sampler.policies, sampler.options, runtime)
    optimizer = build_optimizer(model, config, runtime)
    schedule = build_schedule(optimizer, config)
    return Parts(sampler.options, sampler.policies, sampler.engine, model, optimizer, schedule)
