"""Train, export, `generate()`: transformers draws from the exported folder what our evaluation drew, and ends there.

Why this matters: an export that has other token ids, or that does not stop, is another policy than the one evaluated.
Three kinds of run: a sentencepiece tokenizer trained on a file, whole words of a built-in task (both from random
weights), and a Hugging Face model with its own tokenizer, whose config.json stops at another token.
"""

import json
from pathlib import Path

import pytest

from megatron_jq.evaluate.samples import read_samples
from tests.distributed.ranks import run_apart
from tests.e2e.launch import run
from tests.unit.tokenizer_kinds import make

ROWS = [{"prompt": f"box {i} ?", "answer": answer} for i, answer in enumerate(["a green kite", "42 .", "a red drum"])]
BUDGET = 4
TRAIN = (
    f"train --q 1 --lr 1e-2 --prompts-per-step 3 --num-rationales 2 --rationale-budget {BUDGET} --sample-interval 0 "
    "--no-tensorboard --device cpu"
)


def _ends_well(words: str, folder: Path) -> str:
    [ended] = run(words.split(), folder)
    assert ended.code == 0, ended
    return ended.out


def _hugging_face(folder: Path) -> None:
    """A Llama whose files say that tokens 0 and 7 end a text; its tokenizer ends it otherwise, after a <s> first."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    make(folder, "metaspace-always", bos="before")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(folder)), hidden_size=32, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
        eos_token_id=[0, 7], bos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    policy = AutoModelForCausalLM.from_config(config)
    policy.generation_config.eos_token_id = [0, 7]
    policy.save_pretrained(folder)


def _generated(folder: Path, prompts: list[str], budget: int) -> list[tuple[list[int], list[int], str]]:
    """(rationale ids, answer ids, answer) of each prompt, greedily; the answer ends by the folder's own settings."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    close = tokenizer.convert_tokens_to_ids("</think>")
    generated = []
    for prompt in prompts:
        ids = tokenizer(prompt + "<think>", return_tensors="pt")["input_ids"]
        length = ids.shape[1]
        ends = [close, tokenizer.eos_token_id]  # an end of text in a rationale closes it by force
        ids = model.generate(ids, max_new_tokens=budget, eos_token_id=ends, do_sample=False)
        if ids[0, -1] != close:
            ids = torch.cat([ids, torch.tensor([[close]])], dim=1)
        text = model.generate(ids, max_new_tokens=40, do_sample=False)
        answer = text[0, ids.shape[1] :].tolist()
        generated.append((ids[0, length:].tolist(), answer, tokenizer.decode(answer, skip_special_tokens=True)))
    return generated


def _made(kind: str, folder: Path) -> str:
    """The words that say data and tokenizer of a run."""
    if kind == "builtin":
        return "--train-data builtin:recall --eval-examples 3 --train-iters 40"
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = f"--train-data {data} --eval-data {data}"
    if kind == "sentencepiece":
        return f"{words} --tokenizer-vocab-size 283 --train-iters 30"
    run_apart(_hugging_face, folder / "hf")
    _ends_well(f"convert hf-to-megatron --hf {folder}/hf --save {folder}/megatron", folder)
    model = f"--model {folder}/hf --load {folder}/megatron --tokenizer-type huggingface --tokenizer-model {folder}/hf"
    return f"{words} {model} --train-iters 30"


@pytest.mark.parametrize("kind", ["sentencepiece", "builtin", "huggingface"])
def test_generate_says_what_evaluate_drew_and_stops_there(kind, tmp_path):
    words = _made(kind, tmp_path)
    _ends_well(f"{TRAIN} {words} --run-dir {tmp_path}/run", tmp_path)
    checkpoints, out = tmp_path / "run" / "checkpoints", tmp_path / "out"
    greedy = "--eval-temperature 0 --eval-samples 1 --device cpu"
    _ends_well(f"evaluate --load {checkpoints} {greedy} --output {out}", tmp_path)
    said = _ends_well(f"convert megatron-to-hf --load {checkpoints} --hf {tmp_path}/back", tmp_path)
    assert "</think>" in said and "gives that token, which no text can in a run" in said
    assert "</think>" in (tmp_path / "back" / "README.md").read_text()
    _, samples = read_samples(out / "samples.jsonl")
    drawn = [(list(sample.rationale_ids), list(sample.answer_ids), sample.answer) for [sample] in samples]
    assert any(sample.ended for [sample] in samples), "no text of the run ends, so that the test shows nothing"
    prompts = [row["prompt"] for row in ROWS] if kind != "builtin" else _builtin_prompts(len(drawn))
    budget = max(len(ids) for _, ids, _ in drawn)
    for (rationale, answer, text), (z, y, words) in zip(
        run_apart(_generated, tmp_path / "back", prompts, BUDGET), drawn, strict=True
    ):
        assert rationale == z
        assert (answer, text.strip()) == (y, words.strip()) or answer[: len(y)] == y and len(y) == budget
    names = ("config.json", "generation_config.json")
    config, generation = (json.loads((tmp_path / "back" / name).read_text()) for name in names)
    eos = next(sample.answer_ids[-1] for [sample] in samples if sample.ended)
    expected = [eos, 0, 7] if kind == "huggingface" else eos
    assert config["eos_token_id"] == generation["eos_token_id"] == expected
    assert (config["bos_token_id"] is None) == (kind != "huggingface")


def _builtin_prompts(count: int) -> list[str]:
    from megatron_jq.data.tasks import builtin_examples

    return [prompt for prompt, _ in builtin_examples("recall", "heldout", count, 1234)]
