"""What every row of formats/table.py must do, over the record that the row brings as its sample.

A new format is a row; these tests read it from the table. What a test refuses is in its name.
"""

import copy
import dataclasses
import json
import re
import types
from pathlib import Path
from typing import get_args

import pytest

from megatron_jq.config import parse_args
from megatron_jq.data import template as templates
from megatron_jq.data.dataset import load_source
from megatron_jq.data.prepare import prepare
from megatron_jq.data.reading import encode_reading, read_source
from megatron_jq.data.template import template_of
from megatron_jq.data.tokenizers import load_tokenizer, train_sentencepiece
from megatron_jq.errors import UserError
from megatron_jq.evaluate import official
from megatron_jq.formats import table
from megatron_jq.formats.options import ReadOptions
from megatron_jq.formats.record_error import RecordError
from megatron_jq.formats.row import DataFormat
from megatron_jq.settings import SETTINGS

ROWS = list(table.FORMATS.values())
PLACE = "train.jsonl:7"
DOCS = Path(__file__).parents[2] / "docs"
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


class Watched:
    """ReadOptions that remembers which of its fields are read."""

    def __init__(self) -> None:
        self.read: set[str] = set()

    def __getattr__(self, name: str):
        self.read.add(name)
        return getattr(ReadOptions(), name)


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(["Solve this problem. 1 2 3"] * 3, path, vocab_size=280)
    return path


def with_id(row: DataFormat, number: int) -> dict:
    """The sample under another id."""
    return {**copy.deepcopy(row.sample), **{name: f"id {number}" for name in row.ids if name in row.sample}}


def names_in(value: object) -> set[str]:
    """The fields of a record, those of objects inside it too."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return set(value if isinstance(value, dict) else ()).union(*map(names_in, inside))


def written(path: Path, *records: dict) -> str:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


@each_row
def test_its_sample_is_recognised_by_it_alone(row):
    assert [r.name for r in table.FORMATS.values() if r.recognise(row.sample, ReadOptions())] == [row.name]
    assert table.recognise(PLACE, row.sample, ReadOptions()) is row


@each_row
def test_its_pair_is_pure_and_has_what_the_row_says(row):
    record = copy.deepcopy(row.sample)
    pair = row.pair(PLACE, record, ReadOptions())
    assert record == row.sample and row.pair(PLACE, record, ReadOptions()) == pair
    assert pair.place == PLACE and pair.prompt.strip() and pair.answer.strip()
    assert tuple(name for name, _ in pair.parts) == row.pieces
    assert all(text in pair.prompt for _, text in pair.parts)
    assert pair.answer not in pair.aliases and len(set(pair.aliases)) == len(pair.aliases)


@each_row
def test_every_setting_that_it_reads_is_in_the_row(row):
    options = Watched()
    row.recognise(row.sample, options)
    row.pair(PLACE, row.sample, options)
    assert options.read == set(row.settings) and options.read <= SETTINGS.keys()


@each_row
def test_a_record_that_lacks_a_field_or_has_another_kind_of_it_is_read_or_named(row):
    """No error of Python's own, and at least one field without which there is no pair."""
    refused = 0
    for field in row.sample:
        without = {name: value for name, value in row.sample.items() if name != field}
        others = ({**row.sample, field: value} for value in (None, "", 3, True, [], {}, ["x"], [None], {"x": "y"}))
        for record in (without, *others):
            row.recognise(record, ReadOptions())
            try:
                row.pair(PLACE, record, ReadOptions())
            except RecordError as error:
                refused += 1
                assert str(error).startswith(f"{PLACE}: ") and error.kind
                assert any(name in str(error) for name in names_in(row.sample)), str(error)
    assert refused


@each_row
def test_equal_ids_are_refused_and_a_rationale_is_given_or_asked_for(row, tmp_path):
    assert not row.ids or any(name in row.sample for name in row.ids), "the sample has no field of `ids`"
    path = written(tmp_path / "data.jsonl", row.sample, row.sample)
    if row.ids:
        with pytest.raises(UserError, match=":2: id .* stands at .*:1 already"):
            load_source(path, ReadOptions())
    else:
        assert len(load_source(path, ReadOptions()).pairs) == 2
    path = written(tmp_path / "one.jsonl", row.sample)
    gives = row.rationale is not None or row.pair(PLACE, row.sample, ReadOptions()).rationale is not None
    if gives:
        assert load_source(path, ReadOptions(rationales=True)).pairs[0].rationale
    else:
        with pytest.raises(UserError, match="no given rationale to imitate; name its field with --rationale-field"):
            load_source(path, ReadOptions(rationales=True))


@each_row
def test_its_template_is_a_file_that_its_pair_fills(row):
    template, pair = template_of(row.name), row.pair(PLACE, row.sample, ReadOptions())
    assert template.cold.fill(pair) == pair.prompt, "cold is the input alone"
    assert template.warm.fill(pair).strip()


