"""F1: verl's record of reinforcement learning: a conversation, and the gold answer in "reward_model".

    {"prompt": [system?, user], "reward_model": {"style": "rule", "ground_truth": text}, …}
"""

import json

from megatron_jq.formats.fields import answers_of
from megatron_jq.formats.messages import conversation_pair
from megatron_jq.formats.options import ReadOptions
from megatron_jq.formats.pair import Pair
from megatron_jq.formats.record_error import RecordError

GROUND_TRUTH = "reward_model.ground_truth"
SAMPLE = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "two and two?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "extra_info": {"split": "train", "index": 0},
}


def is_verl(record: dict, options: ReadOptions) -> bool:
    """Whether its prompt is a list and "reward_model" holds a gold answer."""
    reward = record.get("reward_model")
    return isinstance(record.get(options.prompt_field), list) and isinstance(reward, dict) and "ground_truth" in reward


def verl_pair(place: str, record: dict, options: ReadOptions) -> Pair:
    """RecordError: another form, a gold answer that a model or tests judge there."""
    reward = record.get("reward_model")
    if not isinstance(reward, dict):
        raise RecordError(place, "no reward_model", "field 'reward_model' is not an object with 'ground_truth'")
    style = reward.get("style", "rule")
    if style != "rule":
        detail = f"reward_model.style is {style!r}: its text is no gold answer; only 'rule' is read"
        raise RecordError(place, "no gold answer", detail)
    truth = reward.get("ground_truth")
    if isinstance(truth, dict) and list(truth) == ["target"]:
        truth = truth["target"]
    if isinstance(truth, dict) or (isinstance(truth, str) and _is_json_object(truth)):
        detail = f"{GROUND_TRUTH} is an object, such as tests for code, and no answer; write a text or a list of texts"
        raise RecordError(place, "no gold answer", detail)
    answers = answers_of({GROUND_TRUTH: truth} if truth is not None else {}, GROUND_TRUTH, place)
    return conversation_pair(place, record.get(options.prompt_field), f"field {options.prompt_field!r}", *answers)


def _is_json_object(text: str) -> bool:
    if not text.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
