"""A sample that is shown token by token: the text is whole at the end, and no half character is ever written."""

import pytest

from megatron_jq.data.tokenizers import load_tokenizer
from megatron_jq.evaluate import generate
from megatron_jq.evaluate.writing import TokenStream, generated
from megatron_jq.rollout.engine import SamplingOptions
from megatron_jq.rollout.rationale_row import RationaleRow
from megatron_jq.rollout.sampling import UniformStream
from tests.unit import tokenizer_kinds


@pytest.mark.parametrize("end", ["policy", "end of text", "budget"])
def test_the_shown_text_is_the_samples(end, tmp_path, capsys):
    tokenizer = load_tokenizer("huggingface", tokenizer_kinds.make(tmp_path / "t", "byte-level"))
    rationale, answer = tokenizer.encode("caf\u00e9 \U0001f642 then"), tokenizer.encode("42 \u20ac")
    closing = {"policy": [tokenizer.think_close_id], "end of text": [tokenizer.eos_id], "budget": []}[end]
    drawn = [*rationale, *closing, *answer, tokenizer.eos_id]
    budget = len(rationale) + len(closing) + (end != "budget")
    options = SamplingOptions(budget, 32, 1.0, 1.0, tokenizer.think_close_id, tokenizer.eos_id, 0, 0)
    row, written = RationaleRow(0, 0, 1, UniformStream(0, 0, 0, 0), None, ()), []
    stream = TokenStream(tokenizer, options)
    stream.begin(None)
    for token in drawn:
        row.accept(token, -1.0, options)
        stream(row)
        written.append(capsys.readouterr().out)
    sample = generated(row.rollout(), None, tokenizer, options)
    stream.end(sample)
    text = "".join(written) + capsys.readouterr().out
    assert "\ufffd" not in text and "[again]" not in text
    assert sample.closed_by == end and sample.ended
    reason = {"policy": "closed by the policy itself", "end of text": "ended its text", "budget": "budget is spent"}
    assert text.startswith("rationale: caf\u00e9 \U0001f642 then\n  [closed") and reason[end] in text
    assert text.endswith(f"answer: 42 \u20ac\n  [ended, after {len(answer) + 1} token(s)]\n")
    assert sum(bool(part) for part in written) > len(rationale) // 2  # as it comes, not at the end


def test_a_line_of_a_prompt_file_ends_where_an_editor_ends_it(tmp_path):
    """Not at a form feed or a line separator inside a prompt, at which Python's splitlines cuts too."""
    path = tmp_path / "prompts.txt"
    path.write_bytes("one\x0c\u2028prompt\r\n\nanother\n".encode())
    args = generate.GenerateArgs(None, None, None, path, None, False)
    assert generate._typed_prompts(args) == ["one\x0c\u2028prompt", "another"]
