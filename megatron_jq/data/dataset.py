"""F2: from the name of a data source to its pairs, and to a tokenizer trained on them."""

from collections.abc import Sequence
from pathlib import Path

from megatron_jq.data.gsm8k import is_gsm8k, read_gsm8k
from megatron_jq.data.jsonl import read_jsonl, read_records
from megatron_jq.data.pair import Pair
from megatron_jq.data.tasks import builtin_examples, builtin_texts
from megatron_jq.data.tokenizers import SentencePieceTokenizer, train_sentencepiece
from megatron_jq.errors import UserError
from megatron_jq.toml_files import did_you_mean

BUILTIN_PREFIX = "builtin:"
DATA_FORMATS = ("auto", "jsonl", "gsm8k")
DEFAULT_BUILTIN_COUNT = {"train": 1024, "heldout": 128}
DEFAULT_VOCAB_SIZE = 1024


def load_pairs(
    source: str,
    *,
    prompt_field: str = "prompt",
    answer_field: str = "answer",
    data_format: str = "auto",
    count: int | None = None,
    seed: int = 0,
    split: str = "train",
    flag: str = "--train-data",
) -> list[Pair]:
    """The pairs of "builtin:KIND", or of a JSON-lines file.

    A built-in kind gives `count` examples of the split, drawn from the seed (None: 1024 to train, 128 held out). A file
    is one split, whatever `split` says, and gives its first `count` pairs in order (None: all). `flag` is the option
    that named the source. data_format "auto" takes a file for GSM8K's when its first line has that form and no other
    prompt field was asked for. UserError: see builtin_examples, read_jsonl, read_gsm8k.
    """
    if data_format not in DATA_FORMATS:
        hint = did_you_mean(data_format, DATA_FORMATS, f"it is one of {', '.join(DATA_FORMATS)}")
        raise UserError(f"--data-format {data_format} is not known; {hint}")
    if count is not None and count < 1:
        raise UserError(f"{flag} {source} was asked for {count} examples; ask for at least 1")
    if is_builtin(source):
        kind = source.removeprefix(BUILTIN_PREFIX)
        drawn = builtin_examples(kind, split, count or DEFAULT_BUILTIN_COUNT.get(split, 1), seed)
        return [Pair(prompt, answer, f"{source}[{row}]") for row, (prompt, answer) in enumerate(drawn)]
    if data_format == "auto":
        data_format = _detect(source, prompt_field, flag)
    if data_format == "gsm8k":
        return read_gsm8k(source, flag=flag)[:count]
    return read_jsonl(source, prompt_field, answer_field, flag=flag)[:count]


def is_builtin(source: str) -> bool:
    return source.startswith(BUILTIN_PREFIX)


def train_tokenizer(
    source: str, pairs: Sequence[Pair], path: str | Path, *, vocab_size: int | None = None
) -> SentencePieceTokenizer:
    """A sentencepiece model for the source, written to `path`.

    With no vocab_size, a built-in kind gets one piece a word and no byte pieces (some 60 in all), so that its answers
    are as many tokens as words; a file gets BPE of 1024 pieces on its prompts and answers. A vocab_size asks for BPE of
    that size either way.
    """
    if is_builtin(source) and vocab_size is None:
        texts = builtin_texts(source.removeprefix(BUILTIN_PREFIX))
        return train_sentencepiece(texts, path, vocab_size=None, model_type="word", byte_fallback=False)
    texts = (text for pair in pairs for text in (pair.prompt, pair.answer))
    return train_sentencepiece(texts, path, vocab_size=vocab_size or DEFAULT_VOCAB_SIZE)


def _detect(source: str, prompt_field: str, flag: str) -> str:
    [(_, record)] = read_records(source, flag=flag, limit=1)
    asked_for_another = prompt_field in record and prompt_field != "question"
    return "gsm8k" if is_gsm8k(record) and not asked_for_another else "jsonl"
