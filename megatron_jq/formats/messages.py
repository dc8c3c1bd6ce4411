"""F1: records whose prompt is a conversation, a list of {"role", "content"}: chat files as TRL writes them.

    {"messages": [system?, user, assistant]}                  the assistant's turn is the answer (TRL's SFT)
    {"prompt": [system?, user], "completion": [assistant]}    the same (TRL's prompt and completion)
    {"prompt": [system?, user], "answer": text}               --answer-field (TRL's GRPO)

One question at a time: a conversation of several turns is refused, for its earlier answers would be given as prompt.
"""

from megatron_jq.formats.fields import answers_of, text_field
from megatron_jq.formats.linearise import blocks
from megatron_jq.formats.markers import split_completion
from megatron_jq.formats.options import ReadOptions
from megatron_jq.formats.pair import Pair
from megatron_jq.formats.record_error import RecordError

#: Fields of a message that carry some of it beside its text.
_UNREAD = ("tool_calls", "function_call", "tool_call_id", "audio", "images", "refusal")
#: Fields of an assistant's message that hold its rationale.
_THOUGHTS = ("reasoning_content", "thinking")

SAMPLE = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "two and two?"},
        {"role": "assistant", "content": "<think>\n2+2\n</think>\n\n4"},
    ]
}


def is_messages(record: dict, options: ReadOptions) -> bool:
    """Whether its prompt is a list, or it has "messages" and no prompt. Where "reward_model" holds a gold answer, it is
    verl's record, and one of this form only with another answer beside it.
    """
    if options.prompt_field not in record:
        return isinstance(record.get("messages"), list)
    reward = record.get("reward_model")
    is_verl = isinstance(reward, dict) and "ground_truth" in reward and options.answer_field not in record
    return isinstance(record[options.prompt_field], list) and not is_verl


def messages_pair(place: str, record: dict, options: ReadOptions) -> Pair:
    """RecordError: not of one of the forms above, an empty message, markers of a rationale in the wrong place."""
    prompt_field, answer_field = options.prompt_field, options.answer_field
    if isinstance(record.get(prompt_field), list):
        prompt, completion = record[prompt_field], record.get("completion")
        if completion is None:
            answers = answers_of(record, answer_field, place, "--answer-field")
            return conversation_pair(place, prompt, f"field {prompt_field!r}", *answers)
        if answer_field in record and answer_field != "completion":
            detail = f"'completion' and {answer_field!r} could both be the gold answer; leave one of them out"
            raise RecordError(place, "two golds", detail)
        return _completed(place, prompt, f"field {prompt_field!r}", completion, "field 'completion'")
    turns = record.get("messages")
    if not isinstance(turns, list):
        detail = f"neither {prompt_field!r} nor 'messages' is a list of messages (--prompt-field names the field)"
        raise RecordError(place, "no messages", detail)
    if not ends_with_answer(turns):
        fix = "end it with the assistant's, or name fields with --prompt-field messages and --answer-field"
        raise RecordError(place, "no answer", f"the last of 'messages' is not the assistant's turn; {fix}")
    return _completed(place, turns[:-1], "field 'messages'", turns[-1:], "the last of 'messages'")


def _completed(place: str, prompt: list, what: str, completion: object, what_answers: str) -> Pair:
    """The pair of a prompt's messages and a list of the assistant's one."""
    if not isinstance(completion, list) or len(completion) != 1:
        raise RecordError(place, "no answer", f"{what_answers} is not a list of one message, the assistant's")
    role, text = _message(completion[0], what_answers, place)
    if role != "assistant":
        detail = f"{what_answers} has the role {role!r}; the answer is the assistant's turn"
        raise RecordError(place, "no answer", detail)
    if not text:
        raise RecordError(place, "no answer", f"{what_answers} is empty; fill it or remove the record")
    rationale, answer = split_completion(text, what_answers, place)
    thoughts = [completion[0][name] for name in _THOUGHTS if completion[0].get(name)]
    if len(thoughts) + (rationale is not None) > 1:
        raise RecordError(place, "two rationales", f"{what_answers} gives its rationale twice; keep one of them")
    if thoughts:
        rationale = text_field({"rationale": thoughts[0]}, "rationale", place)
    return conversation_pair(place, prompt, what, answer, (), rationale)


def conversation_pair(
    place: str, prompt: object, what: str, gold: str, aliases: tuple[str, ...], rationale: str | None = None
) -> Pair:
    """Return the pair of a prompt's messages and a gold answer. `what`: the prompt, for errors. RecordError: several
    turns, an empty message, contents other than text.
    """
    system, user = _system_and_user(prompt, what, place)
    parts = {"system": system, "user": user}
    return Pair(blocks(system, user), gold, place, aliases, tuple(parts.items()), rationale)


def _system_and_user(prompt: object, what: str, place: str) -> tuple[str, str]:
    if not isinstance(prompt, list):
        raise RecordError(place, "no messages", f"{what} is not a list of messages")
    turns = [_message(turn, f"message {number} of {what}", place) for number, turn in enumerate(prompt)]
    roles = [role for role, _ in turns]
    if roles not in (["user"], ["system", "user"]):
        detail = f"the prompt in {what} has the roles {', '.join(roles) or 'of nobody'}; it must be one user's message"
        raise RecordError(place, "several turns", f"{detail}, after a system message or not")
    system, user = ("", turns[0][1]) if len(turns) == 1 else (turns[0][1], turns[1][1])
    if not user.strip():
        raise RecordError(place, "no prompt", f"the user's message in {what} is empty")
    return system if system.strip() else "", user


def _message(turn: object, what: str, place: str) -> tuple[str, str]:
    """(role, text)."""
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
        detail = f'{what} is not {{"role": text, "content": text}}; other contents, such as images, are not read'
        raise RecordError(place, "no messages", detail)
    if unread := [name for name in _UNREAD if turn.get(name)]:
        raise RecordError(place, "no messages", f"{what} has {unread[0]!r}, which is not read; remove the record")
    return turn["role"], text_field({"content": turn["content"]}, "content", place) if turn["content"].strip() else ""


def ends_with_answer(turns: object) -> bool:
    """Return whether a list of messages ends with the assistant's turn."""
    last = turns[-1] if isinstance(turns, list) and turns else None
    return isinstance(last, dict) and last.get("role") == "assistant"
