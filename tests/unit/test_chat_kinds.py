"""Every kind of tokenizer and chat template: our prompts are, id for id, what transformers makes of the same messages.

Why this matters: a server renders and tokenises conversations with transformers. A policy that was trained on prompts
that differ by one blank at a seam is served prompts that it never saw.
"""

import json

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_jq.data.prompts import PromptWriter
from megatron_jq.data.template import PromptStyle
from megatron_jq.data.tokenizers import HuggingFaceTokenizer, load_tokenizer
from megatron_jq.errors import UserError
from megatron_jq.formats.pair import Pair
from megatron_jq.formats.record_error import RecordError
from tests.unit.tokenizer_kinds import ADDED, KINDS, SPECIAL, make

LOOP = "{%- for m in messages %}"
TEMPLATES = {
    "chatml": LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}",
    "llama-2": "{{ bos_token }}" + LOOP + "{{ '[INST] ' + m.content + ' [/INST]' }}{%- endfor %}",
    "words": LOOP + "{{ m.role + ': ' + m.content + '\n' }}{%- endfor %}{{ 'answer:' }}",
    "opens": "{{ bos_token }}" + LOOP + "{{ m.content | trim + eos_token }}{%- endfor %}{{ 'answer: <think>\n' }}",
}
CONTENTS = ("Question: what is 12 ?", "42", "\u00e9 (x)", "a  b\n\nc", "?]", "_x", "[INST]", ".5 \u00bd")
SAMPLE = PromptStyle(chat=True, system="You answer in one word.")


def both(folder):
    return load_tokenizer("huggingface", folder), transformers.AutoTokenizer.from_pretrained(str(folder))


def prompt_of(tokenizer, content: str, style=PromptStyle(chat=True), **settings) -> list[int]:  # noqa: B008 (frozen)
    return list(PromptWriter(style, tokenizer, **settings).example(0, Pair(content, "42", "here")).prompt_ids)


def rendered(reference, content: str, system: str = "") -> list[int]:
    messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": content}]
    return reference.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=True)["input_ids"]


def is_known(tokenizer, text: str) -> bool:
    """Whether a tokenizer without bytes has all characters of the text."""
    try:
        tokenizer.encode(text)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_warm_prompts_are_those_of_apply_chat_template(kind, tmp_path):
    for name, template in TEMPLATES.items():
        tokenizer, reference = both(make(tmp_path / name, kind, bos="before", chat_template=template))
        think = [] if name == "opens" else [tokenizer.think_open_id]
        for style in (PromptStyle(chat=True), SAMPLE):
            for content in filter(lambda text: is_known(tokenizer, text), CONTENTS):
                if content == "[INST]" and "[INST]" in template:
                    continue  # a turn's mark, which data cannot forge here
                expected = rendered(reference, content, style.system) + think
                assert prompt_of(tokenizer, content, style) == expected, (name, content)
                assert prompt_of(tokenizer, content, style).count(tokenizer.bos_ids("on")[0]) <= 1


@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("kind", ["prepend", "metaspace-always-whole", "metaspace-first", "byte-level"])
def test_the_class_that_transformers_believes_rather_than_the_file_is_believed_here_too(kind, legacy, tmp_path):
    for model_type in (None, "llama", "mistral", "qwen3"):
        folder = make(
            tmp_path / str(model_type), kind, bos="before", chat_template=TEMPLATES["llama-2"],
            tokenizer_class="LlamaTokenizerFast", **({} if legacy is None else {"legacy": legacy}),
        )  # fmt: skip
        if model_type is not None:
            (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        tokenizer, reference = both(folder)
        for content in CONTENTS[:5]:
            assert prompt_of(tokenizer, content)[:-1] == rendered(reference, content), (model_type, content)
        tokenizer.save(folder / "copy")
        assert load_tokenizer("huggingface", folder / "copy").fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_a_control_token_is_tokenised_as_transformers_does_there(kind, tmp_path):
    """After `</think>`, with and without a bridge; the bridge and y* are cut apart at a fixed place."""
    tokenizer, reference = both(make(tmp_path, kind))
    for text in ("42", "a b", "kite ."):
        after = reference("</think>" + text, add_special_tokens=False)["input_ids"][1:]
        plain = PromptWriter(PromptStyle(), tokenizer).example(0, Pair("x", text, "here"))
        assert plain.answer_ids == (*after, tokenizer.eos_id) and plain.bridge_ids == ()
        joined = PromptWriter(PromptStyle(after_open="\n", after_close="\n\n"), tokenizer)
        example = joined.example(0, Pair("x", text, "here", rationale=text))
        whole = reference("</think>\n\n" + text, add_special_tokens=False)["input_ids"][1:]
        assert [*example.bridge_ids, *example.answer_ids] == [*whole, tokenizer.eos_id]
        opened = [*reference("<think>\n" + text, add_special_tokens=False)["input_ids"], tokenizer.think_close_id]
        start = len(tokenizer.encode("x"))
        assert [*example.prompt_ids[start:], *example.rationale_ids] == opened
        for other in ("another rationale", None):
            again = joined.example(0, Pair("y", text, "here", rationale=other))
            assert (again.bridge_ids, again.answer_ids) == (example.bridge_ids, example.answer_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_forges_a_token_of_the_conversation(kind, tmp_path):
    tokenizer = HuggingFaceTokenizer(make(tmp_path, kind, chat_template=TEMPLATES["llama-2"]))
    marks = [*SPECIAL, *ADDED, "<s", "</", ">", "[", "INST]", " ", "\n", "a", "\ue0021\ue003", "\uff1cs\uff1e"]
    ids = {name: tokenizer._tokenizer.token_to_id(name) for name in (*SPECIAL, *ADDED)}
    control = {token for name, token in ids.items() if name != "[INST]"}
    frame = [token for token in prompt_of(tokenizer, "x") if token in ids.values()]

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.sampled_from(marks), max_size=6).map("".join))
    def check(text):
        if not is_known(tokenizer, text):  # a character that this tokenizer does not have is refused, not forged
            with pytest.raises(RecordError):
                prompt_of(tokenizer, text)
            return
        assert control.isdisjoint(tokenizer.encode(text))
        assert [token for token in prompt_of(tokenizer, text) if token in ids.values()] == frame
        pair = Pair(text, text + "a", "here", rationale=text)
        example = PromptWriter(PromptStyle(after_close="\n"), tokenizer).example(0, pair)
        assert control.isdisjoint((*example.answer_ids[:-1], *example.rationale_ids[:-1], *example.prompt_ids[:-1]))

    check()


