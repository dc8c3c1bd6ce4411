"""Every command of README.md, docs and examples is done as it stands, sizes aside, or stands in a table with a reason.

What bash makes of a document's lines (documents.py) is carried out in the document's order in one folder, where every
file that they name exists: tiny, in the data set's own format. Settings are first validated as they stand, for the
number of processes that the line starts. What fails here is a line that a reader would type in vain.
"""

import contextlib
import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed.run import parse_args as parse_torchrun

from examples.study.run import _parser as study_parser
from megatron_jq.cli import evaluate as evaluate_command
from megatron_jq.cli.main import COMMANDS, main
from megatron_jq.cli.parser import CommandParser
from megatron_jq.config import Config, explicit_settings, parse_args, to_argv
from megatron_jq.config_reads import refuse_unread, without_unread
from megatron_jq.config_validate import resolve_architecture, validate_training
from megatron_jq.data.splits import parse_sizes
from megatron_jq.data.tokenizers import load_tokenizer, train_sentencepiece
from tests.e2e import launch
from tests.e2e.documents import DOCUMENTS, REPOSITORY, Call, calls, make_place, snippets, without_python
from tests.e2e.launch import run
from tests.e2e.records import FINQA, GSM8K, HOTPOTQA, MUSIQUE, chat_folder
from tests.unit import hf_folders
from tools import bench_head, bench_step, estimate, plot_run, prepare_data, preprocess_data, soak_checkpoints

#: Programs that are not ours, and lines that would run what the suite runs anyway: the first words, and why.
LEFT_OUT = {
    "git clone": "needs the network",
    "pip install": "needs the network; .ci/run installs by it",
    "-m venv": "makes an environment to install into; tools/setup_env.sh does, and .ci/run by it",
    "tests/run.sh": "is this suite; .ci/run starts it so",
    "tests/slurm/in_root.sh": "tests/slurm on another version; tests/versions.sh starts it",
    "-m tests.check": "ruff and pyright; .ci/run starts it",
    "tools/reference_pages.py": "writes into docs/; unit/test_documents.py compares what it writes",
    "megatron-jq train --rollout-engine uniform": "an engine that the page adds; e2e/test_engines.py runs it so",
    "megatron-jq convert hf-to-megatron --hf SmolLM2": "a file of 98 MB; unit/test_gguf.py converts small ones",
    "megatron-jq train --model SmolLM2": "the folder of that file; e2e/test_rationale_markers.py trains a small one",
    "megatron-jq train --model smol/": "its conversion; e2e/test_added_tokens.py trains a small one",
    "torchrun --nproc-per-node 2 -m megatron_jq train --model-class hybrid": "e2e/test_model_class.py does, on 0.19",
    "megatron-jq train --train-data reasoning-gym": "another package; e2e/test_reasoning_gym.py trains on them",
    "scancel": "Slurm's own; tests/slurm cancels jobs",
    "srun": "Slurm's own",
    "sbatch --no-requeue": "one flag of Slurm's, in a sentence",
    "sbatch …": "a variable before whatever is submitted",
}
#: What a reader puts in the place of a word, a flag's value, or a notation for alternatives.
WORDS = {"RUN...": "runs/mine", "DIR": "runs/mine/checkpoints", "N": "0", "RUN_DIR": "runs/by-hand", "FLAGS": None}
VALUES = {
    "--load": "OLD/checkpoints", "--eval-data": "gsm8k/train.jsonl", "--rationale-budget": "4", "--prompt": "3 + 4",
}  # fmt: skip
NOTATION = {"off|auto": "off"}
#: What the `…` of a line stands for, where the defaults do not do: document, a flag of the line → more flags.
MORE = {
    ("docs/data.md", "data/hotpotqa"): "--model Qwen3-0.6B --prompt-style warm",
    ("docs/pretraining.md", "sft"): "--max-position-embeddings 1024",
}
GSM8K_LINES = [{**GSM8K, "question": f"What is two and two and {number}?"} for number in range(12)]
CORPUS = [{"text": f"two and {number} is more than two . " * 20} for number in range(60)]
FILES = {
    "README.md": {"GSM8K.jsonl": GSM8K_LINES},
    "docs/data.md": {f"hotpot_{name}.json": HOTPOTQA for name in ("train_v1.1", "dev_distractor_v1")},
    "docs/evaluation.md": {"test.json": FINQA, "test.jsonl": GSM8K_LINES},
    "docs/pretraining.md": {"gsm8k/train.jsonl": GSM8K_LINES, "corpus.jsonl": CORPUS},
    "examples/finqa/README.md": {f"{name}.json": FINQA for name in ("train", "dev", "test")},
    "examples/gsm8k/README.md": {f"{name}.jsonl": GSM8K_LINES for name in ("train", "test")},
    "examples/hotpotqa/README.md": {f"hotpot_{name}.json": HOTPOTQA for name in ("train_v1.1", "dev_distractor_v1")},
    "examples/musique/README.md": {f"musique_ans_v1.0_{name}.jsonl": MUSIQUE for name in ("train", "dev")},
}  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """The tiny Hugging Face folder that documents call Qwen3-0.6B, a run that began from it, and a plain one."""
    path = tmp_path_factory.mktemp("shared")
    (path / "tokenizer").mkdir()
    size = load_tokenizer("huggingface", chat_folder(path / "tokenizer")).vocab_size
    widths = {"hidden_size": 16, "ffn_hidden_size": 32, "num_attention_heads": 8, "num_query_groups": 8}
    architecture = replace(
        hf_folders.TINY, vocab_size=size, max_position_embeddings=8192, tie_embeddings=True, **widths
    )
    hf = chat_folder(hf_folders.make(path / "Qwen3-0.6B", architecture=architecture))
    (hf / "chat_template.jinja").unlink()  # chat_folder's stands in tokenizer_config.json
    done(path, ["convert", "hf-to-megatron", "--hf", str(hf), "--save", str(path / "qwen3")])
    argv = f"train --model {hf} --load {path}/qwen3 --finetune --tokenizer-type huggingface --tokenizer-model {hf}"
    train_sentencepiece([document["text"] for document in CORPUS], path / "tokenizer.model", vocab_size=300)
    small = in_small(parse_args(argv.split()[1:]))
    done(path, ["train", *to_argv(small), "--run-dir", str(path / "mine")])
    done(path, ["train", *to_argv(in_small(Config())), "--run-dir", str(path / "old")])
    return path


