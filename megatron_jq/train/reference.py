"""F4: the frozen policy that --grpo-kl-beta holds the trained one to: the one that the run began with.

It is kept once, as weights in SAVE/reference, when a run begins: --load may name a folder that has moved on by the time
of a --resume, and a resumed policy is not the one that the run began with.
"""

from dataclasses import asdict
from datetime import timedelta

import torch
from megatron.core.transformer.module import Float16Module

from megatron_jq.checkpoint.folder import Manifest, package_versions
from megatron_jq.checkpoint.loader import check_architecture, find_checkpoint, load_weights
from megatron_jq.checkpoint.ownership import REFERENCE
from megatron_jq.checkpoint.run_files import Run
from megatron_jq.checkpoint.writer import CheckpointWriter
from megatron_jq.config import Config, to_toml
from megatron_jq.config_validate import Derived
from megatron_jq.errors import UserError
from megatron_jq.model.build import BuildOptions, TrainingModel, build_policies
from megatron_jq.model.policy import Policy
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.train.run_directory import save_folder
from megatron_jq.train.start_point import StartPoint


class Reference:
    """The reference of one run. Every method is called on all ranks alike."""

    def __init__(self, config: Config, derived: Derived, options: BuildOptions, runtime: Runtime):
        """Parameters alone, in the trained policy's layout: no gradients, no optimizer."""
        self._config, self._derived, self._options, self._runtime = config, derived, options, runtime
        policies = build_policies(derived.architecture, options, runtime)
        half = policies[0].config.bf16
        chunks = [Float16Module(policy.config, policy) if half else policy for policy in policies]
        for chunk in chunks:
            chunk.requires_grad_(requires_grad=False)
        self.model = TrainingModel(chunks)
        self._folder = save_folder(config) / REFERENCE

    def begin(self, start: StartPoint, policies: list[Policy]) -> None:
        """Take the weights that the run began with: those of `policies`, which hold the beginning's, or the kept ones.

        UserError on every rank where a resumed run has none.
        """
        if not _taken_up(start):
            with torch.no_grad():
                for frozen_policy, trained_policy in zip(self.model.policies, policies, strict=True):
                    for frozen, trained in zip(frozen_policy.parameters(), trained_policy.parameters(), strict=True):
                        frozen.copy_(trained)
            return
        checkpoint = find_checkpoint(self._folder, "--resume: --grpo-kl-beta:", self._runtime, print, missing_ok=True)
        if checkpoint is None:
            raise UserError(
                f"--resume: --grpo-kl-beta needs the policy that the run began with, and {self._folder} does not hold "
                "it; restore that folder, or begin a new run with --load and --finetune"
            )
        check_architecture(checkpoint, self._derived.architecture, self._options.vocab_size)
        load_weights(checkpoint, self.model.policies, self._runtime)

    def keep(self, start: StartPoint, deadline: timedelta, run: Run | None) -> None:
        """Write the weights, unless the run was resumed. RunFailure on every rank where that fails.

        run: rank 0's, which writes the manifest.
        """
        if _taken_up(start):
            return
        manifest = Manifest(
            step=0,
            architecture=asdict(self._derived.architecture),
            vocab_size=self._options.vocab_size,
            bf16=self._config.model.bf16,
            config=to_toml(self._config),
            run=None if run is None else asdict(run),
            versions=package_versions(),
        )
        CheckpointWriter(self._folder, self._runtime, deadline).save_weights(self.model.policies, manifest)


def _taken_up(start: StartPoint) -> bool:
    return start.resumed and start.checkpoint is not None
