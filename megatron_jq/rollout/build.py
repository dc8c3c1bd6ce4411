"""F3: builds a policy at the job's layout with the engine over it: for train, evaluate and the benchmark."""

from dataclasses import dataclass

from megatron_jq.architecture import Architecture
from megatron_jq.config import Config
from megatron_jq.model.build import BuildOptions, build_options, build_policies
from megatron_jq.model.policy import Policy
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.rollout.megatron import MegatronEngine


@dataclass(frozen=True)
class Sampler:
    """A policy that draws. policies: this pipeline rank's model chunks, the engine's own."""

    options: BuildOptions
    policies: list[Policy]
    engine: MegatronEngine


def build_sampler(
    config: Config,
    architecture: Architecture,
    vocab_size: int,
    runtime: Runtime,
    *,
    engine: type[MegatronEngine] = MegatronEngine,
) -> Sampler:
    """Random weights and the engine over them; every rank calls it. vocab_size: tokens, without padding rows."""
    options = build_options(config, vocab_size)
    policies = build_policies(architecture, options, runtime)
    return Sampler(options, policies, engine(policies, runtime, max_rows=config.rollout.rollout_batch_size))
