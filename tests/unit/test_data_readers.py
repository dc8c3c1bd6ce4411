"""Readers of FinQA, HotPotQA and MuSiQue, of JSON lists and of the hub; and what becomes of bad records.

The records here are our own, in the official formats. Real ones are read where MEGATRON_JQ_DATA names their folder, or
where one lies beside the repository.
"""

import copy
import json
import os
import re
import sys
import types
from pathlib import Path

import pytest

from megatron_jq.data import hub, jsonl
from megatron_jq.data.dataset import ReadOptions, load_source
from megatron_jq.errors import UserError
from tests.unit.pairs import load_pairs

FINQA = {
    "pre_text": ["revenue of the company grew in 2017 .", "."],
    "post_text": ["( a ) figures are rounded ."],
    "filename": "AAA/2017/page_41.pdf",
    "table_ori": [["(in millions)", "2017", "2016"], ["Revenue", "$ 120.5", "$ 100.0"]],
    "table": [["( in millions )", "2017", "2016"], ["revenue", "$ 120.5", "$ 100.0"]],
    "qa": {
        "question": "what was the growth rate of revenue in 2017 ?",
        "answer": "20.5%",
        "explanation": "",
        "program": "subtract(120.5, 100.0), divide(#0, 100.0)",
        "gold_inds": {"table_1": "the ( in millions ) of revenue is $ 120.5 ; the 2016 is $ 100.0 ;"},
        "exe_ans": 0.20500,
    },
    "id": "AAA/2017/page_41.pdf-1",
}
HOTPOTQA = {
    "_id": "5a0",
    "answer": "Chief Clerk",
    "question": "What office did the author of The Long Ferry hold?",
    "supporting_facts": [["The Long Ferry", 0], ["Ada Holm", 1]],
    "context": [
        ["The Long Ferry", ["The Long Ferry is a novel by Ada Holm.", " It came out in 1931."]],
        ["Ada Holm", ["Ada Holm wrote five novels.", " She was Chief Clerk of the harbour."]],
    ],
    "type": "bridge",
    "level": "hard",
}
MUSIQUE = {
    "id": "2hop__1_2",
    "paragraphs": [
        {"idx": 0, "title": "Ada Holm", "paragraph_text": "Ada Holm was born in Aldeby.", "is_supporting": True},
        {"idx": 1, "title": "Aldeby", "paragraph_text": "Aldeby lies on the river Yar.", "is_supporting": True},
    ],
    "question": "On which river lies the birthplace of Ada Holm?",
    "question_decomposition": [],
    "answer": "river Yar",
    "answer_aliases": ["Yar", "river Yar", "the Yar", ""],
    "answerable": True,
}
RECORDS = {"finqa": FINQA, "hotpotqa": HOTPOTQA, "musique": MUSIQUE}
HOTPOTQA_TEXT = (
    "The Long Ferry: The Long Ferry is a novel by Ada Holm. It came out in 1931.\n\n"
    "Ada Holm: Ada Holm wrote five novels. She was Chief Clerk of the harbour.\n\n"
    "What office did the author of The Long Ferry hold?"
)

REAL = Path(os.environ.get("MEGATRON_JQ_DATA", "a-folder-that-nobody-named"))
real = pytest.mark.skipif(not REAL.is_dir(), reason="MEGATRON_JQ_DATA names no folder of real rows")


def changed(record: dict, **values) -> dict:
    """A copy; a__b=… sets record["a"]["b"], and None removes."""
    record = copy.deepcopy(record)
    for name, value in values.items():
        *path, last = name.split("__") if not name.startswith("_") else [name]
        inner = record
        for step in path:
            inner = inner[step]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
    return record


def write_lines(tmp_path, *records, name="data.jsonl") -> str:
    path = tmp_path / name
    path.write_text("".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records), encoding="utf-8")
    return str(path)


