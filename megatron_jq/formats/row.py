"""F1: what a data format is: one row of table.py, with every part that the package asks a format for."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from megatron_jq.formats.options import ReadOptions
from megatron_jq.formats.pair import Pair

#: How answers are compared (data/answers.py).
RULES = ("none", "text", "squad", "number")
#: Names of --data-format and of a source's format that are no row. Those of table.MADE with a dash cannot be one.
RESERVED = ("auto", "builtin")


@dataclass(frozen=True, kw_only=True)
class DataFormat:
    """One data format. No part has a default, so none is forgotten; ValueError: a part that cannot be.

    name          of --data-format
    recognise     record, options → whether it has this format's form; must not raise and is asked under "auto"
    pair          "file:line", record, options → prompt, gold answer, aliases; RecordError names the field and the fix
    settings      fields of ReadOptions that the two above read, beside id_field and rationale_field; others are refused
                  as flags under this format
    ids           fields that identify a record, the first that it has counts; () has none. Two equal ids are an error
    rationale     "file:line", record → the worked solution that the record gives, for sft; None: the pair brings one
                  where the record gives one, or --rationale-field names it
    rule          of --match-rule auto, one of RULES
    ratios        whether golds write a percentage as a fraction, so that 0.5% is not 0.5 (rule "number")
    published     whose published evaluation script `evaluate` also scores with, or None
    template      file stem in data/templates/: the words of cold and warm prompts
    pieces        names of Pair.parts, which templates use as {name}
    sample        one record in the published form; the conformance test reads it
    reads, prompt, gold    the format's columns in docs/data.md, in Markdown: fields, the plain prompt, the gold answer
    """

    name: str
    recognise: Callable[[dict, ReadOptions], bool]
    pair: Callable[[str, dict, ReadOptions], Pair]
    settings: tuple[str, ...]
    ids: tuple[str, ...]
    rationale: Callable[[str, dict], str] | None
    rule: Literal["none", "text", "squad", "number"]
    ratios: bool
    published: Literal["hotpotqa", "musique"] | None
    template: str
    pieces: tuple[str, ...]
    sample: dict[str, Any]
    reads: str
    prompt: str
    gold: str

    def __post_init__(self) -> None:
        known = {f.name for f in fields(ReadOptions)} - {"data_format", "bad_records", "rationales"}
        checks = {
            f"name is a word and not one of {RESERVED}": self.name.isidentifier() and self.name not in RESERVED,
            "recognise and pair are functions": callable(self.recognise) and callable(self.pair),
            f"settings is a tuple of {sorted(known)}": _is_names(self.settings) and known.issuperset(self.settings),
            "ids and pieces are tuples of names": _is_names(self.ids) and _is_names(self.pieces),
            "rationale is a function or None": self.rationale is None or callable(self.rationale),
            f"rule is one of {RULES}": self.rule in RULES,
            "ratios is a truth value, and true under rule number alone": self.ratios in (False, self.rule == "number"),
            "published is hotpotqa, musique or None": self.published in ("hotpotqa", "musique", None),
            "sample is a record": isinstance(self.sample, dict) and bool(self.sample),
            "template, reads, prompt and gold are texts": all(
                isinstance(text, str) and text.strip() for text in (self.template, self.reads, self.prompt, self.gold)
            ),
        }
        for demand, holds in checks.items():
            if not holds:
                raise ValueError(f"data format {self.name!r}: {demand}")


def _is_names(names: object) -> bool:
    return isinstance(names, tuple) and all(isinstance(name, str) and name for name in names)
