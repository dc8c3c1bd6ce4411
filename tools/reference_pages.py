#!/usr/bin/env python3
"""Write docs/settings.md, docs/metrics.md, docs/reasoning-gym.md and the table of docs/baselines.md from the code.

    python tools/reference_pages.py

A test compares the pages with what this writes. Run it after you change a setting, a metric or an estimator; what is
said of a metric stands in tools/metrics.toml.
"""

import ast
import dataclasses
import io
import sys
import tokenize
import typing
from pathlib import Path
from typing import Literal

from megatron_jq import config_reads, settings
from megatron_jq.cli.parser import run_tool, tool_parser
from megatron_jq.config_estimators import READ_BY
from megatron_jq.data.reasoning_gym_sets import CHECKED_VERSION, REFUSED, SETS
from megatron_jq.errors import UserError
from megatron_jq.estimators import markdown_table
from megatron_jq.records import MEASURED, StepMetrics
from megatron_jq.toml_files import read_toml

REPOSITORY = Path(__file__).resolve().parents[1]
METRICS = REPOSITORY / "tools" / "metrics.toml"
NOTE = "<!-- Written by tools/reference_pages.py. Change the source and run it again; do not edit this page. -->"
METRICS_HEAD = f"""{NOTE}

# Metrics

A run writes one JSON object per step to `RUN_DIR/metrics.jsonl`, and the same values to TensorBoard. A value that does
not exist is `null`, and so is one that is not finite. You can draw several runs in one picture:

    python tools/plot_run.py RUN... --output run.png

Two runs with the same settings agree in all metrics but those marked \\* (times and memory): bit for bit at one layout,
to rounding at another.

| key | unit | meaning | `null` when | when it goes wrong |
|---|---|---|---|---|
"""
SETTINGS_HEAD = f"""{NOTE}

# Settings

Each line is a flag of `megatron-jq train` and, with underscores, a key of a `--config` file. The run directory's
`config.toml` holds them all. You turn a switch off by `--no-…`. A flag that a command would not read is refused, with
the reason. In a file it is noted and ignored.

    megatron-jq train --estimator paft --q 0.5 --train-iters 20 --run-dir runs/paft

*Training reads it with* names the estimators, *also read by* the other commands: *bench* is `tools/bench_step.py`,
*prepare* is `tools/prepare_data.py`, *rescore* is `evaluate` with `--rescore`. `tools/estimate.py` takes training's
flags. `generate` reads what *evaluate* does, but for `--eval-data`, `--eval-samples` and `--reward`.
"""
GYM_HEAD = f"""{NOTE}

# Sets of reasoning-gym

`--train-data reasoning-gym:NAME` takes each of the first table's sets
([data.md](data.md#sets-of-reasoning-gym)). They are those of reasoning-gym {CHECKED_VERSION} in which 500 items of the
default settings had a gold answer of one line with one way to write it, and were the same in every process.

*Answers* are the shortest, median and longest gold in characters. *Commonest* is the share of the gold answer that
occurs most: what a policy gets that ignores the question. *Worked out again* counts golds that were computed without
the package; none of these was wrong.

| set | question | answers | compared as | commonest | worked out again | note |
|---|---|--:|---|--:|--:|---|
"""
COMMANDS = {
    "evaluate": "evaluate",
    "evaluate --rescore": "rescore",
    "tools/prepare_data.py": "prepare",
    "tools/bench_step.py": "bench",
}


def metrics_page() -> str:
    """Return docs/metrics.md. UserError where a metric has no table in tools/metrics.toml, or a table no metric."""
    texts, names = read_toml(METRICS), [field.name for field in dataclasses.fields(StepMetrics)]
    if set(names) != texts.keys():
        raise UserError(f"{METRICS.name} and StepMetrics differ: {', '.join(sorted(set(names) ^ texts.keys()))}")
    lines = []
    for name in names:
        text, key = texts[name], f"`{name}`" + (r" \*" if name in MEASURED else "")
        rest = (text["meaning"], text.get("null", "never"), text.get("look_at", "–"))
        lines.append(_row((key, text.get("unit", "–"), *rest)))
    return METRICS_HEAD + "\n".join(lines) + "\n"


def settings_page() -> str:
    """Return docs/settings.md. UserError where a setting has no help text."""
    texts, lines = help_texts(), []
    silent = [name for name in settings.SETTINGS if not texts.get(name)]
    if silent:
        raise UserError(f"settings.py: no comment says what these do: {', '.join(silent)}")
    for group in dataclasses.fields(settings.Config):
        lines += ["", f"## {group.name}", "", " ".join((group.type.__doc__ or "").split()), ""]
        lines.append("| flag | default | values | meaning | training reads it with | also read by |")
        lines.append("|---|---|---|---|---|---|")
        for field in dataclasses.fields(group.type):
            meaning = f"{texts[field.name].replace('None: ', 'unset: ')}{_condition(field.name)}"
            flag = f"`--{field.name.replace('_', '-')}`"
            readers = (_estimators(field.name), _commands(field.name))
            lines.append(_row((flag, _default(field), _values(settings.SETTINGS[field.name][1]), meaning, *readers)))
    return SETTINGS_HEAD + "\n".join(lines) + "\n"