def test_finqa_gives_text_table_text_question_and_the_gold_by_option(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps([FINQA], indent=1).replace("0.205\n", "0.20500\n"))
    (pair,) = load_source(str(path), ReadOptions()).pairs
    assert pair.prompt == (
        "revenue of the company grew in 2017 . .\n\n"
        "( in millions ) | 2017 | 2016\nrevenue | $ 120.5 | $ 100.0\n\n"
        "( a ) figures are rounded .\n\n"
        "what was the growth rate of revenue in 2017 ?"
    )
    assert pair.answer == "0.20500" and pair.place == f"{path}:2"  # the number as the file writes it
    assert dict(pair.parts)["table"] == "( in millions ) | 2017 | 2016\nrevenue | $ 120.5 | $ 100.0"
    (pair,) = load_source(str(path), ReadOptions(finqa_answer="answer")).pairs
    assert pair.answer == "20.5%"


def test_finqa_takes_yes_and_no_an_empty_table_and_text_that_is_missing(tmp_path):
    record = changed(FINQA, qa__exe_ans="yes", table=[], post_text=[])
    (pair,) = load_pairs(write_lines(tmp_path, record))
    assert pair.answer == "yes"
    assert pair.prompt == "revenue of the company grew in 2017 . .\n\nwhat was the growth rate of revenue in 2017 ?"


FINQA_OF_THE_HUB = {
    **{key: FINQA[key] for key in ("id", "pre_text", "post_text", "table")},
    "question": FINQA["qa"]["question"],
    "answer": "20.5%",
    "final_result": "0.205",
    "program_re": "divide(#0, 100.0)",
    "gold_inds": ["the ( in millions ) of revenue"],
}


def test_finqa_of_the_hub_has_another_gold_which_is_named_and_never_taken_in_silence(tmp_path):
    path = write_lines(tmp_path, FINQA_OF_THE_HUB)
    with pytest.raises(UserError, match="no field 'exe_ans'; .* --finqa-answer answer or --finqa-answer final_result"):
        load_pairs(path)
    for field in ("final_result", "answer"):
        source = load_source(path, ReadOptions(finqa_answer=field))
        assert (source.data_format, source.pairs[0].answer) == ("finqa", FINQA_OF_THE_HUB[field])
    with pytest.raises(UserError, match="field 'answer' is empty"):  # in some of its rows
        load_source(write_lines(tmp_path, {**FINQA_OF_THE_HUB, "answer": ""}), ReadOptions(finqa_answer="answer"))


@pytest.mark.parametrize("form", ["official", "hub"])
def test_hotpotqa_without_supporting_facts_is_still_hotpotqa(tmp_path, form):
    context = {"title": [t for t, _ in HOTPOTQA["context"]], "sentences": [s for _, s in HOTPOTQA["context"]]}
    record = changed(HOTPOTQA, supporting_facts=None, **({"context": context} if form == "hub" else {}))
    source = load_source(write_lines(tmp_path, record), ReadOptions())
    assert (source.data_format, source.pairs[0].prompt) == ("hotpotqa", HOTPOTQA_TEXT)
    for unanswered in (changed(record, answer=None), {**record, "answer": None}):  # the official test files
        with pytest.raises(UserError, match="test files are published without it: take train or dev"):
            load_pairs(write_lines(tmp_path, unanswered))


@pytest.mark.parametrize("context", ["a text", ["a", "b"], [["title"]], {"text": []}, [], None])
def test_another_questions_context_is_not_taken_for_hotpotqas(tmp_path, context):
    record = {"question": "q", "answer": "a", "prompt_text": "p", "context": context}
    assert load_source(write_lines(tmp_path, record), ReadOptions(prompt_field="prompt_text")).data_format == "jsonl"
    with pytest.raises(UserError, match="no field 'prompt'"):
        load_pairs(write_lines(tmp_path, record))


