"""Chat files: which lists of messages are read, as what, and that every other is refused by name and with the fix."""

import json

import pytest

from megatron_jq.data.bad_records import BadRecords
from megatron_jq.data.dataset import load_source
from megatron_jq.data.prompts import PromptWriter, encode_pairs
from megatron_jq.data.template import template_of
from megatron_jq.data.tokenizers import load_tokenizer
from megatron_jq.errors import UserError
from megatron_jq.formats.options import ReadOptions
from tests.e2e.records import chat_folder
from tests.unit.data_files import verl

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "two and two?"}
ANSWER = {"role": "assistant", "content": "4"}
THOUGHT = {"role": "assistant", "content": "<think>\n2+2\n</think>\n\n4"}
RULE = {"style": "rule", "ground_truth": "4"}

# Record → prompt, gold, aliases, rationale
READ = [
    ({"messages": [USER, ANSWER]}, "two and two?", "4", (), None),
    ({"messages": [SYSTEM, USER, ANSWER]}, "Be brief.\n\ntwo and two?", "4", (), None),
    ({"messages": [USER, THOUGHT]}, "two and two?", "4", (), "2+2"),
    ({"messages": [USER, {**ANSWER, "reasoning_content": "2+2"}]}, "two and two?", "4", (), "2+2"),
    ({"messages": [USER, {**ANSWER, "thinking": "2+2", "tool_calls": None}]}, "two and two?", "4", (), "2+2"),
    ({"prompt": [USER], "completion": [THOUGHT]}, "two and two?", "4", (), "2+2"),
    ({"prompt": [SYSTEM, USER], "answer": "4"}, "Be brief.\n\ntwo and two?", "4", (), None),
    ({"prompt": [USER], "answer": ["4", "four"]}, "two and two?", "4", ("four",), None),
    ({"prompt": [USER], "reward_model": RULE}, "two and two?", "4", (), None),
    ({"prompt": [USER], "reward_model": {**RULE, "ground_truth": ["4", "four"]}}, "two and two?", "4", ("four",), None),
    ({"prompt": [USER], "reward_model": {"ground_truth": {"target": ["4"]}}}, "two and two?", "4", (), None),
    ({"prompt": [USER], "reward_model": {"style": "rule", "ground_truth": 4}}, "two and two?", "4", (), None),
]
# Record → part of the message
REFUSED = [
    ({"messages": [USER]}, "the last of 'messages' is not the assistant's turn; end it with the assistant's"),
    ({"messages": []}, "the last of 'messages' is not the assistant's turn"),
    ({"messages": [USER, ANSWER, USER, ANSWER]}, "has the roles user, assistant, user; it must be one user's message"),
    ({"messages": [ANSWER]}, "has the roles of nobody"),
    ({"messages": [USER, {**ANSWER, "content": ""}]}, "is empty"),
    ({"messages": [USER, {**ANSWER, "content": "<think>2+2"}]}, "spells <think>"),
    ({"messages": [USER, {**THOUGHT, "thinking": "2+2"}]}, "gives its rationale twice"),
    ({"messages": [USER, {**ANSWER, "tool_calls": [{"id": "1"}]}]}, "has 'tool_calls', which is not read"),
    ({"messages": [{**USER, "content": [{"type": "image"}]}, ANSWER]}, "other contents, such as images, are not read"),
    ({"messages": [{"from": "human", "value": "q"}, ANSWER]}, "message 0 of field 'messages' is not"),
    ({"prompt": [USER], "completion": [ANSWER], "answer": "4"}, "'completion' and 'answer' could both be"),
    ({"prompt": [USER], "completion": [ANSWER, ANSWER]}, "'completion' is not a list of one message"),
    ({"prompt": [USER], "solution": "4"}, "no field 'answer'"),
    ({"prompt": ["text"], "answer": "4"}, "message 0 of field 'prompt' is not"),
    ({"prompt": [USER], "reward_model": {"style": "model", "ground_truth": "4"}}, "reward_model.style is 'model'"),
    ({"prompt": [USER], "reward_model": {"style": "rule", "ground_truth": ""}}, "'reward_model.ground_truth' is empty"),
    ({"prompt": [USER], "reward_model": {**RULE, "ground_truth": '{"inputs": []}'}}, "is an object, such as tests"),
    ({"prompt": [USER], "reward_model": {**RULE, "ground_truth": {"a": "4"}}}, "is an object, such as tests"),
    (
        {"prompt": [USER], "reward_model": RULE, "answer": "5"},
        "the form of messages and of verl, which take different gold answers: --data-format messages takes",
    ),
    ({"messages": [USER, ANSWER], "answer": "5"}, "the form of jsonl and of messages, which take different gold"),
    ({"conversations": [{"from": "human", "value": "q"}]}, "write it as 'messages', with 'role' and 'content'"),
]


