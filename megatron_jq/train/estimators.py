"""F4: from the step's table to the coefficients of the surrogate loss, for every row of megatron_jq/estimators.py."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from megatron_jq.config import Config
from megatron_jq.config_validate import Derived
from megatron_jq.errors import UserError
from megatron_jq.estimators import GENERATOR, EstimatorRow, resolve, row_of
from megatron_jq.objective.knobs import Knobs
from megatron_jq.objective.table import StepTable
from megatron_jq.objective.tsallis import prompt_mean_scale
from megatron_jq.records import Coefficients
from megatron_jq.seeds import stream

#: Of the step's table, what only some estimators may read.
_DECLARED = frozenset(f.name for f in fields(StepTable)) - {"valid_BM"}


@dataclass(frozen=True)
class Estimator:
    """An estimator and its constants.

    num_resamples: PAFT's K. normalize: the factor 1/M^q of GARL and PAFT. row_tokens: scored tokens of a row of
    pretraining (mean of a step's rows), whose loss is a mean over tokens; 1 elsewhere. settings: further ones of
    [objective] that the estimator's row declares.
    """

    name: str
    num_resamples: int
    normalize: bool
    seed: int
    row_tokens: float = 1
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config, derived: Derived, row_tokens: float = 1) -> "Estimator":
        """Return the estimator of a run's settings."""
        o = config.objective
        settings = {f.name: getattr(o, f.name) for f in fields(o)}
        return cls(o.estimator, derived.num_resamples, o.normalize, config.training.seed, row_tokens, settings)

    @property
    def row(self) -> EstimatorRow:
        return row_of(self.name)

    @property
    def samples_answers(self) -> bool:
        """Whether the trained answer is a sampled one with a reward, not the gold one."""
        return self.row.samples_answers

    @property
    def imitates(self) -> bool:
        """Whether the rationale is given (SFT) or empty (pretraining): none is drawn, and coefficients need no ln w."""
        return self.row.imitates

    @property
    def uses_q(self) -> bool:
        return self.row.uses_q

    @property
    def minimum_rationales(self) -> int:
        """Fewest valid rationales with which a prompt stays: leave-one-out and group baselines need two."""
        return self.row.minimum_rationales

    def coefficients(self, table: StepTable, *, q: float, step: int) -> Coefficients:
        """Return the constants divided by B and M_b (or K): a pure function of its arguments, so alike on every rank.

        table: the whole step's. Random numbers come from a stream keyed by (seed, step). UserError where the table
        lacks what the estimator's row needs.
        """
        resamples = self.num_resamples if self.row.resamples else None
        scale_B1 = prompt_mean_scale(table.valid_BM, self.minimum_rationales, num_resamples=resamples)[:, None]
        scale_B1 = scale_B1 / self.row_tokens
        function = resolve(self.row, self.row.function)
        rationale_BM, answer_BM = function(DeclaredTable(table, self.row), self.knobs(q=q, step=step))
        return Coefficients(rationale_BM * scale_B1, answer_BM * scale_B1)

    def kl_weights(self, valid_BM: torch.Tensor, beta: float) -> torch.Tensor:
        """beta/(B·M_b) for each token of a sequence that is in the batch, float64 [B, M], 0 elsewhere."""
        return beta * prompt_mean_scale(valid_BM, self.minimum_rationales)[:, None] * valid_BM

    def effective_reward_max(self, table: StepTable, coefficients: Coefficients, *, q: float) -> float:
        """The largest factor on a rationale's score: max c_m / M^q for GARL (Figure 3), its like for the others."""
        valid_BM = table.valid_BM
        if not valid_BM.any():
            return 0.0
        if self.row.effective_reward is not None:
            function = resolve(self.row, self.row.effective_reward)
            return function(DeclaredTable(table, self.row), self.knobs(q=q, step=0)).max().item()
        scale_B1 = prompt_mean_scale(valid_BM, self.minimum_rationales)[:, None]
        factor_BM = (coefficients.rationale_BM / scale_B1).nan_to_num(0.0)  # 0 / 0: a prompt that left the batch
        return factor_BM.max().item()

    def knobs(self, *, q: float, step: int) -> Knobs:
        """Return what the estimator's function may read besides the table."""
        values = {**self.settings, "q": q, "normalize": self.normalize, "num_resamples": self.num_resamples}
        if GENERATOR in self.row.reads:
            values[GENERATOR] = stream(f"{self.name.upper()}'s draws", self.seed, step)
        return Knobs(self.name, {name: values[name] for name in self.row.reads})


class DeclaredTable(StepTable):
    """A step's table as an estimator's function sees it: what its row does not declare is refused, not None.

    names_read: which of the numbers that only some estimators need have been read. UserError where the table lacks one
    that the row declares.
    """

    def __init__(self, table: StepTable, row: EstimatorRow):
        if lacking := [name for name in row.fields if getattr(table, name) is None]:
            raise UserError(f"--estimator {row.name} needs {', '.join(lacking)}, which this step's table does not have")
        object.__setattr__(self, "row", row)
        object.__setattr__(self, "names_read", set())
        super().__init__(**{f.name: getattr(table, f.name) for f in fields(StepTable)})

    def __getattribute__(self, name: str) -> Any:
        if name in _DECLARED:
            if name not in self.row.fields:
                raise UserError(
                    f"--estimator {self.row.name}: its function reads table.{name}, which its row does not declare; "
                    "change needs in megatron_jq/estimators.py"
                )
            self.names_read.add(name)
        return super().__getattribute__(name)