def test_hotpotqa_gives_titled_paragraphs_the_question_and_the_answer(tmp_path):
    (pair,) = load_pairs(write_lines(tmp_path, HOTPOTQA))
    assert (pair.prompt, pair.answer, pair.aliases) == (HOTPOTQA_TEXT, "Chief Clerk", ())


def test_hotpotqa_of_the_hub_reads_the_same(tmp_path):
    context = {"title": [t for t, _ in HOTPOTQA["context"]], "sentences": [s for _, s in HOTPOTQA["context"]]}
    facts = {"title": ["The Long Ferry"], "sent_id": [0]}
    record = changed(HOTPOTQA, _id=None, id="5a0", context=context, supporting_facts=facts)
    assert load_pairs(write_lines(tmp_path, record))[0].prompt == HOTPOTQA_TEXT


def test_musique_brings_its_aliases_without_blanks_and_repetitions(tmp_path):
    (pair,) = load_pairs(write_lines(tmp_path, MUSIQUE))
    assert pair.prompt == (
        "Ada Holm: Ada Holm was born in Aldeby.\n\nAldeby: Aldeby lies on the river Yar.\n\n"
        "On which river lies the birthplace of Ada Holm?"
    )
    assert (pair.answer, pair.aliases) == ("river Yar", ("Yar", "the Yar"))


def test_a_list_of_answers_is_the_gold_one_and_aliases(tmp_path):
    (pair,) = load_pairs(write_lines(tmp_path, {"prompt": "q", "answer": ["a", 1, "a"]}))
    assert (pair.answer, pair.aliases) == ("a", ("1",))


@pytest.mark.parametrize("data_format", RECORDS)
def test_auto_knows_each_official_record(tmp_path, data_format):
    assert load_source(write_lines(tmp_path, RECORDS[data_format]), ReadOptions()).data_format == data_format


