"""F2: gold answers that a tokenizer does not give back: decode(encode(y*)) is another text than y*.

A normaliser folds them (NFC in Qwen's, sentencepiece's own: "½", double blanks, tabs). P(y*|x,z) is still that of y*'s
ids, and a sampled answer is compared with both texts.
"""

from collections.abc import Sequence

from megatron_jq.data.prompts import Placed
from megatron_jq.data.tokenizers import Tokenizer
from megatron_jq.errors import UserError

_NAMED_AT_MOST = 3


def text_of(answer_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """What an answer's ids say, without an end of text at the end. Other control tokens leave U+FFFD between parts."""
    ended = bool(answer_ids) and answer_ids[-1] == tokenizer.eos_id
    parts: list[list[int]] = [[]]
    for token in answer_ids[: len(answer_ids) - ended]:
        if token in tokenizer.control_ids:
            parts.append([])
        else:
            parts[-1].append(token)
    return "\ufffd".join(tokenizer.decode(part) for part in parts)


def read_back(text: str, tokenizer: Tokenizer) -> str | None:
    """decode(encode(text)); None where the tokenizer cannot read it, so that no policy can say it."""
    try:
        return tokenizer.decode(tokenizer.encode(text))
    except UserError:
        return None


def describe_changed(placed: Sequence[Placed], tokenizer: Tokenizer) -> str:
    """A line that counts and names the examples whose y* comes back as another text, blanks at the ends aside.

    Nothing where every y* comes back.
    """
    changed = [
        f"{entry.place} ({entry.example.answer_text!r} as {back!r})"
        for entry in placed
        if (back := text_of(entry.example.answer_ids, tokenizer)).strip() != entry.example.answer_text.strip()
    ]
    if not changed:
        return ""
    more = ", …" if len(changed) > _NAMED_AT_MOST else ""
    return (
        f"the tokenizer changes {len(changed)} of {len(placed)} gold answers: {', '.join(changed[:_NAMED_AT_MOST])}"
        f"{more}; sampled answers are compared with both texts"
    )
