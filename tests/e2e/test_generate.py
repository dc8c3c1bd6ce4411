"""`megatron-jq generate`: the samples of `evaluate`, shown, scored and streamed, at any layout."""

import io
import json
import sys
from pathlib import Path

import pytest

from megatron_jq.evaluate.judging import log_p_of_prompts
from megatron_jq.evaluate.samples import read_samples
from tests.e2e.launch import run

TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
PROMPTS = ("box 4", "box 5", "box 6")


@pytest.fixture(scope="module")
def load(tmp_path_factory) -> str:
    """Checkpoints of a run that hardly trained: its samples are many and different."""
    folder = tmp_path_factory.mktemp("generate")
    records = [{"prompt": prompt, "answer": "red"} for prompt in PROMPTS]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    argv = (
        f"train --train-data {folder}/data.jsonl --run-dir {folder}/run --tokenizer-vocab-size 280 --num-rationales 2 "
        "--prompts-per-step 3 --rationale-budget 4 --answer-budget 5 --train-iters 2 --sample-interval 0 "
        "--no-tensorboard --device cpu"
    )
    [ended] = run(argv.split(), folder)
    assert ended.code == 0, ended
    return str(folder / "run" / "checkpoints")


def generate(load: str, folder: Path, *flags: str, size: int = 1, stdin: str | None = None):
    """Rank 0's end. stdin: what it can read; None: nothing."""

    def prepare(rank: int) -> None:
        sys.stdin = io.StringIO(stdin or "")

    ended = run(["generate", "--load", load, *flags, "--device", "cpu"], folder, size=size, prepare=prepare)
    assert len({rank.code for rank in ended}) == 1, ended
    return ended[0]


def lines(load: str, folder: Path, *flags: str, **options) -> list[dict]:
    ended = generate(load, folder, *flags, "--json", **options)
    assert ended.code == 0, ended
    return [json.loads(line) for line in ended.out.splitlines()]


@pytest.fixture(scope="module")
def alone(load, tmp_path_factory) -> list[dict]:
    """The file's prompts, on one process."""
    return lines(load, tmp_path_factory.mktemp("alone"), "--prompts", data(load), "--samples", "3")


def data(load: str) -> str:
    return str(Path(load).parents[1] / "data.jsonl")


def test_its_samples_and_scores_are_those_of_evaluate(load, alone, tmp_path):
    flags = ["--load", load, "--eval-data", data(load), "--eval-samples", "3", "--output", str(tmp_path / "out")]
    [ended] = run(["evaluate", *flags, "--device", "cpu"], tmp_path)
    assert ended.code == 0, ended
    samples = [sample for prompt in read_samples(tmp_path / "out" / "samples.jsonl")[1] for sample in prompt]
    assert len(samples) == len(alone) == 9
    for sample, line in zip(samples, alone, strict=True):
        for name in ("prompt", "sample", "rationale", "answer", "ended", "matched"):
            assert line[name] == getattr(sample, name), name
        assert line["log_w"] == pytest.approx(sample.log_w, abs=1e-4)
        assert line["rationale_tokens"] == sample.num_sampled and line["gold"] == "red"
        assert (line["closed_by"] == "policy") == (not sample.forced)
    assert {line["closed_by"] for line in alone} >= {"budget"}
    for b, prompt in enumerate(PROMPTS):
        log_w = [line["log_w"] for line in alone if line["prompt"] == b]
        assert {line["text"] for line in alone if line["prompt"] == b} == {prompt}
        for line in alone[3 * b : 3 * b + 3]:
            assert line["log_p"] == pytest.approx(log_p_of_prompts([log_w])[0])


@pytest.mark.parametrize("layout", [TP2, PP2, []], ids=["TP2", "PP2", "DP2"])
def test_every_layout_writes_the_same(layout, load, alone, tmp_path):
    written = lines(load, tmp_path, "--prompts", data(load), "--samples", "3", *layout, size=2)
    scores = ("log_w", "log_p")
    assert [{k: v for k, v in line.items() if k not in scores} for line in written] == [
        {k: v for k, v in line.items() if k not in scores} for line in alone
    ]
    for name in scores:
        assert [line[name] for line in written] == pytest.approx([line[name] for line in alone], abs=1e-4)


def test_one_prompt_comes_token_by_token_with_the_same_samples(load, alone, tmp_path):
    ended = generate(load, tmp_path, "--prompt", PROMPTS[0], "--gold", "red", "--samples", "3", *PP2, size=2)
    assert ended.code == 0, ended
    rest = ended.out
    for line in alone[:3]:
        closed = {"policy": "closed by the policy itself", "budget": "the rationale budget is spent"}.get(
            line["closed_by"], "the policy ended its text"
        )
        for part in (
            f"sample {line['sample'] + 1}\nrationale: {line['rationale']}\n", closed,
            f"after {line['rationale_tokens']} token(s)]\nanswer: {line['answer']}\n",
            "ended" if line["ended"] else "cut off by the answer budget",
            f"after {line['answer_tokens']} token(s)]\n  ln p(y*|x,z) ",
        ):  # fmt: skip
            before, mark, rest = rest.partition(part)
            assert mark, f"{part!r} is not in {before!r}"
        assert float(rest.split(",")[0]) == pytest.approx(line["log_w"], abs=2e-4)
    assert float(rest.partition("ln P̂ ")[2].split()[0]) == pytest.approx(alone[0]["log_p"], abs=2e-4)
    assert "3 sample(s), temperature 1, seed" in ended.err and "rationale:" not in ended.err


def test_prompts_of_standard_input_and_of_a_text_file_need_no_gold(load, alone, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    from_file = lines(load, tmp_path, "--prompts", str(tmp_path / "prompts.txt"), "--samples", "3", "--answer-budget=5")
    assert [line["rationale"] for line in from_file] == [line["rationale"] for line in alone]
    assert all("log_w" not in line and "gold" not in line for line in from_file)
    greedy = generate(load, tmp_path, "--eval-temperature", "0", stdin="box 4\n\nbox 5\n")
    assert greedy.code == 0 and "greedy" in greedy.err, greedy
    assert "prompt 1 of 2: box 4\nrationale: " in greedy.out and "ln p" not in greedy.out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--hf", "x", "--prompt", "a"], "generate: give one of --load and --hf, not both"),
        (["--prompt", " "], "--prompt is empty; give a text"),
        (["--prompt", "a", "--prompts", "b"], "give one of --prompt and --prompts, not both"),
        (["--prompt", "a", "--gold", ""], "--gold is empty: there is nothing to score"),
        (["--gold", "a"], "--gold belongs to --prompt, which is missing"),
        (["--prompt", "a", "--samples", "0"], "0 is not a whole number of at least 1"),
        (["--prompt", "a", "--eval-samples", "2"], "--eval-samples is not read by generate: give --samples instead"),
        (["--prompt", "a", "--samples", "2", "--eval-temperature", "0"], "greedy samples are all the same"),
        ([], "no prompt: give --prompt TEXT, --prompts FILE, or a prompt per line on standard input"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt cannot be read: No such file"),
        (["--prompt", "box " * 600], "it exceeds the model's context of"),
    ],
)
def test_bad_input_is_one_line_that_names_the_flag(flags, says, load, tmp_path):
    ended = generate(load, tmp_path, *flags)
    assert ended.code == 2 and ended.out == "", ended
    [line] = [line for line in ended.err.splitlines() if "error" in line]
    assert says in line and "Traceback" not in ended.err, line