@pytest.fixture
def place(shared, tmp_path, monkeypatch) -> Path:
    """A reader's folder, entered."""
    place = tmp_path / "place"
    make_place(place)
    (place / "Qwen3-0.6B").symlink_to(shared / "Qwen3-0.6B")
    (place / "tokenizer.model").symlink_to(shared / "tokenizer.model")
    for copy, run_dir in (("runs/mine", "mine"), ("data/first", "old"), ("OLD", "old")):
        shutil.copytree(shared / run_dir, place / copy)
    (place / "my.toml").write_text("[rollout]\nanswer_budget = 8\n[data]\nmax_prompt_tokens = 64\n")
    for code in re.findall(r"^    (# my_rewards\.py.*\n(?:    .*\n)+)", evaluation_document(), re.MULTILINE):
        (place / "my_rewards.py").write_text(code.replace("\n    ", "\n"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(place)])  # PYTHONPATH=.
    monkeypatch.chdir(place)
    return place


def evaluation_document() -> str:
    return (REPOSITORY / "docs/evaluation.md").read_text(encoding="utf-8")


def done(folder: Path, argv: list[str], size: int = 1, program: Callable[[list[str]], int] = main) -> str:
    """Run on forked ranks; rank 0's output. AssertionError where one does not end with 0."""

    def prepare(rank: int) -> None:
        def to_a_code(argv: list[str]) -> int:
            try:
                return program(argv)
            except SystemExit as stop:  # --help
                return stop.code or 0

        launch.main = to_a_code

    ended = run(argv, folder, size=size, prepare=prepare)
    codes = [rank.code for rank in ended]
    assert codes == [0] * size, f"exit codes {codes}: {' '.join(argv)}\n{ended[0].out[-1500:]}{ended[-1].err[-1500:]}"
    return ended[0].out


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_of_a_document_works(document, place):
    for name, content in FILES.get(document, {}).items():
        write(place / name, content)
    troubles = []
    for snippet in snippets(document):
        for notation, word in NOTATION.items():
            snippet = replace(snippet, text=snippet.text.replace(notation, word))
        for call in calls(snippet, place, {"GSM8K": "GSM8K.jsonl", "OMP_NUM_THREADS": "1"}):
            try:
                do(replace(call, words=without_python(call.words)), place)
            except (AssertionError, ValueError, SystemExit) as trouble:
                troubles.append(f"{call}\n    {str(trouble)[:3000]}")
    assert not troubles, "\n\n".join(troubles)


