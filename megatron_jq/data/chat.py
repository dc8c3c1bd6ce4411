"""F2: a model's chat template (Jinja, as Hugging Face folders hold it) as the fixed text around the messages.

The template is rendered around marks instead of the messages, and cut at the marks. So the data is never part of what
is read as control tokens, and every example has the same frame, token for token. Jinja's sandbox runs the template: it
can reach nothing but the messages.
"""

import jinja2
import jinja2.ext
import jinja2.sandbox

from megatron_jq.errors import UserError

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
_SYSTEM_MARK, _USER_MARK = "\ue000system\ue001", "\ue000user\ue001"


def chat_frame(template: str, special_tokens: dict[str, str], *, system: bool, origin: str) -> tuple[str, ...]:
    """The text before the first message's content, between two, and after the last, up to where `<think>` follows.

    special_tokens: {"bos_token": "…", …}, the template's other variables. system: whether a system message comes first.
    UserError: not a valid template, or one that refuses, repeats or changes a message. `origin` names its place.
    """
    contents = [_SYSTEM_MARK] * system + [_USER_MARK]
    roles = ["system"] * system + ["user"]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    text = _render(template, special_tokens, messages, origin)
    frame = []
    for content in contents:
        before, mark, text = text.partition(content)
        if not mark or content in text:
            raise UserError(f"the chat template of {origin} does not hold each message once; it cannot be used here")
        frame.append(before)
    # Some templates open the rationale themselves.
    tail, mark, rest = text.rpartition(THINK_OPEN)
    if mark and not rest.strip():
        text = tail
    if THINK_OPEN in text or THINK_CLOSE in text:
        raise UserError(f"the chat template of {origin} writes a whole rationale of its own; it cannot be used here")
    return (*frame, text)


def _render(template: str, special_tokens: dict[str, str], messages: list[dict], origin: str) -> str:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, enable_thinking=True, tools=None, **special_tokens
        )
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"the chat template of {origin} cannot be used: {error}") from error


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