def baselines_page() -> str:
    """Return docs/baselines.md as it is, with the table of estimators between its two marks written by their rows."""
    text = (REPOSITORY / "docs" / "baselines.md").read_text(encoding="utf-8")
    before, first, rest = text.partition("<!-- estimators: written by tools/reference_pages.py -->\n")
    _, last, after = rest.partition("<!-- end of estimators -->\n")
    return f"{before}{first}\n{markdown_table()}\n\n{last}{after}"


def gym_page() -> str:
    """Return docs/reasoning-gym.md: the sets that can be used, and the others by the reason why they are refused."""
    lines = []
    for row in SETS.values():
        compared = "number" if row.numbers else "text"
        checked = str(row.recomputed or "none")
        figures = (row.answers, compared, f"{row.commonest:.0%}", checked)
        lines.append(_row((f"`{row.name}`", row.what, *figures, row.note)))
    by_reason: dict[str, list[str]] = {}
    for name, reason in REFUSED.items():
        by_reason.setdefault(reason, []).append(f"`{name}`")
    lines += ["", "These are refused:", "", "| sets | because |", "|---|---|"]
    lines += [_row((", ".join(names), reason)) for reason, names in by_reason.items()]
    return GYM_HEAD + "\n".join(lines) + "\n"


def help_texts() -> dict[str, str]:
    """Return setting → the comment that `--help` shows: the one on the field's line, else those above it."""
    source = Path(settings.__file__).read_text(encoding="utf-8")
    comments: dict[int, str] = {}
    alone: set[int] = set()  # lines that hold nothing else
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.string != "# fmt: skip":
            comments[token.start[0]] = token.string.removeprefix("#").strip()
            if token.line.lstrip().startswith("#"):
                alone.add(token.start[0])
    texts = {}
    for group in ast.parse(source).body:
        if not isinstance(group, ast.ClassDef) or group.name == "Config":
            continue
        for node in group.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                lines = [n for n in range(node.lineno, node.end_lineno + 1) if n in comments]
                first = node.lineno
                while not lines and first - 1 in alone:
                    first -= 1
                texts[node.target.id] = " ".join(comments[n] for n in lines or range(first, node.lineno))
    return texts


def _row(cells: typing.Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _default(field: dataclasses.Field) -> str:
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return "unset" if field.default is None else f"`{field.default}`"


def _values(kind: object) -> str:
    """Return what may be given, in words."""
    names = {int: "whole number", float: "number", str: "text", bool: "switch"}
    parts = [kind] if typing.get_origin(kind) is Literal else typing.get_args(kind) or [kind]
    words = []
    for part in parts:
        if typing.get_origin(part) is Literal:
            words += [f"`{choice}`" for choice in typing.get_args(part) if choice is not None]
        elif part is not type(None):
            words.append(names[part])
    return ", ".join(words)


def _condition(name: str) -> str:
    """Return which other settings must ask for it."""
    always = [need.says for need in config_reads.NEEDS if name in need.settings]
    training = [need.says for need in config_reads.NEEDS_IN_TRAINING if name in need.settings]
    text = f". Needs {', and '.join(always)}" if always else ""
    return f"{text}. In training it needs {', and '.join(training)}" if training else text


def _estimators(name: str) -> str:
    """Return those that read it, or those that do not where these are fewer."""
    every = list(dict.fromkeys(estimator for readers in READ_BY.values() for estimator in readers))
    readers = READ_BY.get(name, every)
    others = [estimator for estimator in every if estimator not in readers]
    if not others:
        return "all"
    return ", ".join(readers) if len(readers) <= len(others) else f"all but {', '.join(others)}"


def _commands(name: str) -> str:
    return ", ".join(short for command, short in COMMANDS.items() if name in config_reads.READS[command]) or "–"


PAGES = {"metrics.md": metrics_page, "settings.md": settings_page, "baselines.md": baselines_page,
    "reasoning-gym.md": gym_page}


def main() -> int:
    """Returns the exit code."""
    return run_tool(__file__, _run)


def _run() -> int:
    tool_parser(__file__, __doc__).parse_args()
    for name, page in PAGES.items():
        path = REPOSITORY / "docs" / name
        path.write_text(page(), encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
