"""F4: how far a rollout engine's log-likelihoods lie from the trainer's, and when a run warns of it.

The training pass knows ln p(z|x) anyway, so each step compares it with the engine's for one small all-reduce. An engine
that draws from another policy than the one that is trained shows here: the estimators assume that none does.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_jq.config import Config
from megatron_jq.objective.table import StepTable
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.records import Rollout

#: bfloat16 rounds each token's ln p, and over n tokens the errors add up like a random walk: the alarm times this,
#: times √n. docs/extending.md has what was measured.
_BF16_FACTOR = 5.0
#: Tokens at a nucleus's edge that rounding may put on the other side, per rationale. Each moves ln p by -ln(top-p) at
#: the most.
_NUCLEUS_FLIPS = 2


class MismatchWatch:
    """Compares an engine's ln w and ln p(z|x) with the trainer's. Every method is called on all ranks alike.

    log: what to do with a line for the user.
    """

    def __init__(self, config: Config, runtime: Runtime, log: Callable[[str], None]):
        self._alarm, self._top_p = config.rollout.score_mismatch_alarm, config.rollout.top_p
        self._bf16, self._runtime, self._log = config.model.bf16, runtime, log
        self._reported, self._unknown_reported = 0.0, False

    def tolerance(self, num_sampled: int) -> float:
        """Return the nats by which ln p(z|x) of one rationale may differ for rounding alone.

        --score-mismatch-alarm, in bf16 times 5·√tokens; with a nucleus, what two tokens at its edge can make on top.
        """
        rounding = self._alarm * (_BF16_FACTOR * math.sqrt(num_sampled) if self._bf16 else 1.0)
        return rounding - _NUCLEUS_FLIPS * math.log(self._top_p)

    def log_w(self, step: int, engine_BM: Tensor, trainer_BM: Tensor, present_BM: Tensor) -> float:
        """Return the largest |ln w of engine - trainer| in nats, and warn where it exceeds --score-mismatch-alarm.

        All [B, M], completed over replicas: no communication.
        """
        gap_BM = (engine_BM - trainer_BM).abs()[present_BM]
        largest = gap_BM.max().item() if len(gap_BM) else 0.0
        if not largest <= self._alarm:
            self._log(
                f"warning: step {step}: ln w of rollout and trainer differ by up to {largest:.3g} nats "
                f"(--score-mismatch-alarm {self._alarm}); --score-with trainer is exact"
            )
        return largest

    def log_prob(self, step: int, rollouts: list[Rollout], trained: StepTable) -> float | None:
        """Return the largest |ln p(z|x) of engine - trainer| in nats over the step's rationales, alike on all ranks.

        None where none was trained on or the engine knows none of them. Warns where one exceeds its tolerance, again
        where a later one is twice as large, and once of an engine that gives no ln p(z|x). One all-reduce of 3 numbers.
        rollouts: this replica's. trained: as the (first) training pass found it.
        """
        assert trained.log_z_BM is not None, "a scoring or training pass computes it"
        gap = excess = -math.inf
        unknown = 0.0
        for r in rollouts:
            if not (r.valid and trained.valid_BM[r.prompt_slot, r.rationale_slot]):
                continue
            if r.log_prob is None:
                unknown = 1.0
                continue
            distance = abs(r.log_prob - trained.log_z_BM[r.prompt_slot, r.rationale_slot].item())
            gap, excess = max(gap, distance), max(excess, distance - self.tolerance(r.num_sampled))
        largest_3 = torch.tensor([gap, excess, unknown], dtype=torch.float64, device=self._runtime.device)
        dist.all_reduce(largest_3, op=dist.ReduceOp.MAX, group=self._runtime.groups.dp)
        gap, excess, unknown = largest_3.tolist()
        if unknown and not self._unknown_reported:
            self._unknown_reported = True
            self._log(
                f"warning: step {step}: the engine gives no ln p(z|x) of what it drew: whether its rationales are the "
                "policy's cannot be checked"
            )
        if excess > 0 and gap >= 2 * self._reported:
            self._reported = gap
            self._log(
                f"warning: step {step}: ln p(z|x) of engine and trainer differ by up to {gap:.3g} nats, "
                f"{excess:.3g} above what rounding explains (--score-mismatch-alarm {self._alarm}); the rationales "
                "were not drawn from the policy that is trained, which the estimators assume"
            )
        return None if gap == -math.inf else gap
