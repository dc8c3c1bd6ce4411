"""One record of every data format, with a gold answer and an id of the test's choice, and every way to store them."""

import gzip
import json
import sys
import types
from pathlib import Path

import pytest

CONTAINERS = ("lines", "list", "gz", "list.gz", "parquet", "hub")


def jsonl(gold, identity="a") -> dict:
    return {"prompt": "two and two", "answer": gold, "id": identity}


def gsm8k(gold, identity="a") -> dict:
    return {"question": "two and two", "answer": f"2+2 = <<2+2=4>>4\n#### {gold}", "id": identity}


def finqa(gold, identity="a") -> dict:
    table = [["", "2017"], ["revenue", "4"]]
    return {
        "pre_text": ["text ."],
        "post_text": [],
        "table": table,
        "qa": {"question": "q", "exe_ans": gold},
        "id": identity,
    }


def hotpotqa(gold, identity="a") -> dict:
    """The hub's form, which parquet can hold too."""
    context = {"title": ["Ada", "Sum"], "sentences": [["Ada is old.", " So is he."], ["A sum."]]}
    return {"question": "q", "answer": gold, "context": context, "id": identity}


def musique(gold, identity="a") -> dict:
    paragraphs = [{"title": "Ada", "paragraph_text": "Ada is old.", "idx": 0}]
    return {"question": "q", "answer": gold, "paragraphs": paragraphs, "answerable": True, "id": identity}


def messages(gold, identity="a") -> dict:
    turns = [{"role": "user", "content": "two and two"}, {"role": "assistant", "content": gold}]
    return {"messages": turns, "id": identity}


def prompt_list(gold, identity="a") -> dict:
    return {"prompt": [{"role": "user", "content": "two and two"}], "answer": gold, "id": identity}


def completion(gold, identity="a") -> dict:
    turn = {"role": "assistant", "content": gold}
    return {"prompt": [{"role": "user", "content": "two and two"}], "completion": [turn], "id": identity}


def verl(gold, identity="a") -> dict:
    """As verl's own preprocessing of GSM8K writes it."""
    return {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": "two and two"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": gold},
        "extra_info": {"split": "train", "index": 0, "answer": "2+2 = 4\n#### 4", "question": "two and two"},
        "id": identity,
    }


#: Every reader's record, and the format that "auto" must find in it.
RECORDS = {
    jsonl: "jsonl",
    gsm8k: "gsm8k",
    finqa: "finqa",
    hotpotqa: "hotpotqa",
    musique: "musique",
    messages: "messages",
    prompt_list: "messages",
    completion: "messages",
    verl: "verl",
}


class FakeHub(types.ModuleType):
    """Stands for the datasets library, which would ask the network."""

    __version__ = "4.1.0"
    exceptions = types.SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))

    def __init__(self, rows: list[dict]):
        super().__init__("datasets")
        self.rows = rows

    def load_dataset(self, path, name=None, *, split, revision):
        return self.rows


def stored(container: str, records: list[dict], folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The source's name, for --train-data."""
    if container == "hub":
        monkeypatch.setitem(sys.modules, "datasets", FakeHub(records))
        return "hub:some/set"
    if container == "parquet":
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(arrow.Table.from_pylist(records), folder / "data.parquet")
        return str(folder / "data.parquet")
    lines = "".join(f"{json.dumps(record)}\n" for record in records)
    text = (json.dumps(records) if "list" in container else lines).encode()
    path = folder / f"data.{container}"
    path.write_bytes(gzip.compress(text) if "gz" in container else text)
    return str(path)
