"""F4: how a step's loss becomes an update in float32: scaled, judged, clipped, applied."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_jq.config import Config
from megatron_jq.model.build import TrainingModel
from megatron_jq.model.moe import balances_experts
from megatron_jq.objective.tsallis import log_mean_weight
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.records import Coefficients
from megatron_jq.train.falls import FallWatch
from megatron_jq.train.loss_scale import LossScale
from megatron_jq.train.optimizer import (
    clip_and_step,
    device_of_collectives,
    first_nonfinite_parameter,
    gradient_norm,
    rounded,
)
from megatron_jq.train.precision import PrecisionWatch, StepFacts
from megatron_jq.train.start_point import StartPoint


class Numerics:
    """A run's loss scale and its judgements of precision. Every method is called on all ranks alike.

    Order in a step: `start`, `scored` once ln P is known, `begin` before the passes, then for each update `prepare`,
    and `apply` where the norm is finite. log: what to do with a line for the user.
    """

    def __init__(
        self,
        config: Config,
        model: TrainingModel,
        optimizer: MegatronOptimizer,
        runtime: Runtime,
        log: Callable[[str], None],
    ):
        self._config, self._model, self._optimizer, self._runtime = config, model, optimizer, runtime
        self.scale = LossScale(config.optimizer.loss_scale, adam=config.optimizer.optimizer == "adam", log=log)
        self._watch = PrecisionWatch(config, log)
        count = torch.tensor(sum(p.numel() for _, p in model.named_parameters()), device=device_of_collectives())
        dist.all_reduce(count)  # replicas and their copies of norms included: a bound is made of its root
        self._elements, self._log_p, self._facts = int(count), math.nan, None
        self._step, self._q, self._sequences = 0, None, 0

    def load(self, start: StartPoint) -> None:
        """Continue with the scale of the checkpoint whose optimizer was loaded, and know the ln P of its last steps.

        A checkpoint of an earlier version knows no such steps.
        """
        if start.checkpoint is None or start.weights_only:
            return
        manifest = start.checkpoint.manifest
        self.scale.restore(manifest.optimizer or {}, self._optimizer)
        self._watch.falls = FallWatch((manifest.optimizer or {}).get("log_p_per_token", ()))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, beside the optimizer's name."""
        return {**self.scale.state(), "log_p_per_token": self._watch.falls.recent}

    def start(self, step: int, q: float | None, *, sequences: int) -> None:
        """Begin a step. q: None for an estimator that has none. sequences: valid ones, over all replicas."""
        self._step, self._q, self._sequences = step, q, sequences

    def scored(self, log_w_BM: torch.Tensor, valid_BM: torch.Tensor, answer_tokens_B: list[float]) -> None:
        """Judge the weights by the step's ln w. RunFailure where the update before destroyed the policy.

        answer_tokens_B: of each prompt's gold.
        """
        scored_B = valid_BM.any(dim=1)
        log_p_B = log_mean_weight(log_w_BM, valid_BM)[scored_B]
        self._log_p = log_p_B.mean().item()  # nan where no prompt has a valid rationale
        answer_tokens = torch.tensor(answer_tokens_B, dtype=torch.float64)[scored_B.cpu()].mean().item()
        self._watch.scored(self._step, self._log_p, answer_tokens)

    def begin(self, coefficients: Coefficients) -> float:
        """Return the factor on the step's loss."""
        step, q, sequences, kl_weight_BM = self._step, self._q, self._sequences, coefficients.kl_weight_BM
        largest, others = coefficients.largest, 0.0
        if kl_weight_BM is not None and kl_weight_BM.numel():
            others = kl_weight_BM.abs().max().item()
        if balances_experts(self._model.config):
            others = max(others, self._model.config.moe_aux_loss_coeff / max(sequences, 1))
        scale = self.scale.for_step(step, max(largest, others), self._optimizer)
        self._facts = StepFacts(step, q, self._log_p, largest, sequences, scale, alone=others == 0)
        vanished = q is not None and largest == 0 and math.isfinite(self._log_p) and (1 - q) * self._log_p < -600
        self._watch.coefficients(self._facts, vanished=vanished)
        return scale

    def prepare(self) -> float:
        """Return the norm of the gradient that the passes left, the scale in it. Inside runtime.megatron()."""
        self._optimizer.prepare_grads()
        return gradient_norm(self._optimizer)

    def nonfinite(self) -> str:
        """Name what to blame for a norm that is not finite."""
        names: list[str | None] = [None] * self._runtime.world_size
        dist.all_gather_object(names, first_nonfinite_parameter(self._model))
        first = next((name for name in names if name is not None), "norm alone")
        assert self._facts is not None, "begin comes first"
        scale = self._facts.loss_scale
        return f"gradient ({first})" + ("" if scale == 1 else f" of the loss times --loss-scale, {scale:.3g},")

    def apply(self, norm: float) -> float:
        """Clip and let the optimizer step. norm: `prepare`'s. Returns the norm of the loss's own gradient, unclipped.

        RunFailure where float32 would make a step of it that Adam cannot make. Inside runtime.megatron().
        """
        facts = self._facts
        assert facts is not None, "begin comes first"
        scale = facts.loss_scale
        self._watch.gradient(facts, norm, self._elements)
        self._watch.adam_step(facts, self._optimizer, norm / scale)
        clip_and_step(self._optimizer, self._config, norm=norm / scale, loss_scale=scale)
        return rounded(norm) / scale
