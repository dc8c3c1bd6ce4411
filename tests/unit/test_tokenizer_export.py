"""Exported tokenizers: AutoTokenizer reads the run's ids out of the folder, or the export is refused."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import transformers

from megatron_jq.checkpoint import folder as folders
from megatron_jq.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_jq.checkpoint.tokenizer_export import check_with_transformers, forgeable, sentencepiece_files
from megatron_jq.config import Config, to_toml
from megatron_jq.data.tasks import builtin_examples, builtin_texts
from megatron_jq.data.tokenizers import load_tokenizer, train_sentencepiece
from megatron_jq.errors import UserError
from megatron_jq.model.hf_config import with_token_ids
from tests.unit.hf_folders import CUT, TINY, make
from tests.unit.tokenizer_kinds import KINDS
from tests.unit.tokenizer_kinds import make as make_tokenizer

DOCUMENTS = sorted((Path(__file__).resolve().parents[2] / "docs").glob("*.md"))[:5]
LINES = [line for path in DOCUMENTS for line in path.read_text(encoding="utf-8").splitlines() if line]
TRAINED, HELD_OUT = LINES[::2], LINES[1::2]
OURS = {"pad_id": 0, "unk_id": 1, "eos_id": 2, "bos_id": -1, "control_symbols": ["<think>", "</think>"]}
IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
#: Sentencepiece models that a user may bring → settings of their training, and whether they can be exported.
MODELS = {
    "bpe": ({"model_type": "bpe", "vocab_size": 700, **IDENTITY}, True),
    "unigram": ({"model_type": "unigram", "vocab_size": 700, **IDENTITY}, True),
    "char": ({"model_type": "char", "hard_vocab_limit": False, "vocab_size": 700, **IDENTITY}, True),
    "normalised": ({"model_type": "bpe", "vocab_size": 700, "byte_fallback": True}, True),
    "without a blank first": ({"model_type": "bpe", "vocab_size": 700, "add_dummy_prefix": False, **IDENTITY}, True),
    "with a beginning": ({"model_type": "bpe", "vocab_size": 700, "bos_id": 3, **IDENTITY}, True),
    "user-defined": ({"model_type": "bpe", "vocab_size": 700, "user_defined_symbols": ["<x>", "::"], **IDENTITY}, True),
    "blank last": ({"model_type": "bpe", "vocab_size": 700, "treat_whitespace_as_suffix": True, **IDENTITY}, False),
}


def trained(path: Path, settings: dict) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINED), model_writer=model, minloglevel=2, **{**OURS, **settings}
    )
    path.write_bytes(model.getvalue())
    return path


def exported(path: Path, folder: Path, model_type: str = "llama"):
    """(our tokenizer, AutoTokenizer's of what is exported of it)."""
    tokenizer = load_tokenizer("sentencepiece", path)
    files, _ = sentencepiece_files(tokenizer, path, 512)
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": tokenizer.vocab_size}))
    check_with_transformers(tokenizer, folder, strict=True)
    return tokenizer, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", MODELS)
def test_a_sentencepiece_model_has_the_same_ids_as_tokenizer_json_or_is_refused(name, tmp_path):
    settings, exportable = MODELS[name]
    path = trained(tmp_path / "tokenizer.model", settings)
    if not exportable:
        with pytest.raises(UserError, match="no tokenizer.json with the same ids: .* texts differ, .*--no-tokenizer"):
            exported(path, tmp_path / "out")
        return
    ours, auto = exported(path, tmp_path / "out")
    assert (len(auto), auto.eos_token_id, auto.pad_token_id) == (ours.vocab_size, ours.eos_id, ours.pad_id)
    assert auto.convert_tokens_to_ids(["<think>", "</think>"]) == [ours.think_open_id, ours.think_close_id]
    names = forgeable(ours, tmp_path / "out")
    texts = [line for line in HELD_OUT if not any(mark in line for mark in names)]
    different = [text for text in texts if auto(text)["input_ids"] != ours.encode(text)]
    assert len(texts) > 100 and len(different) <= (3 if name == "unigram" else 0), different
    for text in ("a green kite", "12 + 30 = 42"):
        ids = ours.encode(text)
        assert auto.decode([*ours.encode(text), ours.eos_id], skip_special_tokens=True) == ours.decode(ids)
    assert auto("x</think>y")["input_ids"].count(ours.think_close_id) == 1  # as the export says
    assert ours.think_close_id not in ours.encode("x</think>y")


@pytest.mark.parametrize("kind", ["recall", "reorder", "sum"])
def test_a_built_in_task_s_words_have_the_same_ids_as_tokenizer_json(kind, tmp_path):
    path = tmp_path / "tokenizer.model"
    train_sentencepiece(builtin_texts(kind), path, vocab_size=None, model_type="word", byte_fallback=False)
    for model_type in ("llama", "qwen3", "mistral"):
        ours, auto = exported(path, tmp_path / model_type, model_type)
        for text in {text for pair in builtin_examples(kind, "heldout", 60, 3) for text in pair}:
            assert auto(text)["input_ids"] == ours.encode(text)
            assert auto.decode(ours.encode(text)) == text
        assert ours.eos_id == auto.eos_token_id and auto.unk_token_id in auto("zebra")["input_ids"]


def test_a_family_whose_class_reads_another_tokenizer_is_refused_before_anything_is_written(tmp_path):
    """transformers takes Qwen2's own class for model_type qwen2, whatever tokenizer_config.json says."""
    path = trained(tmp_path / "tokenizer.model", MODELS["bpe"][0])
    with pytest.raises(UserError, match="as transformers .* reads it.*--no-tokenizer"):
        exported(path, tmp_path / "out", "qwen2")


def test_without_protobuf_or_transformers_the_message_says_what_to_install(tmp_path, monkeypatch):
    path = trained(tmp_path / "tokenizer.model", MODELS["bpe"][0])
    tokenizer = load_tokenizer("sentencepiece", path)
    for name in ("transformers", "google.protobuf"):
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, name, None)
            with pytest.raises(UserError, match=r"pip install megatron-jq\[hf\].*--no-tokenizer"):
                sentencepiece_files(tokenizer, path, 512)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hugging_face_folder_is_read_as_the_run_read_it_or_that_is_said(kind, tmp_path):
    folder = make_tokenizer(tmp_path / "same", kind, bos="before")
    assert check_with_transformers(load_tokenizer("huggingface", folder), folder, strict=False) == ""
    folder = make_tokenizer(tmp_path / "other", kind, tokenizer_class="Qwen2Tokenizer")
    note = check_with_transformers(load_tokenizer("huggingface", folder), folder, strict=False)
    assert ("texts have other ids" in note or "does not read" in note) or kind.startswith("byte-level")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"eos_token_id": 5, "bos_token_id": 1, "pad_token_id": 0}),
        ({"eos_token_id": 5}, {"eos_token_id": 5, "bos_token_id": 1, "pad_token_id": 0}),
        ({"eos_token_id": 7, "pad_token_id": 3}, {"eos_token_id": [5, 7], "bos_token_id": 1, "pad_token_id": 3}),
        (
            {"eos_token_id": [7, 5, 8], "bos_token_id": 2},
            {"eos_token_id": [5, 7, 8], "bos_token_id": 2, "pad_token_id": 0},
        ),
        ({"eos_token_id": [5]}, {"eos_token_id": [5], "bos_token_id": 1, "pad_token_id": 0}),
        ({"eos_token_id": 99, "pad_token_id": 99}, {"eos_token_id": 5, "bos_token_id": 1, "pad_token_id": 0}),
    ],
)
def test_the_end_that_was_trained_stands_first_and_what_else_ended_a_text_stays(before, after):
    ids = {"eos_token_id": 5, "bos_token_id": 1, "pad_token_id": 0}
    assert with_token_ids({**before, "top_p": 0.9}, ids, 10) == {**after, "top_p": 0.9}


