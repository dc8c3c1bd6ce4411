"""The recipes in examples/: each file checked as shipped, then shown and run as its README says, in small."""

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_jq.cli.main import main
from megatron_jq.config import load_toml
from megatron_jq.config_validate import validate
from megatron_jq.data.template import template_of
from megatron_jq.data.tokenizers import load_tokenizer
from tests.e2e.launch import REPOSITORY, Ranks, run
from tests.e2e.records import RECORDS, chat_folder
from tests.unit import hf_folders
from tools.estimate import main as estimate_main
from tools.prepare_data import main as prepare_main

EXAMPLES = REPOSITORY / "examples"
SHOWN = Path(__file__).parent / "test_data_shown"
STYLES, ESTIMATORS = ("cold", "warm"), ("garl", "paft", "grpo")
RECIPES = list(itertools.product(RECORDS, STYLES, ESTIMATORS))
SETS = list(itertools.product(RECORDS, STYLES))
#: From 8 GPUs to a second on a CPU. Everything else is as shipped.
TINY = (
    "--model models/hf --prompts-per-step 2 --num-rationales 2 --rationale-budget 5 --train-iters 2 --eval-interval 2 "
    "--eval-examples 1 --eval-samples 2 --save-interval 2 --max-tokens-per-micro-batch 8192 --sample-interval 0 "
    "--no-tensorboard --device cpu"
).split()


def recipe(name: str, style: str, estimator: str) -> Path:
    return EXAMPLES / name / f"{style}_{estimator}.toml"


# As shipped


def test_every_data_set_has_its_six_files_and_a_readme_that_names_them():
    for name in RECORDS:
        files = {path.name for path in (EXAMPLES / name).iterdir()}
        assert files == {"README.md", *(f"{style}_{e}.toml" for style in STYLES for e in ESTIMATORS)}
        text = (EXAMPLES / name / "README.md").read_text(encoding="utf-8")
        assert all(file in text for file in files - {"README.md"})


@pytest.mark.parametrize(("name", "style", "estimator"), RECIPES)
def test_a_recipe_is_valid_on_eight_processes_and_has_the_paper_s_numbers(name, style, estimator):
    config = load_toml(recipe(name, style, estimator))
    validate(config, 8)
    o, r, d, t = config.objective, config.rollout, config.data, config.training
    assert (o.estimator, d.train_data) == (estimator, f"runs/data/{name}-{style}")
    assert t.run_dir == f"runs/{name}/{style}_{estimator}"
    assert (r.num_rationales, t.eval_samples, config.checkpoint.keep_best) == (32, 16, "eval_maj_at_k")
    paper = template_of(name).paper
    if paper is not None:
        assert (r.rationale_budget, r.answer_budget) == (paper.rationale_budget, paper.answer_budget)
        assert (d.eval_examples, t.match) == (paper.validation, "substring")


@pytest.mark.parametrize("name", RECORDS)
def test_the_recipes_of_a_data_set_differ_in_start_and_estimator_alone(name):
    """What is compared is the estimator: no other setting favours one of them."""
    for style in STYLES:
        configs = [load_toml(recipe(name, style, estimator)) for estimator in ESTIMATORS]
        blank = [replace(c, objective=None, training=replace(c.training, run_dir="")) for c in configs]
        assert blank[0] == blank[1] == blank[2]
    cold, warm = (load_toml(recipe(name, style, "garl")) for style in STYLES)
    assert all(getattr(cold, part) == getattr(warm, part) for part in ("model", "rollout", "parallel", "checkpoint"))


@pytest.mark.parametrize("name", RECORDS)
def test_the_recipes_fit_into_80_gib(name, capsys):
    """By the estimate: the longest rows of an eighth of the step."""
    for style, estimator in itertools.product(STYLES, ESTIMATORS):
        settings = ["--config", str(recipe(name, style, estimator)), "--gpus", "8", "--device", "cuda"]
        assert estimate_main([*settings, "--memory-limit", "79"]) == 0, capsys.readouterr().out


# As their READMEs say, in small


def _records(name: str) -> list[dict]:
    identity = "_id" if name == "hotpotqa" else "id"
    return [{**RECORDS[name], identity: f"record {number}"} for number in range(4)]


