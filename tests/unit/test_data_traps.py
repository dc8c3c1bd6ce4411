"""What a reader must not take into y* or z, and must not lose: a table over every reader, and over every container.

Each trap is the smallest record of its kind. What is taken is written here; the rest is a bad record by name.
"""

import json

import pytest

from megatron_jq.data.converting import Converter, ReadOptions
from megatron_jq.data.dataset import load_source
from megatron_jq.errors import UserError
from megatron_jq.formats.gsm8k import gold_answer
from megatron_jq.formats.record_error import RecordError
from megatron_jq.formats.table import FORMATS
from tests.unit import data_files
from tests.unit.data_files import CONTAINERS, RECORDS, stored

GOOD, ANOTHER = ("4", "a"), ("5", "b")
every_reader = pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)


def lines(tmp_path, *records: dict) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("container", CONTAINERS)
@every_reader
def test_every_reader_reads_every_container_alike(record, container, tmp_path, monkeypatch):
    source = stored(container, [record(*GOOD), record(*ANOTHER)], tmp_path, monkeypatch)
    read = load_source(source, ReadOptions())
    assert (read.data_format, [pair.answer for pair in read.pairs], read.total) == (RECORDS[record], ["4", "5"], 2)
    plain = load_source(lines(tmp_path, record(*GOOD), record(*ANOTHER)), ReadOptions())
    assert [pair.prompt for pair in read.pairs] == [pair.prompt for pair in plain.pairs]
    places = {"lines": ":1", "gz": ":1", "list": ":1", "list.gz": ":1", "parquet": "[0]", "hub": "[0]"}
    assert read.pairs[0].place == source + places[container]


@pytest.mark.parametrize("blanks", [" ", "\n", "\r\n", "\t", "\u00a0"])
@every_reader
def test_blanks_at_a_gold_answers_ends_are_no_part_of_y(record, blanks, tmp_path):
    source = load_source(lines(tmp_path, record(f"4{blanks}", "a"), record(f"{blanks}5", "b")), ReadOptions())
    assert [pair.answer for pair in source.pairs] == ["4", "5"]
    if record in (data_files.jsonl, data_files.verl, data_files.prompt_list):  # the others' formats say so themselves
        assert source.notes == ("2 gold answers had blanks at their ends, which were taken off",)


@pytest.mark.parametrize("gold", ["<think>2+2</think>", "</think> 4", "4 <think>", "<think>2</think>3</think>4"])
@every_reader
def test_a_gold_answer_that_spells_a_rationales_marker_is_bad(record, gold, tmp_path):
    path = lines(tmp_path, record(*GOOD), record(gold, "b"))
    with pytest.raises(UserError, match=f"^{path}:2: .*(think>|the rationale in .* is empty)"):
        load_source(path, ReadOptions())
    assert len(load_source(path, ReadOptions(bad_records="drop")).pairs) == 1


@pytest.mark.parametrize("gold", ["", " \n", None, True, {"text": "4"}])
@every_reader
def test_a_gold_answer_that_is_none_is_bad(record, gold, tmp_path):
    if record is data_files.gsm8k and gold not in ("", " \n"):
        pytest.skip("stands inside a text there")
    path = lines(tmp_path, record(*GOOD), record(gold, "b"))
    with pytest.raises(UserError, match=f"^{path}:2: "):
        load_source(path, ReadOptions())


@pytest.mark.parametrize("container", ["parquet", "hub"])
@pytest.mark.parametrize("gold", [float("nan"), float("inf")])
@pytest.mark.parametrize("record", [data_files.jsonl, data_files.finqa, data_files.verl], ids=lambda r: r.__name__)
def test_a_missing_number_of_a_column_is_no_gold_answer(record, gold, container, tmp_path, monkeypatch):
    source = stored(container, [record(4.0, "a"), record(gold, "b")], tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"\[1\]: .* is (nan|inf), which is not a number"):
        load_source(source, ReadOptions())
    assert [pair.answer for pair in load_source(source, ReadOptions(bad_records="drop")).pairs] == ["4.0"]


# Ids


def twin(record, identity) -> dict:
    """A bad record with an id: MuSiQue's unanswerable twin, or one without an answer."""
    if record is data_files.musique:
        return {**record("4", identity), "answerable": False}
    return {**record("4", identity), "question": ""} if record is not data_files.finqa else record("", identity)


@pytest.mark.parametrize("record", [data_files.musique, data_files.hotpotqa, data_files.finqa, data_files.jsonl],
                         ids=lambda record: record.__name__)  # fmt: skip
def test_an_id_counts_once_its_record_is_good(record, tmp_path):
    bad = {**twin(record, "a"), "prompt": ""} if record is data_files.jsonl else twin(record, "a")
    options = ReadOptions(RECORDS[record], bad_records="drop", id_field="id")
    for order, kinds in (
        ([bad, record(*GOOD)], 1),
        ([record(*GOOD), bad], 1),
        ([bad, record(*GOOD), record(*GOOD)], 2),
    ):
        source = load_source(lines(tmp_path, *order), options)
        assert len(source.pairs) == 1, order
        assert len(source.bad) == kinds and [f.kind for f in source.bad].count("duplicate id") == kinds - 1