@each_row
def test_a_prepared_set_holds_what_direct_reading_gives(row, tmp_path, tokenizer_model):
    source = written(tmp_path / "data.jsonl", *(with_id(row, number) for number in range(3)))
    config = parse_args(["--train-data", source, "--prompt-style", "cold", "--tokenizer-model", str(tokenizer_model)])
    done = prepare(config, tmp_path / "set", test_data=None, split_sizes=None, context=None)
    tokenizer = load_tokenizer("sentencepiece", tokenizer_model)
    direct = encode_reading(config, read_source(config, source, "train", "--train-data"), tokenizer)
    prepared = read_source(parse_args([]), str(done.folder), "train", "--train-data")
    assert prepared.prepared.placed == direct.placed and len(direct.placed) == 3
    assert prepared.data_format == direct.data_format == row.name


@each_row
def test_its_row_stands_in_the_documentation(row):
    page = (DOCS / "data.md").read_text(encoding="utf-8")
    assert f"| `{row.name}` | {row.reads} | {row.prompt} | {row.gold} |\n" in page
    ids = ", ".join(f"`{name}`" for name in row.ids) or "–"
    pieces = ", ".join(f"`{{{name}}}`" for name in ("prompt", *row.pieces))
    assert f"| `{row.name}` | {ids} | {pieces} | `{row.rule}` |\n" in page


def test_the_worked_example_of_the_documentation_conforms(tmp_path, tokenizer_model, monkeypatch):
    section = (DOCS / "extending.md").read_text(encoding="utf-8").partition("## A data set")[2].partition("\n## ")[0]
    functions, expression = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    squad = types.ModuleType("squad")
    exec(functions, vars(squad))
    row = eval(expression, {"DataFormat": DataFormat, "squad": squad})
    monkeypatch.setitem(table.FORMATS, row.name, row)
    test_its_sample_is_recognised_by_it_alone(row)
    test_its_pair_is_pure_and_has_what_the_row_says(row)
    test_every_setting_that_it_reads_is_in_the_row(row)
    test_a_record_that_lacks_a_field_or_has_another_kind_of_it_is_read_or_named(row)
    test_equal_ids_are_refused_and_a_rationale_is_given_or_asked_for(row, tmp_path)
    test_its_template_is_a_file_that_its_pair_fills(row)
    test_a_prepared_set_holds_what_direct_reading_gives(row, tmp_path, tokenizer_model)
    source = load_source(written(tmp_path / "auto.jsonl", row.sample), ReadOptions())
    assert source.data_format == "squad" and source.pairs[0].aliases == ("Yar",)


def test_the_settings_and_the_scripts_follow_the_table():
    assert get_args(SETTINGS["data_format"][1]) == ("auto", *table.FORMATS)
    assert {row.published for row in ROWS} - {None} == set(official.FORMATS)
    used = {f"{row.template}.toml" for row in ROWS}
    assert used == {path.name for path in (Path(templates.__file__).parent / "templates").iterdir()}
    assert {row.name for row in ROWS if "prompt_field" in row.settings} == {"jsonl", "messages", "verl"}


def test_a_record_of_two_forms_is_refused_by_their_names():
    gsm8k, musique = table.FORMATS["gsm8k"], table.FORMATS["musique"]
    both = {**musique.sample, "answer": gsm8k.sample["answer"]}
    with pytest.raises(UserError, match=r"^train.jsonl:7: .* musique and of gsm8k, .*--data-format gsm8k takes"):
        table.recognise(PLACE, both, ReadOptions())
    assert table.recognise(PLACE, {**both, "prompt": "p"}, ReadOptions()).name == "jsonl"  # a field that is named
    assert table.recognise(PLACE, {"x": "y"}, ReadOptions()).name == "jsonl"  # whose errors name what it lacks


def test_an_unknown_format_is_refused_and_never_read_as_another():
    assert table.format_named("builtin").name == "jsonl"
    with pytest.raises(UserError, match="--data-format gsmk8 is not known; did you mean gsm8k"):
        table.format_named("gsmk8")


@pytest.mark.parametrize("part", [f.name for f in dataclasses.fields(DataFormat)])
def test_a_row_with_a_forgotten_part_is_refused(part):
    parts = dict(vars(table.FORMATS["gsm8k"]))
    del parts[part]
    with pytest.raises(TypeError, match=f"missing 1 required keyword-only argument: '{part}'"):
        DataFormat(**parts)


@pytest.mark.parametrize(
    ("part", "value", "demand"),
    [
        ("name", "auto", "name is a word and not one of"), ("name", "my set", "name is a word"),
        ("recognise", None, "recognise and pair are functions"), ("pair", "text", "recognise and pair are functions"),
        ("settings", ("prompt",), "settings is a tuple of"), ("settings", "id_field", "settings is a tuple of"),
        ("ids", "id", "ids and pieces are tuples of names"), ("pieces", ["a"], "ids and pieces are tuples of names"),
        ("rationale", "solution", "rationale is a function or None"), ("rule", "numbers", "rule is one of"),
        ("rule", "squad", "under rule number alone"), ("published", "drop", "published is hotpotqa, musique or None"),
        ("sample", {}, "sample is a record"), ("template", "", "template, reads, prompt and gold are texts"),
        ("gold", None, "template, reads, prompt and gold are texts"),
    ],
)  # fmt: skip
def test_a_part_that_cannot_be_is_refused_by_the_row(part, value, demand):
    parts = {**vars(table.FORMATS["finqa"]), part: value}
    with pytest.raises(ValueError, match=demand):
        DataFormat(**parts)
    with pytest.raises(ValueError, match="two data formats have one name"):
        table.by_name((ROWS[0], ROWS[0]))
