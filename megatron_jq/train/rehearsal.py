"""F4: an estimator's function on made-up numbers, before any work: what could not train a run is refused by name."""

from typing import Any

import torch

from megatron_jq.errors import UserError
from megatron_jq.estimators import resolve
from megatron_jq.objective.table import StepTable
from megatron_jq.train.estimators import DeclaredTable, Estimator

#: Nats: an ordinary ln w, and one of a cold start, at which w itself is 0 in float64.
_LEVELS = (-1.0, -2660.0)


def rehearse(estimator: Estimator, num_rationales: int) -> None:
    """Call the functions of an estimator's row. UserError, which names it and the fix, where it could not train a run.

    A function that reads what its row does not declare, does not read what it declares, fails, or breaks its contract
    would end a run at its first step, or make what is said of the run untrue. One that gives every rationale the
    constant 0 would train on nothing and end well.
    """
    row = estimator.row
    at, q = f"--estimator {row.name}: {row.function}", float(estimator.settings["q"])
    for level in _LEVELS:
        numbers = _made_up_table(level, num_rationales, row.minimum_rationales)
        table, knobs = DeclaredTable(numbers, row), estimator.knobs(q=q, step=0)
        try:
            result = resolve(row, row.function)(table, knobs)
            fault = _fault(result, numbers.valid_BM)
            if fault is None and row.effective_reward is not None:
                reward_B = resolve(row, row.effective_reward)(DeclaredTable(numbers, row), estimator.knobs(q=q, step=0))
                if reward_B.shape != numbers.valid_BM.shape[:1]:
                    fault = f"has an effective_reward of shape {tuple(reward_B.shape)} where [B] is asked for"
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{at} fails on made-up numbers: {type(error).__name__}: {error}") from error
        if fault is not None:
            raise UserError(f"{at} {fault}")
        unread = [f"table.{name}" for name in row.fields if name not in table.names_read]
        unread += [f"knobs.{name}" for name in row.reads if name not in knobs.names_read]
        if unread:
            raise UserError(
                f"{at} does not read {', '.join(unread)}, which its row declares; correct needs or reads in "
                "megatron_jq/estimators.py"
            )
        if level == _LEVELS[0] and not any(each_BM.any() for each_BM in result):
            raise UserError(
                f"{at} gives every rationale the constant 0 with --num-rationales {num_rationales}: nothing would be "
                "trained; give more, and correct minimum_rationales in its row in megatron_jq/estimators.py"
            )


def _made_up_table(level: float, num_rationales: int, minimum: int) -> StepTable:
    """Distinct ln w, rewards of both kinds, and a rationale that is not valid where the prompt can spare one."""
    shape = (2, num_rationales)
    number_BM = torch.arange(2 * num_rationales, dtype=torch.float64).reshape(shape)
    valid_BM = torch.ones(shape, dtype=torch.bool)
    valid_BM[1, -1] = num_rationales <= minimum
    log_w_BM = (level - number_BM / 3).requires_grad_()  # so that coefficients which keep a gradient are seen
    return StepTable(log_w_BM, valid_BM, log_w_BM - 1.0, log_w_BM - 2.0, (number_BM + 1) % 2)


def _fault(result: Any, valid_BM: torch.Tensor) -> str | None:
    """Return what an estimator's function promises and does not keep."""
    if not (isinstance(result, tuple) and len(result) == 2 and all(isinstance(t, torch.Tensor) for t in result)):
        return f"returns {type(result).__name__}; two tensors must come back: (rationale_BM, answer_BM)"
    for name, each_BM in zip(("rationale_BM", "answer_BM"), result, strict=True):
        if each_BM.shape != valid_BM.shape or each_BM.dtype != torch.float64 or each_BM.requires_grad:
            came = f"{list(each_BM.shape)}, {each_BM.dtype}{', with a gradient' * each_BM.requires_grad}"
            return f"returns {name} as {came}; float64 {list(valid_BM.shape)} without a gradient must come back"
        if not torch.isfinite(each_BM).all():
            return f"returns {name} with a number that is not finite"
        if each_BM[~valid_BM].any():
            return f"returns {name} other than 0 for a rationale that is not valid"
    return None
