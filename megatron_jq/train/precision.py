"""F4: says where float32 hides what a step was to learn, or makes more of it than there was (docs/loss-scaling.md).

Every figure that is judged is alike on all ranks, so a run that has to stop does so on all of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_jq.config import Config, OptimizerConfig
from megatron_jq.errors import RunFailure
from megatron_jq.train.falls import FallWatch
from megatron_jq.train.optimizer import device_of_collectives, parts_of

#: float32's smallest number with all its digits (1.2e-38), and the gradient whose square it is: Adam's floor.
SMALLEST = torch.finfo(torch.float32).tiny
GRADIENT_FLOOR = math.sqrt(SMALLEST)
#: Above this norm a gradient's square may leave float32 (3.4e38).
_LARGEST_NORM = 2.0**63


@dataclass(frozen=True)
class StepFacts:
    """What a step's judgements name.

    largest: of its coefficients, without the loss scale; sequences: that it trains on; alone: no KL and no balance of
    experts is in the loss beside them.
    """

    step: int
    q: float | None  # None for an estimator without one
    log_p_mean: float
    largest: float
    sequences: int
    loss_scale: float
    alone: bool = True

    def __str__(self) -> str:
        q = "" if self.q is None else f", q = {self.q:g}"
        log_p = f", ln P = {self.log_p_mean:.4g}" if math.isfinite(self.log_p_mean) else ""
        return f"largest coefficient {self.largest:.2g}{q}{log_p}"


class PrecisionWatch:
    """Says each kind of trouble once a run; falls of ln P as often as they come (train/falls.py).

    falls: those of the run before, where it is resumed.
    """

    def __init__(self, config: Config, log: Callable[[str], None]):
        self._o, self._log = config.optimizer, log
        self.falls = FallWatch()
        self._said: set[str] = set()

    def scored(self, step: int, log_p_mean: float, answer_tokens: float) -> None:
        """Compare ln P per answer token with that of earlier steps. answer_tokens: mean of the golds of this ln P.

        RunFailure where an update took it out of any policy's reach.
        """
        if not math.isfinite(log_p_mean) or (fall := self.falls.judge(log_p_mean / max(answer_tokens, 1.0))) is None:
            return
        fell = f"step {step}: ln P fell to {log_p_mean:.6g} ({fall})"
        look = f"Look at --lr ({self._o.lr:g}), --clip-grad ({self._o.clip_grad:g}) and --adam-eps"
        if fall.destroyed:
            raise RunFailure(
                f"{fell}: the weights are no policy any more. A checkpoint from before it is good. {look}, and at "
                "docs/loss-scaling.md"
            )
        self._log(f"warning: {fell}, further than prompts differ. If it does not come back, an update did it. {look}")

    def coefficients(self, facts: StepFacts, *, vanished: bool) -> None:
        """Judge the step's table. vanished: all of it is 0 though every ln w is finite and q is below 1."""
        if vanished:
            self._warn(
                "vanished",
                f"step {facts.step}: P^(1-q) is below float64's range ({facts}): all coefficients are 0 and "
                "nothing is learnt. No loss scale helps; a larger --q does, or a --q-schedule from 1",
            )
        elif 0 < facts.largest * facts.loss_scale < SMALLEST * 2.0**24:  # beside such a one, smaller ones do not count
            self._warn(
                "coefficients",
                f"step {facts.step}: coefficients reach below float32's smallest number, {SMALLEST:.1e}, in which they "
                f"enter the loss ({facts}): they lose digits or count as 0. {self._remedy(facts)}",
            )

    def gradient(self, facts: StepFacts, norm: float, elements: int) -> None:
        """Judge the norm of a prepared gradient, the loss scale in it. elements: of the whole gradient.

        RunFailure where Adam's squares of it leave float32 above.
        """
        o, scale = self._o, facts.loss_scale
        clipped = norm if o.clip_grad == 0 else min(norm, o.clip_grad * scale)
        if o.optimizer == "adam" and clipped > _LARGEST_NORM:
            raise RunFailure(
                f"step {facts.step}: a gradient of norm {norm:.3g}, --loss-scale {scale:g} in it, is too large for "
                "Adam's squares in float32; give a smaller --loss-scale, or auto, or a --clip-grad"
            )
        small = facts.largest * facts.sequences < 1e-6  # or it is what was learnt that makes the gradient small
        if not facts.alone or facts.largest == 0 or not small:
            return
        what = f"step {facts.step}: the gradient's norm is {norm / scale:.3g}"
        if norm < SMALLEST * math.sqrt(elements):
            size = "exactly 0" if norm == 0 else "below what float32 holds with all its digits"
            self._warn("gradient", f"{what}, {size}, where coefficients are not 0 ({facts}). {self._remedy(facts)}")
        elif o.optimizer == "adam" and norm < o.adam_eps / 10:
            self._warn(
                "epsilon above",
                f"{what}, {'' if scale == 1 else f'{norm:.3g} with the loss scale, '}below --adam-eps {o.adam_eps:g} "
                f"({facts}): no weight moves further than {norm / o.adam_eps:.1g} of --lr. {self._remedy(facts)}",
            )

    @torch.no_grad()
    def adam_step(self, facts: StepFacts, optimizer: MegatronOptimizer, norm: float) -> None:
        """Judge Adam's step of prepared gradients before it is made, where epsilon does not bound what float32's lost
        squares make of it: every weight, so at the cost of some copies of the largest. norm: without the loss scale.

        RunFailure on all ranks where a weight would move ten times as far as exact arithmetic can let it.
        """
        o = self._o
        if o.optimizer != "adam" or o.adam_eps >= GRADIENT_FLOOR:
            return
        clip = 1.0 if o.clip_grad == 0 else min(1.0, o.clip_grad / (norm + 1e-6))
        lost, total, furthest, most = 0, 0, 0.0, 0.0
        for part in parts_of(optimizer):
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is None or not parameter.grad.numel():
                        continue
                    state = part.optimizer.state.get(parameter, {})
                    count = int(state.get("step", group.get("step", 0))) + 1
                    square, ratio = _adam_step(parameter.grad * clip, state, count, o)
                    lost += ((square < SMALLEST) & (parameter.grad != 0)).sum().item()
                    total += parameter.grad.numel()
                    furthest, most = max(furthest, ratio.max().item()), max(most, _longest_step(count, o))
        sums = torch.tensor([lost, total], dtype=torch.float64, device=device_of_collectives())
        largest = torch.tensor([furthest, most], dtype=torch.float64, device=device_of_collectives())
        dist.all_reduce(sums)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        (lost, total), (furthest, most) = sums.tolist(), largest.tolist()
        problem = (
            f"step {facts.step}: float32 cannot hold the squares of {100 * lost / max(total, 1):.2g} % of the "
            f"gradient's elements, which Adam's second moment needs, and --adam-eps {o.adam_eps:g} is below their "
            f"floor, {GRADIENT_FLOOR:.1e}"
        )
        if furthest > 10 * most:
            raise RunFailure(
                f"{problem}: a weight would move {furthest:.3g} times --lr, where {most:.2g} is the most that Adam can "
                f"({facts}). {self._remedy(facts)} Or give a larger --adam-eps"
            )
        if lost:
            self._warn(
                "epsilon below", f"{problem}: their steps are of the wrong size ({facts}). {self._remedy(facts)}"
            )

    def _remedy(self, facts: StepFacts) -> str:
        if self._o.optimizer == "sgd":
            return "A step of SGD is as short: a larger --q trains on it, or --optimizer adam with --loss-scale auto."
        if self._o.loss_scale != "auto":
            return "--loss-scale auto trains on it."
        if facts.loss_scale == 1:
            return "A larger --q trains on it."
        return (
            f"--loss-scale auto follows the warmest prompts that the run has met ({facts.loss_scale:.3g} now) and is "
            f"never raised. A larger --q, or a --q-schedule from 1, trains on these; so does a run on them alone ("
            f"--load CHECKPOINT --finetune, with --loss-scale auto{_constant(facts.largest)}); more --prompts-per-step "
            "put warmer prompts beside them, so that fewer steps are lost"
        )

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._log(f"warning: {text}")


