"""F2: prompt templates: how a record's pieces become x, cold or warm, and what stands at the rationale's two ends.

Templates are TOML files: one a data set in the package's folder templates/, or a user's own. Beside the words they hold
what the paper fixes for the data set: budgets and the sizes of the splits.
"""

import hashlib
import string
from dataclasses import dataclass, fields
from pathlib import Path

from megatron_jq.errors import UserError
from megatron_jq.formats.pair import Pair
from megatron_jq.formats.table import format_named
from megatron_jq.toml_files import did_you_mean, read_toml

PROMPT_STYLES = ("plain", "cold", "warm")
_FOLDER = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class PromptStyle:
    """One way to write x. `prompt` and `system` hold a record's pieces as {name}; {{ and }} are braces.

    chat: put the prompt into the tokenizer's chat template. after_open and after_close follow the tokens that open and
    close a rationale: fixed text that nobody samples. The first ends x; the second is the bridge between rationale and
    answer. answer_prompt: where the end of the model's turn closes a rationale, the user's message between it and the
    turn of the answer; empty: no message.
    """

    prompt: str = "{prompt}"
    system: str = ""
    chat: bool = False
    after_open: str = ""
    after_close: str = ""
    answer_prompt: str = ""

    def fill(self, pair: Pair) -> str:
        """The prompt's words for one pair. UserError: a piece that the pair does not have."""
        text = _filled(self.prompt, pair)
        return text.strip() if self.chat else text  # many chat templates trim; so all do, and the frame stays fixed

    def fill_system(self, pair: Pair) -> str:
        return _filled(self.system, pair).strip()


@dataclass(frozen=True)
class PaperSetting:
    """What the paper fixes for a data set: tokens of rationale and answer, examples of each split."""

    rationale_budget: int
    answer_budget: int
    train: int
    validation: int
    test: int

    @property
    def split_sizes(self) -> dict[str, int]:
        return {"train": self.train, "validation": self.validation, "test": self.test}


@dataclass(frozen=True)
class PromptTemplate:
    """A file's contents. digest: SHA-256 of the file."""

    cold: PromptStyle
    warm: PromptStyle
    paper: PaperSetting | None
    digest: str

    def style(self, name: str) -> PromptStyle:
        """The style; "plain" is the reader's own text and no template at all."""
        if name not in PROMPT_STYLES:
            hint = did_you_mean(name, PROMPT_STYLES, f"it is one of {', '.join(PROMPT_STYLES)}")
            raise UserError(f"--prompt-style {name} is not known; {hint}")
        return {"plain": PromptStyle(), "cold": self.cold, "warm": self.warm}[name]


def template_of(data_format: str, path: str | Path | None = None) -> PromptTemplate:
    """Return the file that the user named, or else the package's for the data format."""
    return read_template(_FOLDER / f"{format_named(data_format).template}.toml" if path is None else path)


def read_template(path: str | Path) -> PromptTemplate:
    """UserError: not readable, an unknown table or key, a wrong type, a prompt that cannot be filled."""
    tables = read_toml(path)
    kinds = {"cold": PromptStyle, "warm": PromptStyle, "paper": PaperSetting}
    values: dict[str, PromptStyle | PaperSetting | None] = {"cold": PromptStyle(), "warm": PromptStyle(), "paper": None}
    for name, table in tables.items():
        if name not in kinds or not isinstance(table, dict):
            raise UserError(f"{path}: unknown table [{name}]; {did_you_mean(name, kinds, f'valid: {list(kinds)}')}")
        values[name] = _typed(kinds[name], table, f"{path}: [{name}]")
    for name in ("cold", "warm"):
        _check_style(values[name], f"{path}: [{name}]")
    return PromptTemplate(**values, digest=hashlib.sha256(Path(path).read_bytes()).hexdigest())


def _typed(kind: type, table: dict, place: str):
    types = {f.name: f.type for f in fields(kind)}
    for key, value in table.items():
        if key not in types:
            raise UserError(f"{place} unknown key {key}; {did_you_mean(key, types, f'valid: {list(types)}')}")
        if type(value) is not types[key]:
            raise UserError(f"{place} {key} = {value!r}: expected {types[key].__name__}")
    missing = [f.name for f in fields(kind) if kind is PaperSetting and f.name not in table]
    if missing:
        raise UserError(f"{place} lacks {', '.join(missing)}")
    return kind(**table)


def _check_style(style: PromptStyle, place: str) -> None:
    if not style.prompt.strip():
        raise UserError(f"{place} prompt is empty; write at least {{prompt}}")
    for name in ("system", "answer_prompt"):
        if getattr(style, name) and not style.chat:
            raise UserError(f"{place} {name} needs chat = true")
    for text in (style.prompt, style.system):
        try:
            pieces = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UserError(f"{place} prompt: {error}; write {{{{ and }}}} for braces") from error
        for _, name, form, conversion in pieces:
            if name is not None and (not name.isidentifier() or form or conversion):
                raise UserError(f"{place} prompt: {{{name}}} is no piece's name; write {{{{ and }}}} for braces")


def _filled(text: str, pair: Pair) -> str:
    pieces = {"prompt": pair.prompt, **dict(pair.parts)}
    try:
        return text.format_map(pieces)
    except KeyError as error:
        name = str(error.args[0])
        hint = did_you_mean(name, pieces, f"it has {', '.join(pieces)}")
        raise UserError(f"the prompt template asks for {{{name}}}, which {pair.place} does not have; {hint}") from error
