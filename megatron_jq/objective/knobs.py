"""What an estimator's function reads besides the step's table."""

from collections.abc import Mapping
from typing import Any

from megatron_jq.errors import UserError
from megatron_jq.objective.paft import Generator


class Knobs:
    """Constants of one step: knobs.q, knobs.normalize, … as far as the estimator's row declares them.

    q: the step's. num_resamples: PAFT's K. generator: random numbers of this estimator, seed and step, alike on every
    rank. Any other name is a setting of [objective]. Reading one that the row does not declare is a UserError: what a
    run says of its settings would not be true. names_read: what has been read so far.
    """

    q: float
    normalize: bool
    num_resamples: int
    generator: Generator

    def __init__(self, estimator: str, values: Mapping[str, Any]):
        self._estimator, self._values = estimator, dict(values)
        self.names_read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._values:
            self.names_read.add(name)
            return self._values[name]
        raise UserError(
            f"--estimator {self._estimator}: its function reads knobs.{name}, which its row does not declare; add "
            f'"{name}" to reads in megatron_jq/estimators.py'
        )
