"""Files that are no plain JSON: gzip and parquet are read, every other container is refused by what it is."""

import bz2
import gzip
import json
import lzma
import sys

import pytest

from megatron_jq.data.containers import _REFUSED
from megatron_jq.data.dataset import load_source
from megatron_jq.errors import UserError
from megatron_jq.formats.options import ReadOptions
from tests.unit.pairs import load_pairs

LINE = b'{"prompt": "a", "answer": "b"}\n'


def write(tmp_path, content: bytes, name: str = "data.jsonl") -> str:
    (tmp_path / name).write_bytes(content)
    return str(tmp_path / name)


@pytest.mark.parametrize("name", ["data.jsonl.gz", "data.json.gz", "data.jsonl"])
def test_a_file_is_known_by_its_bytes_and_faults_of_a_gzipped_one_are_named_by_their_line(name, tmp_path):
    path = write(tmp_path, gzip.compress(b"\xef\xbb\xbf" + LINE + b"\n" + b'{"prompt": "a"}\n'), name)
    with pytest.raises(UserError, match=f"^{path}:3: no field 'answer'"):
        load_pairs(path)
    assert [p.place for p in load_source(path, ReadOptions(bad_records="drop")).pairs] == [f"{path}:1"]


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_gzip_file_is_refused_and_never_read_in_part(damage, tmp_path):
    noise = b"".join(json.dumps({"prompt": f"{n * n}", "answer": f"{n**3}"}).encode() + b"\n" for n in range(3000))
    whole = gzip.compress(noise)
    middle = len(whole) // 2
    data = whole[:middle] if damage == "cut" else whole[:middle] + b"\0\0\0\0" + whole[middle + 4 :]
    path = write(tmp_path, data, "data.jsonl.gz")
    with pytest.raises(UserError, match=f"^--train-data {path}: the gzip file is damaged or breaks off") as fault:
        load_source(path, ReadOptions(bad_records="drop"))
    assert "copy it again" in str(fault.value)


@pytest.mark.parametrize("mark", _REFUSED)
def test_other_containers_are_refused_by_what_they_are(mark, tmp_path):
    what, fix = _REFUSED[mark]
    path = write(tmp_path, mark + b"\0" * 40)
    with pytest.raises(UserError, match=f"^--eval-data {path} is {what}; "):
        load_pairs(path, flag="--eval-data")


def test_what_compressors_really_write_is_recognised(tmp_path):
    for data, word in (
        (bz2.compress(LINE), "bzip2"),
        (lzma.compress(LINE), "xz"),
        (LINE.decode().encode("utf-16"), "UTF-16"),
    ):
        with pytest.raises(UserError, match=word):
            load_pairs(write(tmp_path, data))
    with pytest.raises(UserError, match="gzipped, and no JSON in it"):
        load_pairs(write(tmp_path, gzip.compress(gzip.compress(LINE))))


def test_rows_of_a_parquet_file_are_named_by_their_number_and_empty_columns_are_no_fields(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": None}, {"prompt": "e", "answer": "f"}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "data.parquet", row_group_size=2)
    path = str(tmp_path / "data.parquet")
    with pytest.raises(UserError, match=rf"^{path}\[1\]: no field 'answer'; the line has prompt"):
        load_pairs(path)
    source = load_source(path, ReadOptions(bad_records="drop"))
    assert [pair.place for pair in source.pairs] == [f"{path}[0]", f"{path}[2]"]
    parquet.write_table(arrow.Table.from_pylist(rows[:0], schema=arrow.schema([("prompt", arrow.string())])), path)
    with pytest.raises(UserError, match=f"^--train-data {path} is empty"):
        load_pairs(path)


def test_a_damaged_parquet_file_or_one_without_pyarrow_is_refused_with_the_fix(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    path = write(tmp_path, b"PAR1 and nothing more", "data.parquet")
    with pytest.raises(UserError, match=f"^--train-data {path}: the parquet file cannot be read"):
        load_pairs(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install megatron-jq\[datasets\]"):
        load_pairs(path)


def test_one_shard_of_several_is_said_to_be_one(tmp_path):
    path = write(tmp_path, LINE, "train-00000-of-00002.jsonl")
    assert load_source(path, ReadOptions()).notes == ("is one of 2 files by its name, and the others are not read",)
    assert load_source(write(tmp_path, LINE, "train-00000-of-00001.jsonl"), ReadOptions()).notes == ()
