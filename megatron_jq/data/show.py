"""F2: one example as the model sees it: its tokens with their boundaries, and which of them carry weight."""

from megatron_jq.data.tokenizers import Tokenizer
from megatron_jq.records import Example

_BOUNDARY = "│"
_ESCAPES = str.maketrans({"\n": "\\n", "\r": "\\r", "\t": "\\t", _BOUNDARY: "\\u2502"})


def described(
    example: Example,
    where: str,
    tokenizer: Tokenizer,
    *,
    rationale_budget: int,
    answer_budget: int,
    estimator: str,
) -> str:
    """Several lines. A bar stands between tokens, a token that ends in a line feed ends the line; control tokens are
    written by their names.
    """
    prompt, answer = len(example.prompt_ids), len(example.answer_ids)
    close = tokenizer.piece(tokenizer.think_close_id)
    scores_gold = estimator in ("garl", "paft")
    scored = "weight: the answer's coefficient" if scores_gold else "weight 0: sampled answers are compared with it"
    lines = [
        where,
        f"at most {prompt} + {rationale_budget} + 1 + {answer_budget} = "
        f"{prompt + rationale_budget + 1 + answer_budget} tokens",
        "",
        f"prompt x: {prompt} tokens, weight 0",
        *_tokens(example.prompt_ids, tokenizer),
        "",
        f"rationale z: up to {rationale_budget} sampled tokens, weight: the rationale's coefficient",
        f"  …{_BOUNDARY}{close}",
        f"  a sampled {close} counts as one of them; one that is forced after the last has weight 0",
        "",
        f"answer y*: {answer} tokens, {scored}",
        *_tokens(example.answer_ids, tokenizer),
    ]
    if not scores_gold:
        lines += ["", f"sampled answer y: up to {answer_budget} tokens, weight: the answer's coefficient"]
    if example.aliases:
        lines += ["", f"also right: {', '.join(map(repr, example.aliases))}"]
    return "\n".join(lines)


def _tokens(ids: tuple[int, ...], tokenizer: Tokenizer) -> list[str]:
    lines, line = [], []
    for token in ids:
        line.append(tokenizer.piece(token).translate(_ESCAPES))
        if line[-1].endswith("\\n") or "<0x0A>" in line[-1]:
            lines.append(line)
            line = []
    return ["  " + _BOUNDARY.join(line) for line in [*lines, line] if line]
