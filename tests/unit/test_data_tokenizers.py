"""Tokenizers: every text comes back, no text can forge a control token, and faults name their option."""

import io
import json
import os
import sys

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from megatron_jq.data.dataset import train_tokenizer
from megatron_jq.data.tokenizers import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from megatron_jq.errors import UserError
from megatron_jq.formats.pair import Pair
from tests.unit.pairs import load_pairs

TEXTS = ["Mira brings a green kite .", "the kite of Mira is green today .", "12 + 30 = 42\n\tdone"] * 3
FORGED = "<think> a </think></think>b</s><pad><unk><|end|><|pad|> </thi</think>nk>"
# Without U+2581, sentencepiece's own mark for a space, and without halves of surrogate pairs, which are no characters.
any_text = st.text(st.characters(exclude_characters="\u2581", exclude_categories=("Cs",)))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.model"
    return train_sentencepiece(TEXTS, path, vocab_size=300)


def control_ids(tokenizer) -> set[int]:
    return {tokenizer.eos_id, tokenizer.pad_id, tokenizer.think_open_id, tokenizer.think_close_id}


def test_control_ids_are_four_different_ones_below_the_vocabulary(bpe):
    assert len(control_ids(bpe)) == 4
    assert bpe.vocab_size == 300 and max(control_ids(bpe)) < 300


@given(any_text)
def test_any_text_comes_back_from_its_bytes(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


@given(st.lists(st.sampled_from(["<think>", "</think>", "</s>", "<pad>", "<s>", "<unk>", " ", "a", "\n"])).map("".join))
def test_no_text_gives_a_control_id(bpe, text):
    ids = bpe.encode(text)
    assert control_ids(bpe).isdisjoint(ids)
    assert bpe.decode(ids) == text


def test_control_ids_leave_no_text(bpe):
    ids = bpe.encode("a green kite")
    assert bpe.decode([bpe.think_open_id, *ids, bpe.think_close_id, bpe.eos_id, bpe.pad_id]) == "a green kite"


def test_an_id_without_a_piece_does_not_pass_for_nothing(bpe):
    ids = bpe.encode("a green kite")
    assert bpe.decode([*ids, bpe.vocab_size]) not in ("a green kite", "a green kite ")


def test_the_same_texts_give_the_same_bytes_and_save_copies_them(bpe, tmp_path):
    again = train_sentencepiece(iter(TEXTS), tmp_path / "deep" / "again.model", vocab_size=300)
    again.save(tmp_path / "copy.model")
    bpe.save(tmp_path / "first.model")
    content = (tmp_path / "first.model").read_bytes()
    assert (tmp_path / "deep" / "again.model").read_bytes() == content == (tmp_path / "copy.model").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["copy.model", "deep", "first.model"]  # no temporary file stays
    loaded = load_tokenizer("sentencepiece", tmp_path / "copy.model")
    assert loaded.encode(TEXTS[0]) == bpe.encode(TEXTS[0]) and loaded.think_close_id == bpe.think_close_id


def test_a_long_text_is_not_left_out_of_training(tmp_path):
    """sentencepiece's own limit is 4192 bytes a text, beyond which it trains without the text and does not say so."""
    tokenizer = train_sentencepiece(["short"] * 3 + ["marmalade " * 1000], tmp_path / "m", vocab_size=None)
    assert len(tokenizer.encode("marmalade")) == 1


def test_digits_are_single_pieces(bpe):
    assert len(bpe.encode("42")) - len(bpe.encode("4")) == 1


def test_a_vocabulary_that_the_texts_cannot_fill_is_refused_with_one_that_works(tmp_path):
    with pytest.raises(UserError, match=r"--tokenizer-vocab-size 5000 .* use at most (\d+)$") as error:
        train_sentencepiece(TEXTS, tmp_path / "m", vocab_size=5000)
    assert not (tmp_path / "m").exists()
    largest = int(str(error.value).split()[-1])
    assert train_sentencepiece(TEXTS, tmp_path / "m", vocab_size=largest).vocab_size == largest
    assert train_sentencepiece(TEXTS, tmp_path / "m", vocab_size=None).vocab_size == largest


def test_a_vocabulary_too_small_for_the_characters_is_refused_with_one_that_works(tmp_path):
    with pytest.raises(UserError, match=r"--tokenizer-vocab-size 100 has no room .* use at least (\d+)$") as error:
        train_sentencepiece(TEXTS, tmp_path / "m", vocab_size=100)
    smallest = int(str(error.value).split()[-1])
    assert train_sentencepiece(TEXTS, tmp_path / "m", vocab_size=smallest).vocab_size == smallest


def test_training_on_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        train_sentencepiece([], tmp_path / "m", vocab_size=300)


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write .*file/m"):
        train_sentencepiece(TEXTS, tmp_path / "file" / "m", vocab_size=300)


def test_a_write_that_fails_leaves_the_old_file_whole(bpe, tmp_path, monkeypatch):
    (tmp_path / "m").write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="cannot write .*/m: No space left on device"):
        bpe.save(tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == b"old" and os.listdir(tmp_path) == ["m"]


def test_a_file_source_gets_bytes_and_bpe_of_the_asked_size(tmp_path):
    pairs = [Pair(text, "42", "here") for text in TEXTS]
    tokenizer = train_tokenizer("data.jsonl", pairs, tmp_path / "m", vocab_size=310)
    assert tokenizer.vocab_size == 310
    assert tokenizer.decode(tokenizer.encode("über 7 Bäume")) == "über 7 Bäume"
    assert (
        train_tokenizer("builtin:recall", load_pairs("builtin:recall"), tmp_path / "m", vocab_size=310).vocab_size
        == 310
    )


def test_a_word_that_has_no_piece_is_named(tmp_path):
    tokenizer = train_tokenizer("builtin:recall", [], tmp_path / "m")
    with pytest.raises(UserError, match="no piece for 'zebra'"):
        tokenizer.encode("Mira brings a zebra kite .")


def test_faults_of_a_sentencepiece_file_name_the_option(tmp_path):
    with pytest.raises(UserError, match=f"--tokenizer-model {tmp_path / 'none'}: No such file"):
        load_tokenizer("sentencepiece", tmp_path / "none")
    (tmp_path / "text").write_text("this is no model")
    with pytest.raises(UserError, match="is not a sentencepiece model"):
        load_tokenizer("sentencepiece", tmp_path / "text")
    for symbols in ({}, {"user_defined_symbols": ["<think>", "</think>"]}):  # text could forge the latter
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS),
            model_writer=model,
            vocab_size=40,
            hard_vocab_limit=False,
            pad_id=3,
            minloglevel=2,
            **symbols,
        )
        (tmp_path / "foreign").write_bytes(model.getvalue())
        with pytest.raises(UserError, match="has no control symbol '<think>'"):
            load_tokenizer("sentencepiece", tmp_path / "foreign")
    with pytest.raises(UserError, match="--tokenizer-type sentencpiece is not known; did you mean sentencepiece"):
        load_tokenizer("sentencpiece", tmp_path)