def prepared(source: Path, target: str, style: str, *more: str) -> None:
    argv = ["--train-data", source.name, "--eval-data", source.name, "--test-data", source.name, "--output", target]
    argv += ["--prompt-style", style, "--tokenizer-type", "huggingface", "--tokenizer-model", "models/hf", *more]
    assert prepare_main(argv) == 0


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder where every path that a recipe names exists: a tiny policy that was converted, and prepared sets."""
    path, before = tmp_path_factory.mktemp("recipes"), Path.cwd()
    (path / "models").mkdir()
    (path / "tokenizer").mkdir()
    size = load_tokenizer("huggingface", chat_folder(path / "tokenizer")).vocab_size
    architecture = replace(hf_folders.TINY, vocab_size=size, max_position_embeddings=8192, tie_embeddings=True)
    chat_folder(hf_folders.make(path / "models" / "hf", architecture=architecture))
    (path / "models" / "hf" / "chat_template.jinja").unlink()  # chat_folder's stands in tokenizer_config.json
    os.chdir(path)
    try:
        (ended,) = run(["convert", "hf-to-megatron", "--hf", "models/hf", "--save", "runs/models/qwen3-0.6b"], path)
        assert ended.code == 0, ended
        for name in RECORDS:
            Path("data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in _records(name)))
            for style in STYLES:
                prepared(Path("data.jsonl"), f"runs/data/{name}-{style}", style)
        yield path
    finally:
        os.chdir(before)


@pytest.mark.parametrize(("name", "style", "estimator"), RECIPES)
def test_show_example_of_a_recipe_is_what_is_pinned(name, style, estimator, workplace, capsys):
    """A change of a recipe, of a template, of a reader or of a boundary is seen here first."""
    assert main(["train", "--config", str(recipe(name, style, estimator)), "--show-example", "0"]) == 0
    expected = (SHOWN / f"{name}-{style}.txt").read_text(encoding="utf-8")
    if estimator == "grpo":  # y* is what a sampled answer is compared with, and that one carries the weight
        gold, sampled = "weight: the answer's coefficient", "\n\nsampled answer y: up to 128 tokens, "
        body, aliases, names = expected.rstrip("\n").partition("\n\nalso right")
        body = body.replace(gold, "weight 0: sampled answers are compared with it")
        expected = f"{body}{sampled}{gold}{aliases}{names}\n"
    assert capsys.readouterr().out == expected


def _two_steps(started: dict[Path, Ranks]) -> None:
    """started: by run directory."""
    for run_dir, ranks in started.items():
        (ended,) = ranks.ended()
        assert ended.code == 0, (run_dir, ended)
        first, second = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert second["eval_maj_at_k"] is not None and 0 < first["lr"] < second["lr"]
        # In nats, by bf16; none where GRPO saw no right answer and so trained on nothing
        assert all((step["log_prob_mismatch_max"] or 0.0) < 0.5 for step in (first, second))
        assert [path.name for path in (run_dir / "checkpoints").glob("iter_*")] == ["iter_0000002"]


@pytest.mark.parametrize(("name", "style"), SETS)
def test_a_recipe_runs_from_the_converted_policy_on_prepared_records(name, style, workplace):
    """Two steps each, evaluation and checkpoint included; a data set's three estimators at the same time."""
    started = {}
    for estimator in ESTIMATORS:
        output = workplace / "output" / f"{name}-{style}-{estimator}"
        output.mkdir(parents=True)
        run_dir = workplace / "runs" / name / f"{style}_{estimator}"
        started[run_dir] = Ranks(["train", "--config", str(recipe(name, style, estimator)), *TINY], output)
    _two_steps(started)


def test_the_checkpoint_of_a_recipe_is_evaluated_on_the_test_split(workplace):
    """By the settings that the checkpoint brings."""
    output = workplace / "output" / "evaluated"
    output.mkdir(parents=True)
    argv = ["train", "--config", str(recipe("gsm8k", "warm", "garl")), *TINY, "--run-dir", "runs/evaluated"]
    (trained,) = run(argv, output)
    load = ["--load", "runs/evaluated/checkpoints/iter_0000002", "--eval-data", "runs/data/gsm8k-warm/test.jsonl"]
    flags = ["--eval-examples", "4", "--eval-samples", "2", "--device", "cpu"]
    (evaluated,) = run(["evaluate", *load, *flags, "--output", "runs/evaluated/test"], output)
    assert (trained.code, evaluated.code) == (0, 0), evaluated
    assert "4 prompts x 2 samples, temperature 1\nexact match, text normalised by rule number" in evaluated.out


REAL = {
    "gsm8k": "gsm8k_train.jsonl",
    "hotpotqa": "hotpotqa_dev_500.jsonl",
    "musique": "musique_dev_200_closed_book.jsonl",
}


@pytest.mark.skipif("MEGATRON_JQ_DATA" not in os.environ, reason="MEGATRON_JQ_DATA names no folder of real rows")
@pytest.mark.parametrize(("name", "style"), list(itertools.product(REAL, STYLES)))
def test_a_recipe_runs_on_real_rows(name, style, workplace):
    """MuSiQue's are questions without paragraphs, and so read as plain JSON lines."""
    lines = (Path(os.environ["MEGATRON_JQ_DATA"]) / REAL[name]).read_text(encoding="utf-8").splitlines()[:24]
    source, target = Path(f"real-{name}.jsonl"), f"runs/data/real-{name}-{style}"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    fields = ["--prompt-field", "question"] if name == "musique" else []
    limit = ["--max-prompt-tokens", "3900"]
    prepared(source, target, style, *fields, *limit, "--overlong-prompts", "drop")
    output = workplace / "output" / f"real-{name}-{style}"
    output.mkdir(parents=True)
    run_dir = workplace / "runs" / "real" / f"{name}-{style}"
    sources = ["--train-data", target, "--eval-data", target, "--run-dir", str(run_dir)]
    argv = ["train", "--config", str(recipe(name, style, "garl")), *TINY, *sources, *limit]
    _two_steps({run_dir: Ranks([*argv, "--max-tokens-per-micro-batch", "4200"], output)})