def test_auto_passes_over_bad_records_and_leaves_an_asked_for_prompt_field_alone(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("{broken\n" + json.dumps(MUSIQUE) + "\n")
    source = load_source(str(path), ReadOptions(bad_records="drop"))
    assert source.data_format == "musique" and [fault.place for fault in source.bad] == [f"{path}:1"]
    with_prompt = write_lines(tmp_path, changed(MUSIQUE, prompt="p"))
    assert load_source(with_prompt, ReadOptions()).data_format == "jsonl"


# Name → (record, kind, part of the message)
BAD = {
    "no answer": (changed(HOTPOTQA, answer=None), "no answer", "no field 'answer'"),
    "empty answer": (changed(MUSIQUE, answer=" "), "no answer", "field 'answer' is empty"),
    "no exe_ans": (changed(FINQA, qa__exe_ans=None), "no exe_ans", "no field 'exe_ans'"),
    "no question": (changed(FINQA, qa__question=""), "no question", "field 'question' is empty"),
    "empty context": (changed(HOTPOTQA, context=[]), "empty context", "the context is empty"),
    "blank context": (changed(HOTPOTQA, context=[["Title", [" ", ""]]]), "empty context", "the context is empty"),
    "no paragraphs": (changed(MUSIQUE, paragraphs=[]), "empty context", "the context is empty"),
    "no text at all": (changed(FINQA, pre_text=[], post_text=["."][:0], table=[]), "empty context", "are empty"),
    "ragged": (
        changed(FINQA, table=[["a", "b"], ["c"]]),
        "ragged table",
        "row 2 of the table has 1 cells and the first",
    ),
    "no table": (changed(FINQA, table="a | b"), "no table", "not a list of rows"),
    "broken paragraph": (changed(HOTPOTQA, context=[["Title"]]), "no context", "not a list of [title, sentences]"),
    "broken text": (changed(FINQA, pre_text="text"), "no context", "'pre_text' is not a list of sentences"),
    "not answerable": (changed(MUSIQUE, answerable=False), "not answerable", "answerable is false"),
    "aliases": (changed(MUSIQUE, answer_aliases="Yar"), "no aliases", "'answer_aliases' is not a list"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_refused_by_file_and_line_or_dropped_and_counted(tmp_path, name):
    record, kind, message = BAD[name]
    data_format = next(
        f for f, good in RECORDS.items() if good.get("id", good.get("_id")) == record.get("id", record.get("_id"))
    )
    good = changed(RECORDS[data_format], **{"_id" if data_format == "hotpotqa" else "id": "another"})
    path = write_lines(tmp_path, good, record)
    options = ReadOptions(data_format)
    with pytest.raises(UserError) as error:
        load_source(path, options)
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)
    assert "--bad-records drop" in str(error.value)
    source = load_source(path, ReadOptions(data_format, bad_records="drop"))
    assert [pair.place for pair in source.pairs] == [f"{path}:1"]
    assert [(fault.place, fault.kind) for fault in source.bad] == [(f"{path}:2", kind)]


@pytest.mark.parametrize("data_format", RECORDS)
def test_the_second_record_of_an_id_is_bad_and_names_the_first(tmp_path, data_format):
    path = write_lines(tmp_path, RECORDS[data_format], RECORDS[data_format])
    with pytest.raises(UserError, match=f"^{path}:2: id '.*' stands at {path}:1 already"):
        load_pairs(path)
    assert len(load_source(path, ReadOptions(bad_records="drop")).pairs) == 1


def test_ids_of_json_lines_count_where_their_field_is_named(tmp_path):
    path = write_lines(tmp_path, *[{"prompt": "a", "answer": "b", "key": 7}] * 2)
    assert len(load_pairs(path)) == 2
    with pytest.raises(UserError, match="id '7' stands at"):
        load_source(path, ReadOptions(id_field="key"))


def test_several_bad_records_are_counted_and_the_first_ones_named(tmp_path):
    path = write_lines(tmp_path, HOTPOTQA, *[changed(HOTPOTQA, _id=str(i), context=[]) for i in range(5)])
    with pytest.raises(UserError) as error:
        load_pairs(path)
    named = ", ".join(f"{path}:{line} (empty context)" for line in (3, 4, 5))
    assert f"(and 4 more bad records: {named}, …; --bad-records drop" in str(error.value)


def test_dropping_every_record_is_refused(tmp_path):
    path = write_lines(tmp_path, changed(HOTPOTQA, context=[]))
    with pytest.raises(UserError, match=f"^--train-data {path}: every record is bad; the first: {path}:1: "):
        load_source(path, ReadOptions(bad_records="drop"))


def test_a_line_of_ten_megabytes_is_bad_and_the_lines_around_it_are_read(tmp_path):
    path = tmp_path / "data.jsonl"
    long = json.dumps({"prompt": "x" * 10_000_000, "answer": "b"})
    path.write_text(f'{{"prompt": "a", "answer": "b"}}\n{long}\n{{"prompt": "c", "answer": "d"}}')
    with pytest.raises(UserError, match=f"^{path}:2: 9.5 MiB in one record, more than 4 MiB"):
        load_pairs(str(path))
    source = load_source(str(path), ReadOptions(bad_records="drop"))
    assert [pair.place for pair in source.pairs] == [f"{path}:1", f"{path}:3"]
    assert [fault.kind for fault in source.bad] == ["over 4 MiB"]


@pytest.mark.parametrize("excess", [-1, 0, 1, 2])
def test_the_limit_of_a_record_counts_its_bytes_with_the_line_end(tmp_path, monkeypatch, excess):
    monkeypatch.setattr(jsonl, "MAX_RECORD_BYTES", 40)
    line = json.dumps({"prompt": "a", "answer": "b"}).ljust(39 + excess) + "\n"
    path = tmp_path / "data.jsonl"
    path.write_text(line * 2)
    source = jsonl.read_records(str(path))
    assert [isinstance(record, tuple) for record in source] == [excess <= 0] * 2


def test_a_json_list_reads_as_its_lines_do(tmp_path):
    records = [changed(HOTPOTQA, _id=str(i), question=f"Wer ist das\u2028 – {i}?") for i in range(4)]
    lines = load_pairs(write_lines(tmp_path, *records))
    for number, text in enumerate(
        (json.dumps(records), json.dumps(records, indent=2), f"\ufeff \n{json.dumps(records)} ")
    ):
        path = tmp_path / f"{number}.json"
        path.write_text(text, encoding="utf-8")
        pairs = load_pairs(str(path))
        assert [(p.prompt, p.answer) for p in pairs] == [(p.prompt, p.answer) for p in lines]
        assert len({pair.place for pair in pairs}) == len(pairs)
        for item, pair in enumerate(pairs):  # the line that is named is the one on which the record begins
            line, offset = re.fullmatch(r".*:(\d+)(?:\[(\d+)\])?", pair.place).groups()
            assert offset in (None, str(item))
            line = int(line)
            assert path.read_text(encoding="utf-8-sig").split("\n")[line - 1].lstrip(" [")[:1] == "{"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('[{"prompt": "a", "answer": "b"},\n {"prompt": "a"\n', ":3: the JSON list breaks off"),
        ('[{"prompt": "a", "answer": "b"}\n {"prompt": "a"}]', ":2: the JSON list breaks off: a comma or ] is missing"),
        ('[{"prompt": "a", "answer": NaN}]', ":1: the JSON list cannot be read on from this item (NaN)"),
        ("[]", " is empty"),
        ("[\n\n17]", ":3: not a JSON object"),
        ("[\n" + "[" * 100_000, ":2: the JSON list cannot be read on from this item"),
    ],
)
def test_a_faulty_json_list_is_refused_with_its_line(tmp_path, text, fault):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_pairs(str(path))
    assert f"{path}{fault}" in str(error.value)