def write(path: Path, content: list[dict] | dict) -> None:
    """A record becomes a file of twelve with ids of their own: a JSON list, or lines by the name's ending."""
    identity = "_id" if content is HOTPOTQA else "id"
    records = content if isinstance(content, list) else [{**content, identity: f"record {n}"} for n in range(12)]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) if lines else json.dumps(records))


# One call


def do(call: Call, place: Path) -> None:
    """Carry it out in small, or check all that can be checked of it. AssertionError, ValueError where it is wrong."""
    text = " ".join(call.words)
    if any(text.startswith(words) or text.startswith(f".venv/bin/{words}") for words in LEFT_OUT):
        return
    program, *argv = call.words
    size = 1
    if program == "torchrun":
        script_left_out = not [word for word in argv if word.startswith("-m") or word.endswith(".py")]
        options = parse_torchrun([word for word in argv if word != "…"] + ["x.py"] if script_left_out else argv)
        size = int(options.nproc_per_node)
        if script_left_out:
            return  # about torchrun's own flags
        program, argv = options.training_script, list(options.training_script_args)
    if program in ("megatron-jq", "megatron_jq"):
        program, *argv = argv
        if program == "--version":
            assert done(place, ["--version"]).startswith("megatron-jq ")
            return
        assert program in COMMANDS, f"megatron-jq {program}: there is no such command"
        if len(argv) < (2 if program == "convert" else 1):
            return  # a name in a sentence
    argv = with_words_of_a_reader(argv, call.snippet.document, place)
    assert program in DOING, (
        f"nobody classified {program}: give it a function in DOING that does it in small, or a reason in LEFT_OUT "
        f"({Path(__file__).name})"
    )
    DOING[program](argv, size, call, place)


def with_words_of_a_reader(argv: list[str], document: str, place: Path) -> list[str]:
    result: list[str] = []
    for at, word in enumerate(argv):
        if word == "…":
            before = argv[at - 1] if at else ""
            more = [flags.split() for (name, flag), flags in MORE.items() if name == document and flag in argv]
            result += [VALUES[before]] if before in VALUES else sum(more, [])
        elif word == "NEW":
            result.append(f"NEW-{len(list(place.glob('NEW-*')))}")
        elif word.endswith("iter_NNNNNNN"):
            result.append(str(max(Path(word).parent.glob("iter_*"), default=word)))
        elif WORDS.get(word, word) is not None:
            result.append(re.sub("^/data/", "data/", WORDS.get(word, word)))
    return result


def with_flags(argv: list[str], **values: object) -> list[str]:
    """The same command line with other values of these flags."""
    result = list(argv)
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if flag in result:
            at = result.index(flag)
            del result[at : at + 2]
        result += [flag, str(value)]
    return result


def in_small(config: Config) -> Config:
    """A step or two of a second on a CPU. What is no size, or is not read, stays."""
    o, c, t = config.objective, config.checkpoint, config.training
    pretrains, trains_a_tokenizer = o.estimator == "pretrain", config.data.tokenizer_model is None and c.load is None
    model = {"qwen3-0.6b": "Qwen3-0.6B", "small": "tiny"}.get(config.model.model, config.model.model)
    budget = config.rollout.rationale_budget if o.estimator == "sft" else min(4, config.rollout.rationale_budget)
    rationales = min(2, config.rollout.num_rationales)
    rollout = replace(config.rollout, prompts_per_step=2, num_rationales=rationales, rationale_budget=budget)
    training = replace(
        t, train_iters=2 if c.resume or (c.load and not c.finetune) else 1, sample_interval=0, tensorboard=False,
        eval_interval=min(1, t.eval_interval), eval_samples=min(2, t.eval_samples),
    )  # fmt: skip
    small = replace(
        config,
        model=replace(config.model, model=model),
        rollout=rollout,
        training=training,
        data=replace(
            config.data,
            train_examples=8,
            eval_examples=1,
            seq_length=16 if pretrains else None,
            tokenizer_vocab_size=300 if Path(config.data.train_data).is_file() and trains_a_tokenizer else None,
        ),
        optimizer=replace(config.optimizer, lr_warmup_iters=0, lr_decay_iters=None),
        checkpoint=replace(c, save_interval=min(1, c.save_interval)),
        parallel=replace(config.parallel, device="cpu"),
    )
    return without_unread(small, resolve_architecture(small))


