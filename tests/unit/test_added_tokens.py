"""Tokens added while a folder is converted: their rows, every other row as before, files that transformers reads."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file

from megatron_jq.checkpoint import folder as folders
from megatron_jq.checkpoint.convert import hf_to_megatron
from megatron_jq.checkpoint.slabs import ShardLayout
from megatron_jq.checkpoint.torch_dist import ShardReader
from megatron_jq.data.tokenizers import load_tokenizer, train_sentencepiece
from megatron_jq.errors import UserError
from tests.unit.hf_folders import TINY, assert_same, export, make, weights
from tests.unit.tokenizer_kinds import make as make_tokenizer

NEW = ("<plan>", "</plan>")
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
TEXTS = ("a green kite", "Answer: 42", "<plan", "x>y", "12 + 30 ?\n", "")


def source(path: Path, *, kind="byte-level", spare=0, tied=False, dtype=torch.float32, listed=False, **settings):
    """(a folder with a real tokenizer, its tensors, tokens). spare: rows of the vocabulary that no token uses. listed:
    tokenizer_config.json lists the added tokens again.
    """
    make_tokenizer(path.parent / f"{path.name}-tokenizer", kind, **settings)
    file = path.parent / f"{path.name}-tokenizer" / "tokenizer.json"
    tokens = tokenizers.Tokenizer.from_file(str(file)).get_vocab_size()
    if listed:
        added = {str(entry.pop("id")): entry for entry in json.loads(file.read_text())["added_tokens"]}
        make_tokenizer(file.parent, kind, added_tokens_decoder=added, **settings)
    shape = replace(TINY, vocab_size=tokens + spare, tie_embeddings=tied, qk_layernorm=False)
    tensors = weights(shape, dtype)
    make(path, tensors, shape)
    for file in (path.parent / f"{path.name}-tokenizer").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path, tensors, tokens


def read(folder: Path):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("spare", "rows"), [(0, 2), (1, 2), (9, 9)])
def test_new_tokens_have_rows_and_every_other_row_stays(tied, spare, rows, tmp_path):
    """Of 9 spare rows two are taken, and the vocabulary stays; of one, one is taken and one is new."""
    folder, tensors, tokens = source(tmp_path / "hf", spare=spare, tied=tied, dtype=torch.bfloat16)
    said: list[str] = []
    saved = hf_to_megatron(folder, tmp_path / "save", ShardLayout(2, 16), new_tokens=NEW, log=said.append)
    manifest = folders.read_manifest(saved)
    assert (manifest.vocab_size, manifest.architecture["vocab_size"]) == (tokens + rows, tokens + rows)
    assert manifest.source["added_tokens"] == {"<plan>": tokens, "</plan>": tokens + 1}
    expected = dict(tensors)
    for name in (EMBEDDING,) if tied else (EMBEDDING, OUTPUT):
        table = tensors[name]
        grown = torch.cat([table, table.new_zeros(max(0, rows - spare), table.shape[1])])
        grown[tokens : tokens + 2] = initial(folder, table, tokens)
        expected[name] = grown
        padded = ShardReader(saved).tensors["embedding.word_embeddings.weight"][0][0]
        assert padded % 32 == 0 and padded >= tokens + rows
    assert_same(export(tmp_path / "save", tmp_path / "back"), expected)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == {**json.loads((folder / "config.json").read_text()), "vocab_size": tokens + rows}
    [line] = said
    assert f"'<plan>' is token {tokens}" in line and str(saved / "tokenizer") in line
    assert ("grows" in line) == (rows > spare)
    # What was exported is a folder like any other.
    hf_to_megatron(tmp_path / "back", tmp_path / "again", ShardLayout(1, 1))
    assert_same(export(tmp_path / "again", tmp_path / "twice"), expected)


def initial(folder: Path, table: torch.Tensor, tokens: int) -> torch.Tensor:
    pieces = [read(folder)(name, add_special_tokens=False)["input_ids"] for name in NEW]
    assert all(len(ids) > 1 and max(ids) < tokens for ids in pieces)
    return torch.stack([table[ids].double().mean(0) for ids in pieces]).to(table.dtype)


#: kind of tokenizer → arguments of source
READ = {
    "byte-level": {},
    "metaspace-first": {"tokenizer_class": "LlamaTokenizerFast", "legacy": False},
    "metaspace-always": {},
    "sentencepiece-bpe": {"listed": True},
    "byte-level-prefix": {"tokenizer_class": "Qwen2TokenizerFast", "listed": True},
    "unigram": {},
}


@pytest.mark.parametrize("kind", READ)
def test_transformers_and_a_run_read_new_tokens_as_one_and_texts_as_before(kind, tmp_path):
    folder, _, tokens = source(tmp_path / "hf", kind=kind, **READ[kind])
    (folder / "added_tokens.json").write_text('{"<think>": 6}')
    hf_to_megatron(folder, tmp_path / "save", ShardLayout(), new_tokens=NEW)
    export(tmp_path / "save", tmp_path / "back")
    before, after, ours = read(folder), read(tmp_path / "back"), load_tokenizer("huggingface", tmp_path / "back")
    assert len(after) == ours.vocab_size == tokens + 2
    assert after.convert_tokens_to_ids(list(NEW)) == [tokens, tokens + 1]
    ids = after("so<plan> a </plan>42", add_special_tokens=False)["input_ids"]
    assert ids.count(tokens) == ids.count(tokens + 1) == 1
    assert "<plan>" in after.decode(ids, skip_special_tokens=True)
    for text in TEXTS:
        assert after(text)["input_ids"] == before(text)["input_ids"]
    assert json.loads((tmp_path / "back" / "added_tokens.json").read_text())["</plan>"] == tokens + 1
    listed = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text()).get("added_tokens_decoder")
    assert (listed is not None) == READ[kind].get("listed", False)
    assert listed is None or listed[str(tokens)]["content"] == "<plan>"


def with_gaps(folder: Path) -> None:
    table = json.loads((folder / "tokenizer.json").read_text())
    last = max(table["model"]["vocab"], key=table["model"]["vocab"].get)
    table["model"]["merges"] = [pair for pair in table["model"]["merges"] if "".join(pair) != last]
    table["added_tokens"] = []
    table["model"]["vocab"][last] += 3
    (folder / "tokenizer.json").write_text(json.dumps(table))


def of_another_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] -= 4
    tensors = load_file(folder / "model.safetensors")
    make(folder.parent / "smaller", {n: t[:-4] if n in (EMBEDDING, OUTPUT) else t for n, t in tensors.items()})
    (folder / "model.safetensors").write_bytes((folder.parent / "smaller" / "model.safetensors").read_bytes())
    (folder / "config.json").write_text(json.dumps(config))


def sentencepiece_alone(folder: Path) -> None:
    train_sentencepiece(["a green kite"] * 3, folder / "tokenizer.model", vocab_size=None)
    (folder / "tokenizer.json").unlink()


def sentencepiece_first(folder: Path) -> None:
    train_sentencepiece(["a green kite"] * 3, folder / "tokenizer.model", vocab_size=None)


#: name → (what is changed in the folder, tokens, the message)
REFUSED = {
    "there already": (
        None,
        ("<think>", "</think>"),
        "has '<think>' .id 336., '</think>' .id 337. already.*leave --add",
    ),
    "one is there": (None, ("<think>", "<plan>"), "has '<think>' [(]id 336[)] already.*name the others alone"),
    "empty": (None, ("",), "--add-tokens '': a token is not empty"),
    "a blank": (None, (" <plan>",), "has no blank at its ends"),
    "twice": (None, ("<plan>", "</plan>", "<plan>"), "names '<plan>' twice; name it once"),
    "a word": (None, ("Answer",), "a word of ordinary text .* such as '<Answer>'"),
    "a piece": (None, ("+",), "'.': it is a piece of .*tokenizer.json .id .*which ordinary text holds"),
    "gaps": (with_gaps, NEW, "does not read it as one token with the next id, .*its ids have gaps"),
    "another model's": (of_another_model, NEW, "tokens up to id 338, .*a vocabulary of 335.*another model's"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), NEW, "holds no tokenizer; put the model's tokenizer.j"),
    "sentencepiece": (sentencepiece_alone, NEW, r"holds tokenizer.model alone.*AutoTokenizer.from_pretrained\(DIR\)"),
    "sentencepiece first": (sentencepiece_first, NEW, "tokenizer.model is the tokenizer that is used.*remove it"),
    "no JSON": (lambda f: (f / "tokenizer.json").write_text("{"), NEW, "tokenizer.json is not valid JSON"),
    "no tokenizer.json": (lambda f: (f / "tokenizer.json").write_text("{}"), NEW, "does not hold a Hugging Face tok"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_added_is_refused_in_one_line_before_anything_is_written(name, tmp_path):
    change, tokens, message = REFUSED[name]
    folder, _, _ = source(tmp_path / "hf")
    if change is not None:
        change(folder)
    with pytest.raises(UserError, match=message) as caught:
        hf_to_megatron(folder, tmp_path / "save", ShardLayout(), new_tokens=tokens)
    assert "\n" not in str(caught.value) and not (tmp_path / "save").exists()