def test_musique_full_loses_no_answerable_question(tmp_path):
    """Its file has each question twice under one id, once with a paragraph missing, in either order."""
    pairs = [
        (data_files.musique("4", f"q{n}"), {**data_files.musique("4", f"q{n}"), "answerable": False}) for n in range(6)
    ]
    path = lines(tmp_path, *(row for n, pair in enumerate(pairs) for row in (pair if n % 2 else pair[::-1])))
    source = load_source(path, ReadOptions(bad_records="drop"))
    assert len(source.pairs) == 6 and {fault.kind for fault in source.bad} == {"not answerable"}


def test_ids_are_compared_as_texts(tmp_path):
    path = lines(tmp_path, data_files.musique("4", 1), data_files.musique("5", "1"))
    with pytest.raises(UserError, match=f"^{path}:2: id '1' stands at {path}:1 already"):
        load_source(path, ReadOptions())


@pytest.mark.parametrize("value", ["false", 0, "no"])
def test_musique_is_answerable_or_not_and_nothing_else(value, tmp_path):
    path = lines(tmp_path, data_files.musique(*GOOD), {**data_files.musique(*ANOTHER), "answerable": value})
    with pytest.raises(UserError, match=f"^{path}:2: field 'answerable' is .*it must be true or false"):
        load_source(path, ReadOptions())


# GSM8K


@pytest.mark.parametrize(
    ("solution", "gold"),
    [
        ("so\n#### 11", "11"),
        ("so\r\n#### 11\r\n", "11"),
        ("so\n####\n11", "11"),
        ("so\n#### 11\n\n  \n", "11"),
        ("##### Plan\n#### Step one\nadd\n#### 1,080", "1080"),
        ("#### 1. First\nadd\n#### 7", "7"),
        ("so\n#### 7\nso again\n#### 7", "7"),
        ("so\n#### $1,234.50", "$1234.50"),
        ("so\n#### 1,2,3", "1,2,3"),  # a list: these commas group nothing
        ("so\n#### (1,2)", "(1,2)"),
        ("so\n#### 2x,3y", "refused"),
        ("so\n#### 1e-5", "1e-5"),
        ("so\n#### 3/4", "3/4"),
        ("so\n#### yes, both", "yes, both"),
        ("so\n#### 11\nSome comment", "refused"),
        ("so\n#### 11\rSome comment", "refused"),
        ("so\n#### 11\n<think>", "refused"),
        ("so\n#### 11 apples", "refused"),
        ("so\n#### 11apples", "refused"),
        ("so\n#### 12:30 pm", "refused"),
        ("so\n#### 11, because it is", "refused"),
        ("so\n#### <<5+6=11>>11", "refused"),
        ("so\n#### 5\nno, it is\n#### 7", "refused"),  # the official evaluation takes the 5
        ("so\n##### 11", "refused"),
        ("so\n####", "refused"),
    ],
)
def test_gsm8ks_gold_is_the_line_after_the_last_mark_or_the_record_is_bad(solution, gold):
    if gold == "refused":
        with pytest.raises(RecordError, match="^here: .*use --data-format jsonl"):
            gold_answer(solution, "here")
    else:
        assert gold_answer(solution, "here") == gold


# Given rationales

BARE = "two and two are four"


def with_rationale(text: str) -> list[tuple[ReadOptions, dict]]:
    """The same rationale, or what spells it, by each way that one can be given."""
    by_field = ReadOptions("jsonl", rationales=True, rationale_field="why")
    named = [(by_field, {"prompt": "q", "answer": "4", "why": text})]
    return [
        *named,
        (ReadOptions("gsm8k", rationales=True), {"question": "q", "answer": f"{text}\n#### 4"}),
        (ReadOptions("musique", rationales=True, rationale_field="why"), {**data_files.musique("4"), "why": text}),
    ]


@pytest.mark.parametrize(
    ("text", "taken_off"),
    [(BARE, 0), (f"<think>{BARE}</think>", 1), (f"\n<think>\n{BARE}\n</think>\n", 1), (f"{BARE}\n</think>", 1)],
)
def test_one_pair_of_markers_around_a_given_rationale_is_taken_off_and_said(text, taken_off):
    for options, record in with_rationale(text):
        convert = Converter(FORMATS[options.data_format], options)
        assert convert(("here", record)).rationale == BARE, options
        said = ("1 given rationales stood in <think> … </think>, which were taken off",)
        assert convert.notes == said * taken_off


@pytest.mark.parametrize(
    "text",
    [
        "<think>" + BARE,
        f"<think>{BARE}</think> The answer is 4.",
        f"<think>{BARE}</think><think>more</think>",
        f"<think><think>{BARE}</think></think>",
        f"first </think> {BARE}",
        "<think> </think>",
    ],
)
def test_markers_elsewhere_in_a_given_rationale_are_refused(text):
    for options, record in with_rationale(text):
        with pytest.raises(RecordError, match="^here: "):
            Converter(FORMATS[options.data_format], options)(("here", record))


def test_estimators_without_given_rationales_do_not_read_them():
    for options, record in with_rationale("<think>never closed"):
        convert = Converter(FORMATS[options.data_format], ReadOptions(options.data_format))
        assert convert(("here", record)).rationale is None
