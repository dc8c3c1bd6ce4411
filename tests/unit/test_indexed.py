"""tools/preprocess_data.py: what it writes is what Megatron-core reads, whole or not at all; faults are one line."""

import json
import random
from pathlib import Path

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_jq.corpus.files import open_files, parse_data_path
from megatron_jq.data.tokenizers import SentencePieceTokenizer, train_sentencepiece
from megatron_jq.errors import UserError
from tools.preprocess_data import main, parse

WORDS = "the cat sat on a mat and saw 12 dogs\n in Ünï — 東京".split(" ")


def texts(count: int) -> list[str]:
    rng = random.Random(5)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 40))) for _ in range(count)]


def write(path: Path, rows: list) -> str:
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    train_sentencepiece(texts(50), path, vocab_size=320)
    return str(path)


def preprocess(folder: Path, rows: list, model: str, *flags: str, name: str = "out") -> int:
    path = write(folder / "in.jsonl", rows)
    return main(["--input", path, "--output-prefix", str(folder / name), "--tokenizer-model", model, *flags])


def documents(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [dataset[i].tolist() for i in range(len(dataset))]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("eod", [True, False])
def test_megatrons_reader_finds_every_documents_ids_in_order(workers, eod, model, tmp_path, capsys):
    rows = [{"text": text} for text in texts(300)]
    flags = ["--workers", str(workers), "--log-interval", "100", *["--append-eod"] * eod]
    assert preprocess(tmp_path, rows, model, *flags) == 0
    tokenizer = SentencePieceTokenizer(model)
    expected = [tokenizer.encode(row["text"]) + [tokenizer.eos_id] * eod for row in rows]
    assert documents(tmp_path / "out_text_document") == expected
    assert open_files(str(tmp_path / "out_text_document")).dtype == numpy.uint16
    said = capsys.readouterr()
    assert f"300 documents, {sum(map(len, expected))} tokens" in said.out
    assert [line.split(" documents")[0] for line in said.err.splitlines()] == ["100", "200", "300"]
    assert "tokens/s" in said.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out_text_document.bin", "out_text_document.idx"]


def test_every_field_has_files_of_its_own_and_documents_without_text_are_counted(model, tmp_path, capsys):
    rows = [{"title": "the cat", "text": "a mat"}, {"title": "", "text": "dogs"}, {"title": "on", "text": " "}]
    assert preprocess(tmp_path, rows, model, "--json-keys", "title", "text", "--append-eod") == 0
    tokenizer = SentencePieceTokenizer(model)
    for field in ("title", "text"):
        expected = [[*tokenizer.encode(row[field]), tokenizer.eos_id] for row in rows if row[field].strip()]
        assert documents(tmp_path / f"out_{field}_document") == expected
    assert capsys.readouterr().out.count(": 2 documents, ") == 2


def test_without_a_tokenizer_one_is_trained_beside_the_files(tmp_path):
    path = write(tmp_path / "in.jsonl", [{"text": text} for text in texts(40)])
    argv = ["--input", path, "--output-prefix", str(tmp_path / "out"), "--tokenizer-vocab-size", "310"]
    assert main(argv) == 0
    tokenizer = SentencePieceTokenizer(tmp_path / "out.tokenizer.model")
    assert tokenizer.vocab_size == 310
    assert [tokenizer.decode(ids) for ids in documents(tmp_path / "out_text_document")] == texts(40)


FAULTS = {
    "{broken": "not JSON",
    '{"body": "the cat"}': "no field 'text'",
    '{"text": null}': "field 'text' is null",
    '["the cat"]': "",
}


@pytest.mark.parametrize("line", FAULTS)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_bad_record_is_one_line_with_its_place_and_nothing_is_left(line, workers, model, tmp_path, capsys):
    rows = [{"text": text} for text in texts(150)]
    rows[130] = line
    assert preprocess(tmp_path, rows, model, "--workers", workers) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"preprocess_data: error: {tmp_path}/in.jsonl:131: ") and FAULTS[line] in error
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]
    assert preprocess(tmp_path, rows, model, "--workers", workers, "--bad-records", "drop") == 0
    assert len(documents(tmp_path / "out_text_document")) == 149
    assert "1 bad record left out" in capsys.readouterr().out


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_text_that_the_tokenizer_cannot_read_is_named(workers, tmp_path, capsys):
    path = tmp_path / "words.model"
    train_sentencepiece(["the cat sat"], path, vocab_size=None, model_type="word", byte_fallback=False)
    assert preprocess(tmp_path, [{"text": "the cat"}, {"text": "the dog"}], str(path), "--workers", workers) == 2
    assert f"{tmp_path}/in.jsonl:2: the tokenizer has no piece for 'dog'" in capsys.readouterr().err


def test_what_is_there_is_not_overwritten(model, tmp_path, capsys):
    rows = [{"text": text} for text in texts(5)]
    assert preprocess(tmp_path, rows, model) == 0
    before = (tmp_path / "out_text_document.bin").read_bytes()
    assert preprocess(tmp_path, rows[:2], model) == 2
    assert "out_text_document.bin exists; name another, or remove it" in capsys.readouterr().err
    assert (tmp_path / "out_text_document.bin").read_bytes() == before


def test_input_without_text_or_a_folder_that_cannot_be_written_is_refused(model, tmp_path, capsys):
    assert preprocess(tmp_path, [{"text": " "}], model) == 2
    assert "--input has no text for" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert preprocess(tmp_path, [{"text": "the cat"}], model, name="file/out") == 2
    assert "--output-prefix" in capsys.readouterr().err
    assert main(["--input", str(tmp_path / "none"), "--output-prefix", "x", "--tokenizer-model", model]) == 2
    assert f"--input {tmp_path}/none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    (
        (["--workers", "0"], "--workers must be at least 1"),
        (["--json-keys", "a", "a"], "names a field twice"),
        (["--tokenizer-type", "huggingface"], "--tokenizer-type huggingface needs --tokenizer-model"),
        (["--tokenizer-type", "GPT2BPETokenizer"], "invalid choice"),
        (["--split-sentences"], "--split-sentences"),
    ),
)
def test_flags_that_cannot_be_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        parse(["--input", "a", "--output-prefix", "b", *flags])


def test_megatron_lms_names_of_tokenizer_kinds_are_understood():
    args = parse(["--input", "a", "--output-prefix", "b", "--tokenizer-type", "SentencePieceTokenizer"])
    assert args.tokenizer_type == "sentencepiece" and args.json_keys == ["text"]


def test_a_data_path_is_one_prefix_or_a_blend():
    assert parse_data_path("a") == [("a", None)]
    assert parse_data_path("a b") == [("a", None), ("b", None)]
    assert parse_data_path(" 30 a  0.5 b ") == [("a", 30.0), ("b", 0.5)]
    assert parse_data_path("1 a b") == [("1", None), ("a", None), ("b", None)]  # read as names: "1" is then missing