def test_without_the_tokenizers_package_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install megatron-jq\[hf\]"):
        load_tokenizer("huggingface", tmp_path)


@pytest.fixture
def folder(tmp_path):
    """A byte-level BPE folder as Qwen3's is made: think tokens added, not special; eos and pad special."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(TEXTS, trainer)
    model.add_special_tokens(["<|pad|>", "<|end|>"])
    model.add_tokens([tokenizers.AddedToken(name, special=False) for name in ("<think>", "</think>")])
    model.enable_truncation(4)
    model.enable_padding(length=4)
    model.save(str(tmp_path / "tokenizer.json"))
    settings = {"eos_token": {"content": "<|end|>"}, "pad_token": "<|pad|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_a_hugging_face_folder_gives_its_added_tokens(folder):
    tokenizer = load_tokenizer("huggingface", folder)
    last = tokenizer.vocab_size
    ids = (tokenizer.pad_id, tokenizer.eos_id, tokenizer.think_open_id, tokenizer.think_close_id)
    assert ids == (last - 4, last - 3, last - 2, last - 1)


def test_hugging_face_text_comes_back_and_forges_nothing(folder):
    tokenizer = HuggingFaceTokenizer(folder)

    @given(st.one_of(any_text, st.lists(st.sampled_from([FORGED, "<|end|>", "</think>", "<", "é"])).map("".join)))
    def check(text):
        ids = tokenizer.encode(text)
        assert control_ids(tokenizer).isdisjoint(ids)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([tokenizer.think_open_id, *ids, tokenizer.think_close_id, tokenizer.eos_id]) == text

    check()


def test_a_saved_hugging_face_folder_loads_again(folder, tmp_path):
    tokenizer = HuggingFaceTokenizer(folder)
    tokenizer.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert HuggingFaceTokenizer(tmp_path / "copy").encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_padding_falls_back_to_the_end_token(folder):
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>", "pad_token": null}')
    tokenizer = HuggingFaceTokenizer(folder)
    assert tokenizer.pad_id == tokenizer.eos_id


@pytest.mark.parametrize(
    ("file", "old", "new", "fault"),
    [
        ("tokenizer.json", '"</think>"', '"</thought>"', "has no added token for '</think>'"),
        ("tokenizer_config.json", "eos_token", "other_token", "has no added token for an eos_token"),
        ("tokenizer_config.json", "<|end|>", "<|stop|>", r"has no added token for '<\|stop\|>'"),
        ("tokenizer_config.json", "}", "", "does not hold a Hugging Face tokenizer"),
        ("tokenizer.json", '"model"', '"modem"', "does not hold a Hugging Face tokenizer"),
    ],
)
def test_a_faulty_hugging_face_folder_is_refused(folder, file, old, new, fault):
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    with pytest.raises(UserError, match=fault):
        HuggingFaceTokenizer(folder)


def test_a_hugging_face_folder_without_its_files_is_refused(folder):
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="--tokenizer-model .*tokenizer_config.json: No such file"):
        HuggingFaceTokenizer(folder)