@pytest.mark.parametrize("kind", ["byte-level", "metaspace-always", "metaspace-first", "prepend", "unigram"])
def test_a_literal_is_spelled_out_without_a_blank_that_the_text_does_not_have(kind, tmp_path):
    tokenizer = load_tokenizer("huggingface", make(tmp_path, kind))
    for text in ("a</s>b", "x<think>y</think> z", "<s>", "a<|im_end|>\n<|im_start|>b"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


# The beginning of a text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bos", [None, "before", "both"])
def test_plain_prompts_begin_as_the_tokenizer_s_own_rule_says(kind, bos, tmp_path):
    """What transformers adds before a text; what it adds after one has no place in a prompt that goes on."""
    tokenizer, reference = both(make(tmp_path, kind, bos=bos))
    for content in ("Question: what is 12 ?", "a b"):
        for style in (PromptStyle(), PromptStyle("{prompt}\n")):
            text = style.fill(Pair(content, "", ""))
            own = [*([reference.bos_token_id] if bos else []), *reference(text, add_special_tokens=False)["input_ids"]]
            assert prompt_of(tokenizer, content, style) == [*own, tokenizer.think_open_id]
            bare = reference(text, add_special_tokens=False)["input_ids"]
            with_bos = [reference.bos_token_id, *bare, tokenizer.think_open_id]
            assert prompt_of(tokenizer, content, style, add_bos_token="off") == with_bos[1:]
            assert prompt_of(tokenizer, content, style, add_bos_token="on") == with_bos


def test_a_chat_template_has_its_own_beginning_once_whatever_the_rule(tmp_path):
    for name, template in TEMPLATES.items():
        folder = make(tmp_path / name, "prepend", bos="before", chat_template=template)
        tokenizer = load_tokenizer("huggingface", folder)
        [bos], writes = tokenizer.bos_ids("on"), "bos_token" in template
        counts = [prompt_of(tokenizer, "a b", add_bos_token=rule).count(bos) for rule in ("auto", "off", "on")]
        assert counts == [writes, writes, True]


def test_a_folder_that_contradicts_itself_about_the_beginning_is_refused_until_told(tmp_path):
    for name, bos, stated in (("a", "before", False), ("b", None, True)):
        tokenizer = load_tokenizer("huggingface", make(tmp_path / name, "prepend", bos=bos, add_bos_token=stated))
        with pytest.raises(UserError, match="--add-bos-token auto: .*; give --add-bos-token on or off"):
            PromptWriter(PromptStyle(), tokenizer)
        with_bos, without = (prompt_of(tokenizer, "a", PromptStyle(), add_bos_token=rule) for rule in ("on", "off"))
        assert with_bos == [*tokenizer.bos_ids("on"), *without]
    agreed = load_tokenizer("huggingface", make(tmp_path / "c", "prepend", bos="before", add_bos_token=True))
    assert prompt_of(agreed, "a", PromptStyle())[0] == agreed.bos_ids("on")[0]
    none = load_tokenizer("huggingface", make(tmp_path / "d", "prepend", bos_token=None))
    with pytest.raises(UserError, match="--add-bos-token on: .* has no bos_token"):
        PromptWriter(PromptStyle(), none, add_bos_token="on")
