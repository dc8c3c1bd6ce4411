"""F2: which tokens open and close a rationale: what --think-open and --think-close say, and what the tokenizer has.

TOKEN: any special or added token of the tokenizer. none, of --think-open: nothing opens a rationale. end-of-turn, of
--think-close: the token that ends a text; the prompt's template opens another turn after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_jq.errors import UserError
from megatron_jq.formats.markers import THINK_CLOSE, THINK_OPEN

NO_OPENER, END_OF_TURN = "none", "end-of-turn"
_NAMED_AT_MOST = 3


@dataclass(frozen=True)
class MarkerChoice:
    """--think-open and --think-close. None: `<think>` and `</think>`.

    or_end_of_turn: where a tokenizer lacks those, nothing opens a rationale and the end of the turn closes it; without,
    such a tokenizer is refused.
    """

    open: str | None = None
    close: str | None = None
    or_end_of_turn: bool = False


#: For what reads no rationale: any tokenizer will do.
ANY_MARKERS = MarkerChoice(or_end_of_turn=True)


class MarkerTokens(Protocol):
    """What the choice asks of a tokenizer. origin: its flag and place. kind: what it calls a token that can mark. eos:
    the name of the token that ends a text.
    """

    origin: str
    kind: str
    eos: str

    def has_marker(self, name: str) -> bool:
        """Whether a token has that name which no text of the data gives."""
        ...

    def spelled(self, text: str) -> Sequence[str]:
        """The tokens of a text, by their names."""
        ...

    def unused(self) -> Sequence[str]:
        """Names of tokens that seem to be made for a use like this one."""
        ...


def markers_of(choice: MarkerChoice, tokens: MarkerTokens) -> tuple[str | None, str]:
    """Return the names of the tokens that open (None: nothing does) and close a rationale.

    UserError: a marker that is no one token of its own, opens and closes, or ends a text as it opens.
    """
    default = tokens.has_marker(THINK_CLOSE) and (choice.open is not None or tokens.has_marker(THINK_OPEN))
    close = choice.close
    if close is None:
        close = END_OF_TURN if choice.or_end_of_turn and not default else THINK_CLOSE
    close = tokens.eos if close == END_OF_TURN else close
    opened = choice.open
    if opened is None:
        opened = NO_OPENER if close == tokens.eos else THINK_OPEN
    pairs = [("--think-open", opened, choice.open), ("--think-close", close, choice.close)]
    for flag, name, asked in pairs[opened == NO_OPENER :]:
        if name != tokens.eos and not tokens.has_marker(name):
            raise UserError(_missing(flag, name, asked, tokens))
    if opened in (close, tokens.eos):
        other = "closes it" if opened == close else "ends a text"
        raise UserError(
            f"--think-open {opened} also {other}; give another token, or --think-open {NO_OPENER} for no opener"
        )
    return None if opened == NO_OPENER else opened, close


def _missing(flag: str, name: str, asked: str | None, tokens: MarkerTokens) -> str:
    if asked is None:
        return f"{tokens.origin} has no {tokens.kind} {name!r}, which marks a rationale; {_ways(tokens)}"
    pieces = tokens.spelled(name)
    if len(pieces) == 1:
        problem = f"is an ordinary token of {tokens.origin}, which any text can give"
    else:
        shown = ", ".join(map(repr, pieces[:_NAMED_AT_MOST])) + (", …" if len(pieces) > _NAMED_AT_MOST else "")
        problem = f"is {len(pieces)} tokens of {tokens.origin} ({shown}), and a marker is one"
    return f"{flag} {name} {problem}; {_ways(tokens)}"


def _ways(tokens: MarkerTokens) -> str:
    unused = tokens.unused()[:_NAMED_AT_MOST]
    such_as = f" (such as {', '.join(unused)})" if unused else ""
    return (
        f"choose (a) special or added tokens that it has{such_as}: --think-open TOKEN --think-close TOKEN; (b) no "
        f"opener: --think-open {NO_OPENER}; (c) the end of the model's turn: --think-close {END_OF_TURN}, the default "
        f"with --prompt-style warm; or (d) tokens that are added: megatron-jq convert hf-to-megatron --add-tokens "
        f"'{THINK_OPEN}' '{THINK_CLOSE}'"
    )