def of_a_run(tmp_path: Path, model: Path) -> Path:
    """A checkpoint as a run with this sentencepiece model leaves it: settings in the manifest, its tokenizer's file."""
    tokenizer = load_tokenizer("sentencepiece", model)
    shape = replace(TINY, vocab_size=tokenizer.vocab_size)
    hf_to_megatron(make(tmp_path / "hf", architecture=shape), tmp_path / "save", CUT)
    folder = tmp_path / "save" / "iter_0000000"
    for path in (folder / "tokenizer").iterdir():
        path.unlink()
    (folder / "tokenizer" / "tokenizer.model").write_bytes(model.read_bytes())
    manifest = folders.read_manifest(folder)
    kept = {name: entry for name, entry in manifest.files.items() if not name.startswith("tokenizer/")}
    partial = folder.rename(tmp_path / "save" / "partial")
    (partial / folders.MANIFEST).unlink()
    folders.commit(partial, replace(manifest, config=to_toml(Config()), files={}), kept)
    return tmp_path / "save"


def test_an_export_says_where_texts_end_and_what_text_can_forge(tmp_path):
    save = of_a_run(tmp_path, trained(tmp_path / "m", MODELS["bpe"][0]))
    said = []
    megatron_to_hf(save, tmp_path / "out", dtype=None, max_shard_bytes=10**9, log=said.append)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "README.md",
    }  # fmt: skip
    for name in ("config.json", "generation_config.json"):
        table = json.loads((tmp_path / "out" / name).read_text())
        assert (table["eos_token_id"], table["pad_token_id"], table.get("bos_token_id")) == (2, 0, None)
    readme = (tmp_path / "out" / "README.md").read_text()
    assert len(said) == 1 and "</think>" in said[0] and said[0].removeprefix("note: ") in readme


def test_a_tokenizer_that_cannot_be_exported_is_left_out_on_demand(tmp_path):
    save = of_a_run(tmp_path, trained(tmp_path / "m", MODELS["blank last"][0]))
    with pytest.raises(UserError, match="--no-tokenizer"):
        megatron_to_hf(save, tmp_path / "out", dtype=None, max_shard_bytes=10**9)
    assert not list(tmp_path.glob("*out*"))
    said = []
    megatron_to_hf(
        save, tmp_path / "out", dtype=None, max_shard_bytes=10**9, with_tokenizer=False, log=said.append
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert said == ["note: the tokenizer is not exported (--no-tokenizer)"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 2