def test_bytes_of_a_json_list_that_are_not_utf8_spoil_their_record_alone(tmp_path):
    path = tmp_path / "data.json"
    good = b'{"prompt": "a", "answer": "b", "unread": "\xff"}'
    path.write_bytes(b"[" + good + b',\n{"prompt": "a\xff", "answer": "b"},\n' + good + b"]")
    source = load_source(str(path), ReadOptions(bad_records="drop"))
    assert [pair.place for pair in source.pairs] == [f"{path}:1", f"{path}:3"]
    assert [(fault.place, fault.kind) for fault in source.bad] == [(f"{path}:2", "not UTF-8")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ReadOptions("finqua"), "--data-format finqua is not known; did you mean finqa"),
        (ReadOptions(finqa_answer="exe"), "--finqa-answer exe is not known; did you mean exe_ans"),
        (ReadOptions(bad_records="skip"), "--bad-records skip is not known; it is one of error, drop"),
    ],
)
def test_unknown_options_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        load_source(write_lines(tmp_path, HOTPOTQA), options)


class FakeHub(types.ModuleType):
    """Stands for the datasets library: keeps what load_dataset was asked for."""

    __version__ = "4.1.0"
    exceptions = types.SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))

    def __init__(self, rows):
        super().__init__("datasets")
        self.rows, self.asked = rows, []

    def load_dataset(self, path, name=None, *, split, revision):
        self.asked.append((path, name, split, revision))
        if isinstance(self.rows, Exception):
            raise self.rows
        return self.rows


