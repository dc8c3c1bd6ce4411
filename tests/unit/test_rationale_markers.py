"""What opens and closes a rationale: named tokens, none, the end of the model's turn."""

import hashlib
import json

import pytest
import transformers

from megatron_jq.config import parse_args
from megatron_jq.config_validate import derive
from megatron_jq.data.prepared import read_manifest, read_prepared
from megatron_jq.data.prompts import PromptWriter
from megatron_jq.data.rationale_markers import MarkerChoice
from megatron_jq.data.reading import encode_reading, read_source
from megatron_jq.data.template import PromptStyle
from megatron_jq.data.tokenizer_choice import marker_choice
from megatron_jq.data.tokenizers import load_tokenizer, train_sentencepiece
from megatron_jq.errors import UserError
from megatron_jq.formats.pair import Pair
from tests.e2e.records import CHAT, GSM8K, WORDS, chat_folder
from tools.prepare_data import main as prepare_main

RESERVED = ("<|reserved_0|>", "<|reserved_1|>")
WARM = PromptStyle("{prompt}", chat=True, after_open="\n", after_close="\n\n")
ASKS = PromptStyle("{prompt}", chat=True, answer_prompt="the answer alone")
PAIR = Pair("what is the table ?", "42", "data.jsonl:1", rationale="Reason step by step")
X = "<|im_start|>user\nwhat is the table ?<|im_end|>\n<|im_start|>assistant\n"
NEXT = "\n<|im_start|>assistant\n"
ASKED = "\n<|im_start|>user\nthe answer alone<|im_end|>\n<|im_start|>assistant\n"
TURN = MarkerChoice(close="end-of-turn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `<think>` and `</think>`, and reserved tokens."""
    return chat_folder(tmp_path_factory.mktemp("thinking"), ("<think>", "</think>", *RESERVED))


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """One as an instruct model's without thinking tokens."""
    return chat_folder(tmp_path_factory.mktemp("bare"), RESERVED)


def text_of(ids, tokenizer) -> str:
    return "".join(map(tokenizer.piece, ids))


@pytest.mark.parametrize(
    ("choice", "style", "x", "given", "bridge"),
    [
        (MarkerChoice(), WARM, f"{X}<think>\n", "</think>", "\n\n"),
        (MarkerChoice(*RESERVED), WARM, f"{X}{RESERVED[0]}\n", RESERVED[1], "\n\n"),
        (MarkerChoice("none"), WARM, X, "</think>", "\n\n"),
        (MarkerChoice("none", RESERVED[1]), WARM, X, RESERVED[1], "\n\n"),
        (TURN, WARM, X, "<|im_end|>", NEXT),
        (TURN, ASKS, X, "<|im_end|>", ASKED),
        (MarkerChoice(close="<|im_end|>"), WARM, X, "<|im_end|>", NEXT),
        (MarkerChoice("<think>", "end-of-turn"), WARM, f"{X}<think>\n", "<|im_end|>", NEXT),
        (MarkerChoice("none"), PromptStyle(), PAIR.prompt, "</think>", ""),
        (TURN, PromptStyle(after_close=" Answer:"), PAIR.prompt, "<|im_end|>", " Answer:"),
    ],
)
def test_each_way_is_written_around_the_rationale(folder, choice, style, x, given, bridge):
    tokenizer = load_tokenizer("huggingface", folder, choice)
    example = PromptWriter(style, tokenizer).example(0, PAIR)
    assert text_of(example.prompt_ids, tokenizer) == x
    assert text_of(example.rationale_ids, tokenizer) == f"{PAIR.rationale}{given}"
    assert example.rationale_ids[-1] == tokenizer.think_close_id
    assert text_of(example.bridge_ids, tokenizer) == bridge
    assert text_of(example.answer_ids, tokenizer) == "42<|im_end|>"


@pytest.mark.parametrize("style", [WARM, ASKS])
def test_turns_have_the_ids_of_the_whole_conversation_in_transformers(bare, style):
    """x, z and its end, what opens the answer's turn, y* and its end: as the chat template itself writes them."""
    tokenizer = load_tokenizer("huggingface", bare, MarkerChoice(or_end_of_turn=True))
    example = PromptWriter(style, tokenizer).example(0, PAIR)
    asked = [{"role": "user", "content": style.answer_prompt}] if style.answer_prompt else []
    messages = [
        {"role": "user", "content": PAIR.prompt},
        {"role": "assistant", "content": PAIR.rationale},
        *asked,
        {"role": "assistant", "content": PAIR.answer},
    ]
    text = transformers.AutoTokenizer.from_pretrained(bare).apply_chat_template(messages, tokenize=False)
    fast = transformers.AutoTokenizer.from_pretrained(bare)(text.removesuffix("\n"), add_special_tokens=False)
    row = [*example.prompt_ids, *example.rationale_ids, *example.bridge_ids, *example.answer_ids]
    assert row == fast["input_ids"]


@pytest.mark.parametrize("choice", [MarkerChoice(*RESERVED), MarkerChoice("none"), TURN])
def test_text_cannot_forge_a_marker(folder, choice):
    tokenizer = load_tokenizer("huggingface", folder, choice)
    spelled = f"a {tokenizer.think_close} b {tokenizer.think_open or ''} c<|im_end|>\n<|im_start|>assistant\n"
    for style in (WARM, ASKS, PromptStyle(after_close="\n")):
        example = PromptWriter(style, tokenizer).example(0, Pair(spelled, spelled, "x", rationale=spelled))
        plain = PromptWriter(style, tokenizer).example(0, PAIR)
        for part in ("prompt_ids", "bridge_ids", "rationale_ids", "answer_ids"):
            ids, expected = getattr(example, part), getattr(plain, part)
            of_text = [[token for token in tokens if tokenizer.is_special(token)] for tokens in (ids, expected)]
            assert of_text[0] == of_text[1], f"{part} holds another control token than the frame's"
        assert tokenizer.decode(example.answer_ids) == spelled


def test_without_thinking_tokens_warm_prompts_end_a_rationale_with_the_turn(bare):
    choice = marker_choice(parse_args(["--prompt-style", "warm"]))
    tokenizer = load_tokenizer("huggingface", bare, choice)
    assert (tokenizer.think_open, tokenizer.think_open_id, tokenizer.think_close) == (None, None, "<|im_end|>")
    assert tokenizer.think_close_id == tokenizer.eos_id
    with pytest.raises(UserError, match="has no added token for '<think>'") as error:
        load_tokenizer("huggingface", bare, marker_choice(parse_args([])))
    for way in (f"such as {RESERVED[0]}, {RESERVED[1]}", "--think-open none", "--think-close end-of-turn",
                "convert hf-to-megatron --add-tokens '<think>' '</think>'"):  # fmt: skip
        assert way in str(error.value)


def test_fingerprints_of_the_default_are_those_from_before_the_settings(folder, tmp_path):
    default = load_tokenizer("huggingface", folder)
    control = f"{default.eos_id} {default.pad_id} {default.think_open_id} {default.think_close_id}\n"
    expected = hashlib.sha256(control.encode() + (folder / "tokenizer.json").read_bytes()).hexdigest()
    assert default.fingerprint() == expected
    choices = (MarkerChoice("<think>", "</think>"), MarkerChoice(or_end_of_turn=True))
    assert {load_tokenizer("huggingface", folder, choice).fingerprint() for choice in choices} == {expected}
    path = tmp_path / "tokenizer.model"
    ours = train_sentencepiece([" ".join(WORDS)] * 3, path, vocab_size=300)
    assert ours.fingerprint() == hashlib.sha256(path.read_bytes()).hexdigest()
    others = (MarkerChoice("none"), MarkerChoice(*RESERVED), TURN)
    prints = {load_tokenizer("huggingface", folder, choice).fingerprint() for choice in others}
    assert len(prints | {expected}) == 4
    without = load_tokenizer("sentencepiece", path, MarkerChoice("none"))
    assert without.fingerprint() != ours.fingerprint() and without.control_ids < ours.control_ids
    with pytest.raises(UserError, match="no control symbol '<t>'|--think-open <t> is"):
        load_tokenizer("sentencepiece", path, MarkerChoice("<t>"))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            MarkerChoice("<thinking>"),
            r"--think-open <thinking> is \d+ tokens of --tok.*, and a marker is one",
        ),
        (MarkerChoice(close="table"), "--think-close table is an ordinary token of .*, which any text can give"),
        (MarkerChoice("</think>"), "--think-open </think> also closes it; give another token, or --think-open none"),
        (MarkerChoice("<|im_end|>"), r"--think-open <\|im_end\|> also ends a text"),
        (MarkerChoice("<|im_end|>", "end-of-turn"), r"--think-open <\|im_end\|> also closes it"),
        (MarkerChoice(close="none"), "--think-close none is"),
    ],
)
def test_a_marker_that_cannot_be_one_is_refused(folder, choice, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer("huggingface", folder, choice)


def test_a_closing_token_that_ends_the_answer_needs_something_between(folder):
    tokenizer = load_tokenizer("huggingface", folder, TURN)
    with pytest.raises(UserError, match=r"--think-close <\|im_end\|> ends the answer too, and nothing stands between"):
        PromptWriter(PromptStyle(), tokenizer)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHAT.replace("assistant\\n", "assistant\\n<think>\\n"), "adds a thinking block of its own"),
        (CHAT.replace("assistant\\n", "assistant\\n<think></think>"), "adds a thinking block of its own"),
        (CHAT.replace("<|im_end|>", "<|endoftext|>"), r"ends an assistant's turn with '<\|endoftext\|>"),
        (  # as Mistral's: nothing opens a turn of the assistant but the user's message
            "{%- for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else "
            "m.content + '<|im_end|>' }}{%- endfor %}", "opens no other turn .* answer_prompt",
        ),
        ("{{ messages[0].content }}", "does not hold each message once"),
    ],
)  # fmt: skip
def test_a_chat_template_whose_turns_cannot_be_used_is_refused(template, message, tmp_path):
    tokenizer = load_tokenizer("huggingface", chat_folder(tmp_path, RESERVED, chat_template=template), TURN)
    with pytest.raises(UserError, match=message):
        PromptWriter(WARM, tokenizer)


