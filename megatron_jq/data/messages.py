"""F2: records whose prompt is a conversation, a list of {"role", "content"}: chat files as TRL and verl write them.

    messages  {"messages": [system?, user, assistant]}            the assistant's turn is the answer (TRL's SFT)
              {"prompt": [system?, user], "completion": [assistant]}                     (TRL's prompt and completion)
              {"prompt": [system?, user], "answer": text}                                (TRL's GRPO; --answer-field)
    verl      {"prompt": [system?, user], "reward_model": {"style": "rule", "ground_truth": text}, …}

One question at a time: a conversation of several turns is refused, for its earlier answers would be given as prompt.
"""

import json

from megatron_jq.data.faults import RecordError
from megatron_jq.data.jsonl import answers_of, text_field
from megatron_jq.data.linearise import blocks
from megatron_jq.data.markers import split_completion
from megatron_jq.data.pair import Pair
from megatron_jq.errors import UserError

GROUND_TRUTH = "reward_model.ground_truth"
#: Fields of a message that carry some of it beside its text.
_UNREAD = ("tool_calls", "function_call", "tool_call_id", "audio", "images", "refusal")
#: Fields of an assistant's message that hold its rationale.
_THOUGHTS = ("reasoning_content", "thinking")


def chat_format(where: str, record: dict, prompt_field: str, answer_field: str) -> str | None:
    """ "messages" or "verl", by a record's form; None where it has neither. UserError where it has two gold answers."""
    has_answer = answer_field in record
    if isinstance(record.get(prompt_field), list):
        reward = record.get("reward_model")
        if not isinstance(reward, dict) or "ground_truth" not in reward:
            return "messages"
        if has_answer:
            other_way = f"--data-format messages takes {answer_field!r}"
            raise _two_golds(where, answer_field, GROUND_TRUTH, f"--data-format verl takes the latter, {other_way}")
        return "verl"
    if prompt_field in record or not isinstance(record.get("messages"), list):
        return None
    if has_answer and _ends_with_answer(record["messages"]):
        other_way = f"--data-format jsonl --prompt-field NAME takes {answer_field!r}"
        raise _two_golds(where, answer_field, "messages", f"--data-format messages takes the latter, {other_way}")
    return "messages"


def _two_golds(where: str, answer_field: str, other: str, fix: str) -> UserError:
    return UserError(f"{where}: both {answer_field!r} and {other!r} could be the gold answer; {fix}")


def messages_pair(where: str, record: dict, prompt_field: str, answer_field: str) -> Pair:
    """RecordError: not of one of the forms above, an empty message, markers of a rationale in the wrong place."""
    if isinstance(record.get(prompt_field), list):
        prompt, completion = record[prompt_field], record.get("completion")
        if completion is None:
            answers = answers_of(record, answer_field, where, "--answer-field")
            return _pair(where, prompt, f"field {prompt_field!r}", *answers)
        if answer_field in record and answer_field != "completion":
            detail = f"'completion' and {answer_field!r} could both be the gold answer; leave one of them out"
            raise RecordError(where, "two golds", detail)
        return _completed(where, prompt, f"field {prompt_field!r}", completion, "field 'completion'")
    turns = record.get("messages")
    if not isinstance(turns, list):
        detail = f"neither {prompt_field!r} nor 'messages' is a list of messages (--prompt-field names the field)"
        raise RecordError(where, "no messages", detail)
    if not _ends_with_answer(turns):
        fix = "end it with the assistant's, or name fields with --prompt-field messages and --answer-field"
        raise RecordError(where, "no answer", f"the last of 'messages' is not the assistant's turn; {fix}")
    return _completed(where, turns[:-1], "field 'messages'", turns[-1:], "the last of 'messages'")


def verl_pair(where: str, record: dict, prompt_field: str) -> Pair:
    """RecordError: another form, a gold answer that a model or tests judge there."""
    reward = record.get("reward_model")
    if not isinstance(reward, dict):
        raise RecordError(where, "no reward_model", "field 'reward_model' is not an object with 'ground_truth'")
    style = reward.get("style", "rule")
    if style != "rule":
        detail = f"reward_model.style is {style!r}: its text is no gold answer; only 'rule' is read"
        raise RecordError(where, "no gold answer", detail)
    truth = reward.get("ground_truth")
    if isinstance(truth, dict) and list(truth) == ["target"]:
        truth = truth["target"]
    if isinstance(truth, dict) or (isinstance(truth, str) and _is_json_object(truth)):
        detail = f"{GROUND_TRUTH} is an object, such as tests for code, and no answer; write a text or a list of texts"
        raise RecordError(where, "no gold answer", detail)
    answers = answers_of({GROUND_TRUTH: truth} if truth is not None else {}, GROUND_TRUTH, where)
    return _pair(where, record.get(prompt_field), f"field {prompt_field!r}", *answers)


def _completed(where: str, prompt: list, what: str, completion: object, named: str) -> Pair:
    """The pair of a prompt's messages and a list of the assistant's one."""
    if not isinstance(completion, list) or len(completion) != 1:
        raise RecordError(where, "no answer", f"{named} is not a list of one message, the assistant's")
    role, text = _message(completion[0], named, where)
    if role != "assistant":
        raise RecordError(where, "no answer", f"{named} has the role {role!r}; the answer is the assistant's turn")
    if not text:
        raise RecordError(where, "no answer", f"{named} is empty; fill it or remove the record")
    rationale, answer = split_completion(text, named, where)
    thoughts = [completion[0][name] for name in _THOUGHTS if completion[0].get(name)]
    if len(thoughts) + (rationale is not None) > 1:
        raise RecordError(where, "two rationales", f"{named} gives its rationale twice; keep one of them")
    if thoughts:
        rationale = text_field({"rationale": thoughts[0]}, "rationale", where)
    return _pair(where, prompt, what, answer, (), rationale)


def _pair(
    where: str, prompt: object, what: str, gold: str, aliases: tuple[str, ...], rationale: str | None = None
) -> Pair:
    system, user = _system_and_user(prompt, what, where)
    parts = {"system": system, "user": user}
    return Pair(blocks(system, user), gold, where, aliases, tuple(parts.items()), rationale)


def _system_and_user(prompt: object, what: str, where: str) -> tuple[str, str]:
    if not isinstance(prompt, list):
        raise RecordError(where, "no messages", f"{what} is not a list of messages")
    turns = [_message(turn, f"message {number} of {what}", where) for number, turn in enumerate(prompt)]
    roles = [role for role, _ in turns]
    if roles not in (["user"], ["system", "user"]):
        detail = f"the prompt in {what} has the roles {', '.join(roles) or 'of nobody'}; it must be one user's message"
        raise RecordError(where, "several turns", f"{detail}, after a system message or not")
    system, user = ("", turns[0][1]) if len(turns) == 1 else (turns[0][1], turns[1][1])
    if not user.strip():
        raise RecordError(where, "no prompt", f"the user's message in {what} is empty")
    return system if system.strip() else "", user


def _message(turn: object, what: str, where: str) -> tuple[str, str]:
    """(role, text)."""
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
        detail = f'{what} is not {{"role": text, "content": text}}; other contents, such as images, are not read'
        raise RecordError(where, "no messages", detail)
    if unread := [name for name in _UNREAD if turn.get(name)]:
        raise RecordError(where, "no messages", f"{what} has {unread[0]!r}, which is not read; remove the record")
    return turn["role"], text_field({"content": turn["content"]}, "content", where) if turn["content"].strip() else ""


def _ends_with_answer(turns: list) -> bool:
    return bool(turns) and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant"


def _is_json_object(text: str) -> bool:
    if not text.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