def ranks_of(config: Config) -> int:
    return config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size


def train(argv: list[str], size: int, call: Call, place: Path) -> None:
    if "--help" in argv:
        done(place, ["train", *argv])
        return
    config = parse_args(argv)
    validate_training(config, max(size, ranks_of(config)) if size == 1 else size)
    refuse_unread("train", config, resolve_architecture(config), explicit_settings(argv))
    small = in_small(config)
    done(place, ["train", *to_argv(small)], ranks_of(small))


def evaluate(argv: list[str], size: int, call: Call, place: Path) -> None:
    args, rest = evaluate_command.parser().parse_known_args(argv)
    config = parse_args(rest)
    if args.rescore is None:
        argv = with_flags(argv, eval_examples=1, eval_samples=8, rationale_budget=4, answer_budget=32, device="cpu")
        if config.training.eval_temperature == 0:
            argv = with_flags(argv, eval_temperature=1)
    out = done(place, ["evaluate", *argv], ranks_of(config))
    assert "pass@1" in out


def generate(argv: list[str], size: int, call: Call, place: Path) -> None:
    small = with_flags(argv, rationale_budget=4, answer_budget=8, device="cpu")
    assert "rationale" in done(place, ["generate", *small], size)


def command(name: str):
    return lambda argv, size, call, place: done(place, [name, *argv], size)


def tool(module, **smaller: object):
    def work(argv: list[str], size: int, call: Call, place: Path) -> None:
        out = done(place, with_flags(argv, **smaller), size, module.main)
        if call.snippet.printed:
            assert out == call.snippet.printed, f"prints something else:\n{out}"

    return work


def prepare(argv: list[str], size: int, call: Call, place: Path) -> None:
    if "--output" not in argv:
        prepare_data.parse([*argv, "--output", "x"])  # some flags of it, in a sentence
        return
    sizes = argv[argv.index("--split-sizes") + 1]
    assert sizes == "paper" or parse_sizes(sizes)
    done(place, with_flags(argv, split_sizes="train=4,validation=2,test=2"), 1, prepare_data.main)


def read_alone(module):
    """Tools that take minutes: their own parser reads the line, and nothing runs."""

    def work(argv: list[str], size: int, call: Call, place: Path) -> None:
        class Read(BaseException):
            pass

        def reads(self, *arguments):
            parse(self, *arguments)
            raise Read

        parse = CommandParser.parse_args
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Read):
            patch.setattr(CommandParser, "parse_args", reads)
            patch.setattr(sys, "argv", [module.__file__, *argv])
            code = module.main()
            raise AssertionError(f"refused with exit code {code}")

    return work


def study(argv: list[str], size: int, call: Call, place: Path) -> None:
    """46 CPU minutes; tests/unit/test_study.py runs its parts."""
    study_parser().parse_args(argv)


def script(argv: list[str], size: int, call: Call, place: Path) -> None:
    def work(argv: list[str]) -> int:
        sys.argv = [call.words[0], *argv]
        runpy.run_path(str(REPOSITORY / call.words[0]), run_name="__main__")
        return 0

    done(place, argv, 1, work)


def minimal_loop(argv: list[str], size: int, call: Call, place: Path) -> None:
    script(with_flags(argv, steps=1), size, call, place)