@pytest.mark.parametrize(
    ("source", "split", "asked"),
    [
        ("hub:some/set", "train", ("some/set", None, "train", None)),
        ("hub:some/set", "heldout", ("some/set", None, "validation", None)),
        ("hub:some/set@abc:main:test", "train", ("some/set", "main", "test", "abc")),
        ("hub:some/set::dev", "heldout", ("some/set", None, "dev", None)),
    ],
)
def test_hub_sources_ask_for_set_configuration_split_and_revision(monkeypatch, source, split, asked):
    fake = FakeHub([{"question": "q", "answer": "so\n#### 1,000"}])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    (pair,) = load_source(source, ReadOptions(), split=split).pairs
    assert (pair.prompt, pair.answer, pair.place) == ("q", "1000", f"{source}[0]")
    assert fake.asked == [asked]


def test_numbers_of_the_hub_are_written_in_full(monkeypatch):
    rows = [changed(FINQA, qa__exe_ans=value, id=str(value)) for value in (0.1, 3, 1e-05)]
    monkeypatch.setitem(sys.modules, "datasets", FakeHub(rows))
    assert [pair.answer for pair in load_pairs("hub:some/set")] == ["0.1", "3", "1e-05"]


def test_faults_of_the_hub_are_told_in_a_line(monkeypatch):
    for fault in (FileNotFoundError, ValueError, FakeHub.exceptions.DatasetsError):
        monkeypatch.setitem(sys.modules, "datasets", FakeHub(fault("no such set\nmore")))
        with pytest.raises(UserError, match="^--eval-data hub:a/b cannot be loaded: no such set$"):
            load_source("hub:a/b", ReadOptions(), flag="--eval-data")
    monkeypatch.setitem(sys.modules, "datasets", FakeHub([]))
    with pytest.raises(UserError, match="hub:a/b is empty"):
        load_pairs("hub:a/b")
    for wrong in ("hub:", "hub:a:b:c:d", "hub:@x"):
        with pytest.raises(UserError, match="write hub:OWNER/NAME"):
            load_pairs(wrong)


def test_a_library_that_could_run_remote_code_is_refused(monkeypatch):
    fake = FakeHub([])
    fake.__version__ = "3.6.0"
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(UserError, match=r"datasets 3.6.0 is installed, .* pip install megatron-jq\[datasets\]"):
        load_pairs("hub:a/b")
    assert fake.asked == []


def test_without_the_library_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"hub:a/b needs the datasets library: pip install megatron-jq\[datasets\]"):
        load_pairs("hub:a/b")
    assert hub.INSTALL.endswith("[datasets]")


@real
def test_real_hotpotqa_rows_are_read_whole():
    path = REAL / "hotpotqa_dev_500.jsonl"
    source = load_source(str(path), ReadOptions())
    assert (source.data_format, len(source.pairs), source.bad) == ("hotpotqa", 500, ())
    for line, pair in zip(path.read_text(encoding="utf-8").splitlines(), source.pairs, strict=True):
        record = json.loads(line)
        assert pair.answer == record["answer"].strip() and pair.prompt.endswith(f"\n\n{record['question']}")
        assert all(f"{title}: " in pair.prompt for title, sentences in record["context"] if "".join(sentences).strip())
        assert all(sentence.strip() in pair.prompt for _, sentences in record["context"] for sentence in sentences)


@real
def test_real_musique_questions_are_read_with_their_answers():
    path = REAL / "musique_dev_200_closed_book.jsonl"
    pairs = load_pairs(str(path), prompt_field="question")
    assert len(pairs) == 200 and any(pair.aliases for pair in pairs)
    for line, pair in zip(path.read_text(encoding="utf-8").splitlines(), pairs, strict=True):
        assert {pair.answer, *pair.aliases} == set(json.loads(line)["answer"])


@real
@pytest.mark.parametrize(("name", "rows"), [("gsm8k_train", 7473), ("gsm8k_test", 1319)])
def test_real_gsm8k_rows_are_read_whole(name, rows):
    source = load_source(str(REAL / f"{name}.jsonl"), ReadOptions())
    assert (source.data_format, len(source.pairs)) == ("gsm8k", rows)
    assert all(pair.answer.lstrip("-").replace(".", "", 1).isdigit() for pair in source.pairs)
