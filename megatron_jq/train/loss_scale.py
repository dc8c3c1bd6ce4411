"""F4: --loss-scale, one factor on the whole loss, keeps a cold start's gradients inside float32 (docs/loss-scaling.md).

At a cold start coefficients are P^(1-q), which float32, and Adam's squares in it, cannot hold. One factor on all of
them changes nothing that exact arithmetic would see but --adam-eps, which is then compared with the scaled gradient.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_jq.errors import RunFailure
from megatron_jq.train.optimizer import device_of_collectives, parts_of

#: Largest product of scale and coefficient that `auto` lets come before it lowers the scale. Adam squares gradients:
#: between this and 1e19, the root of float32's largest number, lies what a sum over tokens and sequences can add.
_LARGEST_PRODUCT = 2.0**32
#: Adam's second moments stay below this when a scale is raised (once, for a checkpoint that had none).
_LARGEST_SECOND_MOMENT = 2.0**100


class LossScale:
    """The factor on the loss, step by step, alike on every rank.

    A number stays what it is. `auto` waits for the first step whose loss is not zero, takes the power of two that
    brings the largest coefficient to between 1 and 2, and only ever lowers it, to the same place, when a later step's
    product exceeds 2^32. Adam's moments are multiplied along, by powers of two, so exactly: a run that was lowered goes
    on as one whose float32 had a wider range. value None: auto, undecided.
    """

    def __init__(self, setting: float | str, *, adam: bool, log: Callable[[str], None] = lambda text: None):
        self.setting, self._adam, self._log = setting, adam, log
        self.value: float | None = None if setting == "auto" else float(setting)

    def for_step(self, step: int, largest: float, optimizer: MegatronOptimizer) -> float:
        """Return the factor of this step's loss. largest: of the magnitudes that multiply a gradient in it.

        RunFailure, on every rank, where the product with a number that was given leaves float32.
        """
        if self.setting != "auto":
            assert self.value is not None
            if self.value * largest > torch.finfo(torch.float32).max:
                raise RunFailure(
                    f"step {step}: --loss-scale {self.value:g} times a coefficient of {largest:.3g} exceeds float32; "
                    "give a smaller one, or auto"
                )
            return self.value
        if largest > 0 and (self.value is None or self.value * largest > _LARGEST_PRODUCT):
            before, self.value = self.value, 2.0 ** -math.floor(math.log2(largest))
            if before is not None:
                self._rescale(optimizer, self.value / before)
            self._log(
                f"step {step}: the loss scale is {_power(self.value)}"
                + (f", after {_power(before)}" if before is not None else "")
                + f" (largest coefficient {largest:.2g})"
            )
        return 1.0 if self.value is None else self.value

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"loss_scale": self.value, "loss_scale_setting": self.setting}

    def restore(self, saved: dict[str, Any], optimizer: MegatronOptimizer) -> None:
        """Continue with the optimizer of a checkpoint, whose moments are those of the scale it was saved with.

        The scale of `auto` continues. Any other change (--load alone can bring one) multiplies the moments. RunFailure,
        on every rank, where they would leave float32.
        """
        before = saved.get("loss_scale", 1.0)
        if self.setting == "auto" and saved.get("loss_scale_setting") == "auto":
            self.value = before
        elif before is not None and self.setting != "auto" and self.value is not None:
            self._check_room(optimizer, before)
            self._rescale(optimizer, self.value / before)
        elif before is not None and self._adam and (room := _room_above(optimizer)) is not None:
            self.value = before * room  # the next step lowers it to where it belongs
            self._rescale(optimizer, room)

    def _check_room(self, optimizer: MegatronOptimizer, before: float) -> None:
        """Refuse a constant that is too far above the scale of the checkpoint for Adam's moments."""
        if not self._adam or self.value is None or self.value <= before or (room := _room_above(optimizer)) is None:
            return
        if self.value / room > before:
            raise RunFailure(
                f"--loss-scale {self.value:g}: the checkpoint's moments of Adam, of scale {before:g}, would leave "
                f"float32; give at most {before * room:.17g}, or --finetune to load the weights alone"
            )

    def _rescale(self, optimizer: MegatronOptimizer, ratio: float) -> None:
        """Bring Adam's moments, linear and square in the gradient, to another scale. SGD's momentum has none."""
        if not self._adam or ratio == 1:
            return
        for part in parts_of(optimizer):
            for state in part.optimizer.state.values():
                for name, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
                    for _ in range(power if name in state else 0):
                        state[name].mul_(ratio)


def _room_above(optimizer: MegatronOptimizer) -> float | None:
    """The power of two by which gradients may grow before Adam's second moments leave float32, alike on all ranks.

    None where all are zero.
    """
    largest = torch.zeros([], device=device_of_collectives())
    for part in parts_of(optimizer):
        for state in part.optimizer.state.values():
            largest = torch.maximum(largest, state["exp_avg_sq"].max().float())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    if largest == 0:
        return None
    return 2.0 ** max(0, math.floor((math.log2(_LARGEST_SECOND_MOMENT) - math.log2(largest.item())) / 2))


def _power(value: float) -> str:
    return f"2^{round(math.log2(value))}"
