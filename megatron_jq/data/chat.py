"""F2: a model's chat template (Jinja, as Hugging Face folders hold it) as the fixed text around the messages.

The template is rendered around marks instead of the messages, and cut at the marks. So the data is never part of what
is read as control tokens, and every example has the same frame. Jinja's sandbox runs the template: it can reach nothing
but the messages. Its variables, functions and tags are those that transformers' apply_chat_template offers, but for the
clock: a template that writes today's date gets the date that the settings name.
"""

import datetime
import json
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from megatron_jq.errors import UserError
from megatron_jq.formats.markers import THINK_CLOSE, THINK_OPEN, spells_markers

_SYSTEM_MARK, _USER_MARK = "\ue000system\ue001", "\ue000user\ue001"
_REASONING_MARK, _ASKING_MARK = "\ue000assistant\ue001", "\ue000asking\ue001"
_CLOCK = "strftime_now"


@dataclass(frozen=True)
class ChatFrame:
    """The text before the first message's content, between two, and after the last, up to where the rationale's opening
    token follows.

    opened: what the template writes after an opening token of its own; None where it writes none. note: what a user
    should know of it, or nothing.
    """

    texts: tuple[str, ...]
    opened: str | None = None
    note: str = ""


def chat_frame(
    template: str,
    special_tokens: dict[str, str],
    *,
    system: bool,
    origin: str,
    date: str | None = None,
    opens: str | None = THINK_OPEN,
) -> ChatFrame:
    """Render the template around one conversation and cut it at its messages.

    special_tokens: {"bos_token": "…", …}, the template's other variables. system: whether a system message comes first.
    date: YYYY-MM-DD, today's for the template; None: it has no clock. opens: the token that opens a rationale.
    UserError: not a valid template, one that refuses, repeats or changes a message, writes another thinking block than
    that token, or cannot do without a date. `origin` names its place.
    """
    contents = [_SYSTEM_MARK] * system + [_USER_MARK]
    roles = ["system"] * system + ["user"]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    text, note = _render(template, special_tokens, messages, origin, date)
    *frame, text = _cut(text, contents, origin)
    # Some templates open the rationale themselves.
    opened = None
    if opens is not None:
        tail, mark, rest = text.rpartition(opens)
        if mark and not rest.strip():
            text, opened = tail, rest
    if opens == THINK_OPEN and spells_markers(text):
        raise UserError(f"the chat template of {origin} writes a whole rationale of its own; it cannot be used here")
    _refuse_thinking(text.replace(opens or THINK_OPEN, THINK_OPEN), origin)
    return ChatFrame((*frame, text), opened, note)


def turn_frame(
    template: str, special_tokens: dict[str, str], eos: str, *, asks: bool, origin: str, date: str | None = None
) -> tuple[str, str]:
    """The text from the end of the assistant's turn, which begins with `eos`, to where its next turn begins: before and
    after a user's message between the two (asks), or all of it and nothing.

    The other arguments are chat_frame's. UserError: as there; a turn that does not end with `eos`, or no other one
    after it.
    """
    contents = [_USER_MARK, _REASONING_MARK, *[_ASKING_MARK] * asks]
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]  # noqa: B905
    text, _ = _render(template, special_tokens, messages, origin, date)
    _, _, before, *rest = _cut(text, contents, origin)
    before = before.lstrip()
    if not before.startswith(eos):
        raise UserError(
            f"the chat template of {origin} ends an assistant's turn with {before[:20]!r}, and its eos_token is "
            f"{eos!r}: correct eos_token in tokenizer_config.json, or name what closes a rationale with --think-close"
        )
    after = "".join(rest)
    if not asks and not before.removeprefix(eos).strip():
        raise UserError(
            f"the chat template of {origin} opens no other turn of the assistant after one that ended; give a "
            "--prompt-template whose [warm] has answer_prompt, the user's message between the two"
        )
    _refuse_thinking(before + after, origin)
    return before, after


def _cut(text: str, contents: list[str], origin: str) -> list[str]:
    """The text before, between and after the contents."""
    parts = []
    for content in contents:
        before, mark, text = text.partition(content)
        if not mark or content in text:
            raise UserError(f"the chat template of {origin} does not hold each message once; it cannot be used here")
        parts.append(before)
    return [*parts, text]


def _refuse_thinking(text: str, origin: str) -> None:
    if spells_markers(text):
        raise UserError(
            f"the chat template of {origin} adds a thinking block of its own where the policy's turn begins; give "
            f"--think-open '{THINK_OPEN}' --think-close '{THINK_CLOSE}', or take the block out of the template"
        )


def _render(
    template: str, special_tokens: dict[str, str], messages: list[dict], origin: str, date: str | None
) -> tuple[str, str]:
    """The conversation's text, and a note on the date."""
    environment = _environment(date)
    try:
        undated = date is None and _CLOCK in jinja2.meta.find_undeclared_variables(environment.parse(template))
        variables = {"messages": messages, "tools": None, "documents": None, **special_tokens}
        text = environment.from_string(template).render(**variables, add_generation_prompt=True, enable_thinking=True)
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if date is None and _CLOCK in str(error):
            raise UserError(
                f"the chat template of {origin} writes today's date, and so would change the data at midnight; "
                "give --chat-date YYYY-MM-DD"
            ) from error
        raise UserError(f"the chat template of {origin} cannot be used: {error}") from error
    note = "the chat template can write today's date; without --chat-date it writes what it has in its place"
    return text, note if undated else ""


def _environment(date: str | None) -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, namespace=_Namespace)
    if date is not None:
        environment.globals[_CLOCK] = datetime.datetime.strptime(date, "%Y-%m-%d").strftime
    return environment


class _Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}, which marks what the assistant wrote: its body, in a scope of its own."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that begin with an underscore, which lead out of the sandbox."""

    def __init__(*args: Any, **attributes: Any):
        self, *positional = args  # so that namespace(self=…) is an attribute like any other
        for name in dict(*positional, **attributes):
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(self, *positional, **attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter would escape <, > and & for web pages."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
