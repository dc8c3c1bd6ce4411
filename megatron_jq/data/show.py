"""F2: one example as the model sees it: its tokens with their boundaries, and which of them carry weight."""

from megatron_jq.data.tokenizers import Tokenizer
from megatron_jq.errors import UserError
from megatron_jq.estimators import EstimatorRow
from megatron_jq.records import Example

_BOUNDARY = "│"
_ESCAPES = str.maketrans({"\n": "\\n", "\r": "\\r", "\t": "\\t", _BOUNDARY: "\\u2502"})


def described(
    example: Example,
    place: str,
    tokenizer: Tokenizer,
    *,
    rationale_budget: int,
    answer_budget: int,
    row: EstimatorRow,
) -> str:
    """Several lines. A bar stands between tokens, a token that ends in a line feed ends the line; control tokens are
    written by their names.
    """
    prompt, bridge, answer = (len(ids) for ids in (example.prompt_ids, example.bridge_ids, example.answer_ids))
    between = f"1 + {bridge}" if bridge else "1"
    scored = "weight 0: sampled answers are compared with it"
    if not row.samples_answers:
        scored = "weight: the answer's coefficient"
    lines = [
        place,
        f"at most {prompt} + {rationale_budget} + {between} + {answer_budget} = "
        f"{prompt + rationale_budget + 1 + bridge + answer_budget} tokens",
        "",
        f"prompt x: {prompt} tokens, weight 0{_beginning(example, tokenizer)}",
        *_tokens(example.prompt_ids, tokenizer),
        "",
        *_rationale(example, tokenizer, rationale_budget, imitated=row.reads_rationales),
        "",
    ]
    if bridge:
        lines += [
            f"bridge: {bridge} token{'s' * (bridge > 1)}, given, weight 0",
            *_tokens(example.bridge_ids, tokenizer),
            "",
        ]
    lines += [f"answer y*: {answer} tokens, {scored}", *_tokens(example.answer_ids, tokenizer)]
    if row.samples_answers:
        lines += ["", f"sampled answer y: up to {answer_budget} tokens, weight: the answer's coefficient"]
    if example.aliases:
        lines += ["", f"also right: {', '.join(map(repr, example.aliases))}"]
    return "\n".join(lines)


def _beginning(example: Example, tokenizer: Tokenizer) -> str:
    """Whether x begins with the tokenizer's own beginning of a text, of a tokenizer that has one."""
    try:
        bos = tuple(tokenizer.bos_ids("on"))
    except UserError:
        return ""
    names = " ".join(map(tokenizer.piece, bos))
    has = example.prompt_ids[: len(bos)] == bos
    return f", begins with {names}" if has else f", without {names} at its beginning (--add-bos-token)"


def _rationale(example: Example, tokenizer: Tokenizer, budget: int, *, imitated: bool) -> list[str]:
    weight = "weight: the rationale's coefficient"
    if imitated:
        heading = f"rationale z: {len(example.rationale_ids)} given tokens, of at most {budget}, {weight}"
        return [heading, *_tokens(example.rationale_ids, tokenizer)]
    close = tokenizer.piece(tokenizer.think_close_id)
    return [
        f"rationale z: up to {budget} sampled tokens, {weight}",
        f"  …{_BOUNDARY}{close}",
        f"  a sampled {close} counts as one of them; one that is forced after the last has weight 0",
    ]


def _tokens(ids: tuple[int, ...], tokenizer: Tokenizer) -> list[str]:
    lines, line = [], []
    for token in ids:
        line.append(tokenizer.piece(token).translate(_ESCAPES))
        if line[-1].endswith("\\n") or "<0x0A>" in line[-1]:
            lines.append(line)
            line = []
    return ["  " + _BOUNDARY.join(line) for line in [*lines, line] if line]