def batch_script(argv: list[str], size: int, call: Call, place: Path) -> None:
    """Job, folder and flags; tests/slurm submits the scripts."""
    at = next((i for i, word in enumerate(argv) if word.endswith(".sbatch")), None)
    assert at is not None and (REPOSITORY / argv[at]).is_file(), "names no batch script of launch/slurm"
    name, flags = Path(argv[at]).stem, argv[at + 1 :]
    needed = {"sweep": {"SWEEP_DIR"}, "plot": {"SWEEP_DIR"}, "convert": set()}.get(name, {"RUN_DIR"})
    assert needed <= call.variables.keys(), f"{name}.sbatch needs {needed}"
    if name == "evaluate":
        _, flags = evaluate_command.parser().parse_known_args(flags)
        parse_args(flags)
    elif name in ("train", "sweep"):
        validate_training(parse_args(flags), None)


def nemo_run_script(argv: list[str], size: int, call: Call, place: Path) -> None:
    """Its own flags by the sources, the rest as train's; tests/slurm runs the scripts."""
    folder = REPOSITORY / "launch" / "nemo_run"
    sources = (folder / "experiment.py").read_text() + (folder / Path(call.words[0]).name).read_text()
    switches = set(re.findall(r'add_argument\(\s*"(--[\w-]+)", action="store_true"', sources))
    with_value = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', sources)) - switches
    rest, values = [], False
    for word in argv:
        if word.startswith("--"):
            values = word in with_value
            if word not in with_value | switches:
                rest.append(word)
        elif not values:
            rest.append(word)
    validate_training(parse_args(rest), None)


DOING = {
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
    "convert": command("convert"),
    "grid": command("grid"),
    "tools/estimate.py": tool(estimate),
    "tools/plot_run.py": tool(plot_run),
    "tools/prepare_data.py": prepare,
    "tools/preprocess_data.py": tool(preprocess_data, workers=1),
    "tools/bench_step.py": tool(bench_step, model="tiny", steps=1, warmup=0, num_rationales=2, device="cpu"),
    "tools/bench_head.py": read_alone(bench_head),
    "tools/soak_checkpoints.py": read_alone(soak_checkpoints),
    "examples/study/run.py": study,
    "examples/minimal_loop.py": minimal_loop,
    "examples/stages/make_data.py": script,
    "launch/nemo_run/train.py": nemo_run_script,
    "launch/nemo_run/sweep.py": nemo_run_script,
    "sbatch": batch_script,
}


# The test itself


def test_a_command_that_nobody_classified_is_found(place):
    """The kinds of line that would otherwise pass unseen."""
    text = "\n".join(
        [
            "```bash", "for q in 0 1; do", "  python tools/no_such.py --q $q \\", "    --more", "done", "```", "",
            "    megatron-jq serve --port 1", "",
            "See `torchrun tools/other.py --flag` and `megatron-jq train --no-such 3`.",
        ]
    )  # fmt: skip
    seen = [call for snippet in snippets("x.md", text) for call in calls(snippet, place, {})]
    assert [without_python(call.words) for call in seen] == [
        ("tools/no_such.py", "--q", "0", "--more"), ("tools/no_such.py", "--q", "1", "--more"),
        ("megatron-jq", "serve", "--port", "1"), ("torchrun", "tools/other.py", "--flag"),
        ("megatron-jq", "train", "--no-such", "3"),
    ]  # fmt: skip
    refusals = ("nobody classified", "no such command", "nobody classified", "unknown flag --no-such")
    for call, words in zip(seen[1:], refusals, strict=True):
        with pytest.raises((AssertionError, ValueError), match=words):
            do(replace(call, words=without_python(call.words)), place)


def test_every_reason_and_every_replacement_is_needed(place):
    everything = [snippet for document in DOCUMENTS for snippet in snippets(document)]
    seen = [call for snippet in everything for call in calls(snippet, place, {"GSM8K": "x"})]
    lines = [" ".join(without_python(call.words)) for call in seen]
    for words in LEFT_OUT:
        assert any(line.removeprefix(".venv/bin/").startswith(words) for line in lines), words
    words = {word for call in seen for word in call.words}
    assert words >= WORDS.keys() | VALUES.keys() and {document for document, _ in MORE} | FILES.keys() <= {*DOCUMENTS}
