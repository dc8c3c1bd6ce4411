"""F4: `--reward MODULE:FUNCTION`: a reward, or a judge, of the user's own.

The function is called with keyword arguments, once for each sampled answer, in one process of each replica:

    def reward(*, prompt: str, rationale: str, answer: str, golds: tuple[str, ...],
               rationale_ids: tuple[int, ...], answer_ids: tuple[int, ...], ended: bool) -> float

prompt: the text x. answer: without its end of text. golds: y*, then its aliases (and what the tokenizer makes of them).
rationale_ids: up to its closing token, included. ended: the answer ended by itself. One that takes `**_` may leave some
out. A number must come back that a float can hold, not NaN or infinite; True is 1, NumPy's too. Its module is imported
before work starts, never because a checkpoint names it.
"""

import importlib
import inspect
import math
import numbers
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import numpy

from megatron_jq.config import Config
from megatron_jq.data.round_trips import text_of
from megatron_jq.data.tokenizers import Tokenizer
from megatron_jq.errors import RunFailure, UserError
from megatron_jq.evaluate.math_judge import check_installed
from megatron_jq.records import Example, Rollout

KEYWORDS = ("prompt", "rationale", "answer", "golds", "rationale_ids", "answer_ids", "ended")


@dataclass(frozen=True)
class Reward:
    """The user's function. binary: 0 and 1 are the only values that its reader can use, and why."""

    name: str
    function: Callable[..., float]
    binary: str | None = None

    def of(self, rollout: Rollout, example: Example, golds: tuple[str, ...], tokenizer: Tokenizer) -> float:
        """The reward of a sampled answer. RunFailure where the function fails, or gives no usable number."""
        sample = {
            "prompt": example.prompt_text,
            "rationale": tokenizer.decode(list(rollout.rationale_ids[: rollout.num_sampled])),
            "answer": text_of(rollout.answer_ids, tokenizer),
            "golds": golds,
            "rationale_ids": rollout.rationale_ids,
            "answer_ids": rollout.answer_ids,
            "ended": rollout.answer_ids[-1:] == (tokenizer.eos_id,),
        }
        location = f"--reward {self.name}, prompt {rollout.prompt_slot}, sample {rollout.rationale_slot}"
        try:
            value = self.function(**sample)
        except (Exception, SystemExit) as error:
            raise RunFailure(f"{location}: {_last_line(error)}") from error
        value = bool(value) if isinstance(value, numpy.bool_) else value
        if isinstance(value, numbers.Real) and _is_beyond_float(value):
            raise RunFailure(f"{location}: it returned a number beyond a float's range; a finite number must come back")
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise RunFailure(f"{location}: it returned {value!r}; a finite number must come back")
        if self.binary is not None and value not in (0, 1):
            raise RunFailure(f"{location}: it returned {value!r}; {self.binary} needs 0 or 1")
        return float(value)


def reward_of(config: Config) -> Reward | None:
    """The settings' own reward, and that what `--match` needs is installed: before any work. UserError otherwise."""
    t, o = config.training, config.objective
    if t.match == "math":
        check_installed()
    if t.reward is None:
        return None
    by_estimator = f"--estimator {o.estimator}" if o.row.binary_rewards else None
    return load_reward(t.reward, "--match reward" if t.match == "reward" else by_estimator)


def load_reward(name: str, binary: str | None = None) -> Reward:
    """Import `MODULE:FUNCTION`. UserError: another form, no such module or function, one that cannot be called so."""
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        raise UserError(f"--reward {name}: write MODULE:FUNCTION, such as my_rewards:length")
    try:
        function = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"--reward {name}: the module cannot be imported ({_last_line(error)}); put its folder on PYTHONPATH"
        ) from error
    for part in attribute.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        raise UserError(f"--reward {name}: module {module_name} has no function {attribute}")
    try:
        inspect.signature(function).bind(**dict.fromkeys(KEYWORDS))
    except TypeError as error:
        raise UserError(
            f"--reward {name}: {error}; it is called with the keywords {', '.join(KEYWORDS)} (take **_ for those that "
            "you do not need)"
        ) from error
    except ValueError:
        pass  # a function without a signature that can be read; the first call tells
    return Reward(name, function, binary)


def _is_beyond_float(value: numbers.Real) -> bool:
    try:
        float(value)
    except OverflowError:
        return True
    return False


def _last_line(error: BaseException) -> str:
    """ "ValueError: no (my_rewards.py:12)"."""
    line = traceback.format_exception_only(error)[-1].strip()
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
    return f"{line} ({os.path.basename(outside[-1].filename)}:{outside[-1].lineno})" if outside else line