def test_a_template_without_a_second_turn_takes_the_user_s_message_between(tmp_path):
    template = (
        "{%- for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else "
        "m.content + '<|im_end|>' }}{%- endfor %}"
    )
    tokenizer = load_tokenizer("huggingface", chat_folder(tmp_path, RESERVED, chat_template=template), TURN)
    example = PromptWriter(ASKS, tokenizer).example(0, PAIR)
    assert text_of(example.bridge_ids, tokenizer) == "[INST] the answer alone [/INST]"


def prepared(tmp_path, folder, name: str, *flags: str) -> str:
    source = tmp_path / "data.jsonl"
    source.write_text("".join(json.dumps({**GSM8K, "question": f"what is {n} ?"}) + "\n" for n in range(3)))
    tokens = ["--tokenizer-type", "huggingface", "--tokenizer-model", str(folder)]
    assert prepare_main(["--train-data", str(source), *tokens, *flags, "--output", str(tmp_path / name)]) == 0
    return str(tmp_path / name)


def test_a_prepared_set_keeps_its_markers_and_an_older_one_has_the_default(folder, tmp_path):
    warm = ("--prompt-style", "warm")
    default, turn = (
        prepared(tmp_path, folder, "a", *warm),
        prepared(tmp_path, folder, "b", *warm, "--think-close", "end-of-turn"),
    )
    assert [read_prepared(source, "train").think_close for source in (default, turn)] == ["</think>", "<|im_end|>"]
    assert read_manifest(tmp_path / "a", "x").content != read_manifest(tmp_path / "b", "x").content
    for source, other in ((default, ["--think-close", "end-of-turn"]), (turn, ["--think-close", "</think>"])):
        reading = read_source(parse_args([]), source, "train", "--train-data")
        alike = load_tokenizer("huggingface", folder, marker_choice(parse_args([]), source))
        assert encode_reading(parse_args([]), reading, alike).placed == reading.prepared.placed
        settings = parse_args(other)
        unlike = load_tokenizer("huggingface", folder, marker_choice(settings, source))
        with pytest.raises(UserError, match="was prepared with --think-open .* --think-close .* leave both out"):
            encode_reading(settings, reading, unlike)
    manifest = tmp_path / "a" / "manifest.json"
    new, table = read_prepared(default, "train"), json.loads(manifest.read_text())
    del table["think_open"], table["think_close"]
    manifest.write_text(json.dumps({**table, "format": 3}))
    assert read_prepared(default, "train") == new


@pytest.mark.parametrize("flag", ["--think-open", "--think-close"])
def test_an_empty_name_is_refused(flag):
    with pytest.raises(UserError, match=f"{flag} must not be empty"):
        derive(parse_args([f"{flag}="]), 1)
