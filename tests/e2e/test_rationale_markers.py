"""Each way to mark a rationale through the whole command line: shown, trained, resumed, evaluated, exported.

What evaluation says of ln p(y*|x,z) is held against transformers: the exported folder's model on ids that are put
together here, from the chat template and the folder's own tokenizer.
"""

import json
from pathlib import Path

import pytest

from megatron_jq.cli.main import main
from megatron_jq.evaluate.samples import read_samples
from tests.distributed.ranks import run_apart
from tests.e2e.launch import SMALL, run
from tests.e2e.records import GSM8K, chat_folder

RESERVED = ("<|reserved_0|>", "<|reserved_1|>")
#: way → (flags, added tokens, what opens z, what closes it, what stands before y*)
WAYS = {
    "named": (["--think-open", RESERVED[0], "--think-close", RESERVED[1]], RESERVED, f"{RESERVED[0]}\n", RESERVED[1],
              "\n\n"),
    "no opener": (["--think-open", "none"], ("<think>", "</think>"), "", "</think>", "\n\n"),
    "end of turn": ([], RESERVED, "", "<|im_end|>", "\n<|im_start|>assistant\n"),
}  # fmt: skip
WORDS = "Solve this problem.\n\n{}\n\nReason step by step first. Then give the final answer alone: a plain number "
WORDS += "without unit or thousands separator."


def _log_w(folder: Path, samples: list[tuple[str, tuple[int, ...], str]], opened: str, bridge: str) -> list[float]:
    """ln p(y*|x,z) of (question, ids of z with its end, y*), by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids_of = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    figures = []
    for question, z, answer in samples:
        x = f"<|im_start|>user\n{WORDS.format(question)}<|im_end|>\n<|im_start|>assistant\n"
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": WORDS.format(question)}], tokenize=False, add_generation_prompt=True
        )
        assert chat == x
        context, y = [*ids_of(x), *ids_of(opened), *z, *ids_of(bridge)], ids_of(f"{answer}<|im_end|>")
        logits = model(torch.tensor([[*context, *y]])).logits[0, len(context) - 1 : -1]
        figures.append(logits.log_softmax(-1)[range(len(y)), y].sum().item())
    return figures


def _ends_well(argv: list[str], folder: Path) -> str:
    [ended] = run(argv, folder)
    assert ended.code == 0, ended
    return ended.out


@pytest.mark.parametrize("way", list(WAYS))
def test_each_way_is_shown_trained_resumed_evaluated_and_exported(way, tmp_path, capsys):
    flags, added, opened, close, bridge = WAYS[way]
    folder = chat_folder(tmp_path / "hf", added, tokenizer_class="PreTrainedTokenizerFast")
    source = tmp_path / "data.jsonl"
    rows = [{**GSM8K, "question": f"What is {n} and two? {close}"} for n in range(4)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--train-data", str(source), "--eval-data", str(source), "--prompt-style", "warm", *flags]
    tokens = ["--tokenizer-type", "huggingface", "--tokenizer-model", str(folder), "--max-position-embeddings", "512"]
    assert main(["train", *data, *tokens, "--show-example", "0"]) == 0
    shown = capsys.readouterr().out
    assert f"…│{close}\n" in shown and f"a sampled {close} counts as one of them" in shown
    assert shown.count(close) == shown.replace("│", "").count(close) - 1, "the question spells the token in characters"

    scored = ["--score-with", "rollout", "--score-check-interval", "1", "--q", "1"]
    argv = [*SMALL, *data, *tokens, *scored, "--run-dir", str(tmp_path / "run")]
    _ends_well([*argv, "--train-iters", "2"], tmp_path)
    others = ["--think-open", opened.strip() or "none", "--think-close", "<|endoftext|>"]
    [ended] = run([flag for flag in argv if flag not in flags] + ["--train-iters", "3", "--resume", *others], tmp_path)
    assert ended.code == 2 and f"--think-close was {close} and is <|endoftext|>" in ended.err
    _ends_well([*argv, "--train-iters", "3", "--resume"], tmp_path)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 3 and all(row["log_w_mismatch_max"] < 1e-3 for row in metrics)

    checkpoints, out = str(tmp_path / "run" / "checkpoints"), tmp_path / "out"
    evaluated = ["--eval-data", str(source), "--eval-samples", "2", "--device", "cpu", "--output", str(out)]
    _ends_well(["evaluate", "--load", checkpoints, *evaluated], tmp_path)  # the checkpoint knows how z is marked
    header, prompts = read_samples(out / "samples.jsonl")
    samples = [sample for of_prompt in prompts for sample in of_prompt]
    assert header.think_close == close and any(sample.forced for sample in samples)
    assert len({sample.rationale_ids[-1] for sample in samples}) == 1, "every rationale ends with the closing token"
    said = _ends_well(["convert", "megatron-to-hf", "--load", checkpoints, "--hf", str(tmp_path / "back")], tmp_path)
    assert "note: the tokenizer" not in said
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert f"; a rationale; `{close}`; the answer" in (tmp_path / "back" / "README.md").read_text()

    plain = [{**GSM8K, "question": f"What is {n} and two?"} for n in range(4)]
    source.write_text("".join(json.dumps(row) + "\n" for row in plain))
    again = [*evaluated[:-1], str(tmp_path / "plain")]
    _ends_well(["evaluate", "--load", checkpoints, *again], tmp_path)
    _, prompts = read_samples(tmp_path / "plain" / "samples.jsonl")
    asked = [
        (row["question"], sample.rationale_ids, "4")
        for row, of_prompt in zip(plain, prompts, strict=True)
        for sample in of_prompt
    ]
    expected = run_apart(_log_w, tmp_path / "back", asked, opened, bridge)
    assert [sample.log_w for of_prompt in prompts for sample in of_prompt] == pytest.approx(expected, abs=1e-3)