def _constant(largest: float) -> str:
    """Name the constant loss scale that fits coefficients of this size, where float64 holds one."""
    exponent = -math.floor(math.log2(largest))
    return f", or the constant {2.0**exponent:.6g}" if exponent < 1024 else ""


def _adam_step(
    gradient: torch.Tensor, state: dict, count: int, o: OptimizerConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """(second moment, |step| over the rate) of update number `count`, in the precision in which Adam computes them."""
    zero = torch.zeros_like(gradient)
    moment = state.get("exp_avg", zero) * o.adam_beta1 + (1 - o.adam_beta1) * gradient
    square = (state.get("exp_avg_sq", zero) * o.adam_beta2).addcmul_(gradient, gradient, value=1 - o.adam_beta2)
    root = square.sqrt() / math.sqrt(1 - o.adam_beta2**count) + o.adam_eps
    return square, (moment / root).abs() / (1 - o.adam_beta1**count)


def _longest_step(count: int, o: OptimizerConfig) -> float:
    """The largest |step| over the rate of update number `count` in exact arithmetic, whatever the gradients were.

    Cauchy-Schwarz: |m| = (1-b1) |Σ b1^i g_i| <= (1-b1) sqrt(Σ (b1²/b2)^i) · sqrt(Σ b2^i g_i²), and v is the last sum
    times 1-b2; with both bias corrections.
    """
    b1, b2 = o.adam_beta1, o.adam_beta2
    if b1 == 0:
        return math.sqrt((1 - b2**count) / (1 - b2))
    ratio = b1 * b1 / b2 if b2 else math.inf
    if ratio > 1 and count * math.log(ratio) > 600:
        return math.inf
    terms = float(count) if ratio == 1 else (1 - ratio**count) / (1 - ratio)
    return (1 - b1) / (1 - b1**count) * math.sqrt(terms * (1 - b2**count) / (1 - b2))
