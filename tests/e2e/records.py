"""Format-true records of our own, one a data set, and a tokenizer with a chat template, fixed by what stands here."""

import json
from pathlib import Path

import tokenizers

WORDS = (
    "the question is what was growth rate of revenue in year company final answer alone plain number without unit step "
    "Reason Then give first Below are some paragraphs and facts one more than Answering it takes text name date words "
    "financial report table about excerpt sign thousands separator percent write percentage fraction user assistant "
    "Question Solve this problem by with from them matter others not several each another most few only"
).split()
CHAT = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
FINQA = {
    "pre_text": ["revenue grew ."],
    "post_text": ["( a ) rounded ."],
    "table": [["", "2017", "2016"], ["revenue", "$ 12.5", "$ 10.0"]],
    "qa": {"question": "what was the growth rate of revenue ?", "answer": "25%", "exe_ans": 0.25, "program": ""},
    "id": "AAA/2017/page_41.pdf-1",
}
HOTPOTQA = {
    "_id": "5a0",
    "answer": "Chief Clerk",
    "question": "What was the author?",
    "supporting_facts": [["Ferry", 0]],
    "context": [["Ferry", ["A novel by Ada.", " It is old."]], ["Ada", ["Ada was Chief Clerk."]]],
    "type": "bridge",
    "level": "hard",
}
MUSIQUE = {
    "id": "2hop__1_2",
    "paragraphs": [{"idx": 0, "title": "Ada", "paragraph_text": "Ada is from Aldeby.", "is_supporting": True}],
    "question": "Where is Ada from?",
    "question_decomposition": [],
    "answer": "Aldeby",
    "answer_aliases": ["Aldeby town"],
    "answerable": True,
}
GSM8K = {"question": "What is two and two?", "answer": "2+2=<<2+2=4>>4\n#### 4"}
RECORDS = {"finqa": FINQA, "hotpotqa": HOTPOTQA, "musique": MUSIQUE, "gsm8k": GSM8K}


def chat_folder(path: Path, added: tuple[str, ...] = ("<think>", "</think>"), **settings: str) -> Path:
    """Write a Hugging Face folder's tokenizer files, whose tokens are WORDS and single bytes; returns the folder.

    added: tokens that are not special. settings: of tokenizer_config.json, over those that stand here.
    """
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary, merges = dict.fromkeys(alphabet), {}
    for word in WORDS:
        for text in (word, f"\u0120{word}"):
            for end in range(1, len(text)):
                merges[text[:end], text[end]] = None
                vocabulary[text[: end + 1]] = None
    model = tokenizers.models.BPE({text: number for number, text in enumerate(vocabulary)}, list(merges))
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([tokenizers.AddedToken(name, special=False) for name in added])
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    table = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHAT, **settings}
    (path / "tokenizer_config.json").write_text(json.dumps(table))
    return path