def lines(tmp_path, *records: dict) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return str(path)


@pytest.mark.parametrize(("record", "prompt", "gold", "aliases", "rationale"), READ)
def test_these_conversations_are_read(record, prompt, gold, aliases, rationale, tmp_path):
    path = lines(tmp_path, record)
    (pair,) = load_source(path, ReadOptions()).pairs
    assert (pair.prompt, pair.answer, pair.aliases, pair.rationale) == (prompt, gold, aliases, None)
    if rationale is not None:
        given = load_source(path, ReadOptions(rationales=True))
        assert given.pairs[0].rationale == rationale and given.notes == ()
    else:
        with pytest.raises(UserError, match="no given rationale to imitate"):
            load_source(path, ReadOptions(rationales=True))


@pytest.mark.parametrize(("record", "words"), REFUSED)
def test_every_other_conversation_is_refused_by_line_and_field(record, words, tmp_path):
    path = lines(tmp_path, record)
    with pytest.raises(UserError) as fault:
        load_source(path, ReadOptions())
    assert str(fault.value).startswith(f"{path}:1: ") and words in str(fault.value)


def test_a_format_that_is_named_says_which_of_two_gold_answers_is_meant(tmp_path):
    path = lines(tmp_path, {"prompt": [USER], "reward_model": RULE, "answer": "5"})
    assert load_source(path, ReadOptions("verl")).pairs[0].answer == "4"
    assert load_source(path, ReadOptions("messages")).pairs[0].answer == "5"
    path = lines(tmp_path, {"messages": [USER], "solution": "6"})
    options = ReadOptions(prompt_field="messages", answer_field="solution")
    assert load_source(path, options).pairs[0].answer == "6"


def test_a_field_inside_an_object_is_named_with_dots(tmp_path):
    record = {**verl("4"), "prompt": "two and two?"}
    options = ReadOptions("jsonl", answer_field="reward_model.ground_truth", id_field="extra_info.index")
    source = load_source(lines(tmp_path, record, record), ReadOptions(**{**vars(options), "bad_records": "drop"}))
    assert [pair.answer for pair in source.pairs] == ["4"] and source.bad[0].kind == "duplicate id"


def test_warm_prompts_are_the_files_own_messages_as_the_chat_template_writes_them(tmp_path):
    """Against transformers, with a system message and without, in one file."""
    transformers = pytest.importorskip("transformers")
    folder = chat_folder(tmp_path)
    records = [{"messages": [SYSTEM, USER, ANSWER]}, {"messages": [USER, ANSWER]}]
    pairs = load_source(lines(tmp_path, *records), ReadOptions()).pairs
    tokenizer = load_tokenizer("huggingface", folder)
    writer = PromptWriter(template_of("messages").style("warm"), tokenizer)
    placed = encode_pairs(pairs, writer, BadRecords())
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for one, record in zip(placed, records, strict=True):
        text = theirs.apply_chat_template(record["messages"][:-1], add_generation_prompt=True, tokenize=False)
        expected = theirs(text + "<think>\n", add_special_tokens=False)["input_ids"]
        assert list(one.example.prompt_ids) == expected
