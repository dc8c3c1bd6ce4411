"""Every flag of every command changes something, is refused, or is listed with the reason.

Why: `evaluate --temperature 0.2` that samples at 1.0, or `--adam-eps` under SGD, is a run that nobody asked for, and
ends with exit code 0. What a `--config` file holds may serve several commands, so it is only said.

Where a setting is read is found in the source: `config.data.split`, or `d.split` where `d = config.data` stands in the
function. What this cannot show is that the value then matters; tests of each setting do.

YOU ADDED A FLAG AND THIS FAILS? The message names the table in megatron_jq/config_reads.py (or READ_BY in
config_estimators.py) that needs a line.
"""

import ast
import functools
from pathlib import Path

import pytest

from megatron_jq.architecture import PRESETS
from megatron_jq.cli.main import main
from megatron_jq.config import ALIASES, SETTINGS, Config, explicit_settings, parse_args, to_argv
from megatron_jq.config_estimators import READ_BY
from megatron_jq.config_reads import (
    INSTEAD,
    LISTED,
    NEEDS,
    NEEDS_IN_EVALUATION,
    NEEDS_IN_TRAINING,
    READS,
    refuse_unread,
    unread,
    unread_note,
    without_unread,
)
from megatron_jq.errors import UserError
from megatron_jq.estimators import ROWS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_jq"
TINY = PRESETS["tiny"]
GROUPS = {group for group, _ in SETTINGS.values()}
ESTIMATORS = sorted({name for readers in READ_BY.values() for name in readers})
#: Group class → group, for parameters that are annotated with it.
CLASSES = {f"{group.capitalize()}Config": group for group in GROUPS}
#: They look at every setting, or pass them on: no reading.
NO_READERS = (
    "settings.py", "config.py", "config_reads.py", "config_estimators.py", "config_layout.py", "config_validate.py",
)  # fmt: skip
#: Rooms whose code a command runs. `evaluate` and training share the lower ones.
SHARED = ("data", "model", "parallel", "rollout", "checkpoint")
ROOMS = {"train": (*SHARED, "train", "corpus", "evaluate", "cli"), "evaluate": (*SHARED, "evaluate", "cli/evaluate.py")}
#: What `evaluate`'s own files read of the checkpoint's settings, though no flag of the command may say it → why.
OF_THE_CHECKPOINT = {
    "temperature": "that of the run's rollouts, where the run evaluated greedily",
    "train_data": "a built-in task, or a prepared set, brings the held-out data of the run",
    "rationale_field": "given rationales are read of training data alone",
    "estimator": "settings of pretraining say nothing of prompts",
    "max_tokens_per_micro_batch": "kept with the run's settings",
}


def reads(path: Path) -> set[str]:
    """Settings that a file reads: an attribute of a group, or of a name that stands for one in the function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for scope in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]:
        aliases = {a.arg: CLASSES[_name(a.annotation)] for a in _arguments(scope) if _name(a.annotation) in CLASSES}
        for node in ast.walk(scope):
            if isinstance(node, ast.Assign):
                aliases |= _aliases(node)
        for node in ast.walk(scope):
            if isinstance(node, ast.Attribute) and node.attr in SETTINGS:
                of = node.value
                group = of.attr if isinstance(of, ast.Attribute) else aliases.get(getattr(of, "id", ""))
                if group == SETTINGS[node.attr][0]:
                    found.add(node.attr)
    return found


def _arguments(scope: ast.FunctionDef) -> list[ast.arg]:
    return [*scope.args.posonlyargs, *scope.args.args, *scope.args.kwonlyargs]


def _name(node: ast.AST | None) -> str:
    return getattr(node, "id", getattr(node, "attr", ""))


def _aliases(node: ast.Assign) -> dict[str, str]:
    """`d, r = config.data, config.rollout` → {d: data, r: rollout}."""
    pairs = []
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs += zip(target.elts, node.value.elts, strict=False)
        else:
            pairs.append((target, node.value))
    return {t.id: v.attr for t, v in pairs if isinstance(t, ast.Name) and _name(v) in GROUPS and hasattr(v, "attr")}


@functools.cache
def read_by(command: str) -> frozenset[str]:
    """What the command's rooms read, with the shape of the model, which config_validate makes of [model]."""
    files = [p for room in ROOMS[command] for p in ([PACKAGE / room] if room.endswith(".py") else _files(room))]
    return frozenset({name for path in files for name in reads(path)} | reads(PACKAGE / "config_validate.py"))


def _files(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py"))


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def named(name: str) -> list[str]:
    """Words of a command line that name a setting, with a value that it may have."""
    kind = SETTINGS[name][1]
    text = str(kind)
    if "bool" in text:
        return [flag(name)]
    options = [value for part in (kind, *getattr(kind, "__args__", ())) for value in getattr(part, "__args__", ())]
    literal = next((value for value in options if isinstance(value, str)), None)
    literal = literal or next((value for value in getattr(kind, "__args__", ()) if isinstance(value, str)), None)
    return [flag(name), literal or ("0.5" if "float" in text else "1" if "int" in text else "x")]


def test_the_scan_reads_as_people_write(tmp_path):
    (tmp_path / "x.py").write_text(
        "def f(config, t: TrainingConfig):\n    d, r = config.data, self.config.rollout\n    text.split()\n"
        "    return d.split, r.top_p, t.seed, config.optimizer.lr, other.min_lr\n",
        encoding="utf-8",
    )
    assert reads(tmp_path / "x.py") == {"split", "top_p", "seed", "lr"}


@pytest.mark.parametrize("name", SETTINGS)
def test_training_reads_every_setting(name):
    knobs = {knob for row in ROWS for knob in row.reads}  # test_estimator_conformance.py shows that they are read
    assert name in read_by("train") | knobs | set(LISTED), (
        f"no code of {', '.join(ROOMS['train'])} reads {flag(name)} (as config.{SETTINGS[name][0]}.{name}): a run "
        "with it is the run without it. Wire it, or list it with the reason in config_reads.LISTED."
    )


@pytest.mark.parametrize("name", sorted(READS["evaluate"]))
def test_evaluate_reads_every_flag_that_it_takes(name):
    assert name in read_by("evaluate") | set(LISTED), (
        f"config_reads.READS['evaluate'] has {name}, but no code of {', '.join(ROOMS['evaluate'])} reads it: take it "
        "out there, so that the flag is refused, or wire it."
    )


def test_evaluate_takes_every_flag_that_its_own_files_read():
    own = {name for path in (*_files("evaluate"), PACKAGE / "data" / "reading.py") for name in reads(path)}
    missing = own - READS["evaluate"] - OF_THE_CHECKPOINT.keys()
    assert not missing, (
        f"megatron_jq/evaluate (or data/reading.py) reads {sorted(missing)}, which `evaluate` refuses as flags: add "
        "them to config_reads.READS['evaluate'] (and to JUDGING, if a sample can be judged by them again)."
    )


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in READS["evaluate"]])
def test_evaluate_refuses_every_other_flag_by_its_name(name, capsys):
    if name == "load":
        return  # its own flag, the checkpoint's folder
    assert main(["evaluate", "--hf", "nowhere", *named(name)]) == 2
    error = capsys.readouterr().err
    spelled = flag(name).removeprefix("--")
    assert f"{spelled} is not read by evaluate: " in error and "nowhere" not in error, error


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in READS["evaluate --rescore"]])
def test_rescoring_refuses_every_flag_that_changes_no_judgement(name, capsys):
    if name == "load":
        return
    assert main(["evaluate", "--rescore", "nowhere.jsonl", *named(name)]) == 2
    assert "is not read by evaluate --rescore: " in capsys.readouterr().err


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_training_refuses_every_flag_of_other_estimators(estimator):
    names = [name for name, readers in READ_BY.items() if estimator not in readers and name not in LISTED]
    argv = ["--estimator", estimator, *(word for name in names for word in named(name))]
    with pytest.raises(UserError) as raised:
        refuse_unread("train", parse_args(argv), TINY, explicit_settings(argv))
    lines = str(raised.value).splitlines()
    assert sorted(lines) == sorted({line for line in lines if f" is not read by --estimator {estimator}: of " in line})
    assert {line.split()[0] for line in lines} == {flag(name) for name in names}


#: Setting → the words under which it does not count, for each setting of NEEDS. Everything else as it comes.
FILE = ["--train-data", "x.jsonl"]
UNCOUNTED = {
    "sgd_momentum": [], "adam_beta1": ["--optimizer", "sgd"], "adam_beta2": ["--optimizer", "sgd"],
    "adam_eps": ["--optimizer", "sgd"], "min_lr": ["--lr", "1"], "lr_decay_iters": [], "score_check_interval": [],
    "grpo_clamp_eps_lower": ["--estimator", "grpo"],
    "grpo_clamp_eps_upper": ["--estimator", "grpo"], "train_examples": FILE, "data_format": [], "bad_records": [],
    "prompt_field": [*FILE, "--data-format", "gsm8k"], "answer_field": [],
    "id_field": [*FILE, "--data-format", "finqa"],
    "finqa_answer": [*FILE, "--data-format", "gsm8k"], "prompt_template": [],
    "tokenizer_vocab_size": ["--tokenizer-model", "x.model"],
    "micro_batch_size": ["--max-tokens-per-micro-batch", "99"],
    "eval_top_p": [],
    "init_method_std": ["--load", "x"], "ffn_hidden_size": ["--model", "tiny-moe"], "moe_ffn_hidden_size": None,
    "moe_router_topk": [],
    "moe_aux_loss_coeff": [], "match": FILE, "match_rule": FILE, "eval_examples": FILE, "eval_samples": FILE,
    "eval_temperature": FILE, "answer_extract": FILE, "reward": [],
}  # fmt: skip


@pytest.mark.parametrize("name", sorted({name for need in (*NEEDS, *NEEDS_IN_TRAINING) for name in need.settings}))
def test_a_flag_that_another_one_leaves_without_effect_is_refused(name, capsys):
    assert name in UNCOUNTED, f"give UNCOUNTED a command line under which {flag(name)} does not count"
    if UNCOUNTED[name] is None:
        return  # refused as a shape that cannot be
    assert main(["train", *UNCOUNTED[name], *named(name)]) == 2
    error = capsys.readouterr().err
    assert f"{flag(name)} is not read by this run: it needs " in error, error


def test_what_counts_is_not_refused():
    lines = (
        "--optimizer sgd --sgd-momentum 0.5", "--adam-eps 1e-9", "--lr-decay-style cosine --min-lr 1e-5",
        "--score-with rollout --score-check-interval 3",
        "--estimator grpo --grpo-iterations 2 --grpo-clamp-eps-lower 0.1",
        "--estimator pretrain --sample-interval 0 --share-prompts off",
        "--train-examples 9", "--train-data x.jsonl --answer-field a --bad-records drop", "--eval-examples 3",
        "--train-data x --eval-data y --eval-temperature 1 --eval-top-p 0.9 --eval-samples 4 --match substring",
        "--model tiny-moe --moe-router-topk 1", "--ffn-hidden-size 64", "--estimator trice --num-resamples 3 --q 1",
        "--tokenizer-vocab-size 300", "--prompt-style cold --prompt-template t.toml", "--micro-batch-size 3",
    )  # fmt: skip
    for line in lines:
        shape = PRESETS["tiny-moe"] if "tiny-moe" in line else TINY
        refuse_unread("train", parse_args(line.split()), shape, explicit_settings(line.split()))
    flags = ["--eval-data", "x", "--eval-temperature", "1", "--eval-top-p", "0.5", "--tokenizer-model", "m"]
    refuse_unread("evaluate", parse_args(flags), TINY, explicit_settings(flags))
    assert NEEDS_IN_EVALUATION[0].settings == ("tokenizer_type",)
    with pytest.raises(UserError, match="--tokenizer-type is not read by evaluate: it needs --tokenizer-model"):
        refuse_unread("evaluate", Config(), TINY, {"tokenizer_type"})


def test_a_file_may_hold_what_is_not_read_and_that_is_said(tmp_path):
    (tmp_path / "a.toml").write_text(
        "q = 0.5\nadam_eps = 1e-9\noptimizer = 'sgd'\nestimator = 'grpo'\n", encoding="utf-8"
    )
    argv = ["--config", str(tmp_path / "a.toml"), "--lr", "0.1"]
    config = parse_args(argv)
    refuse_unread("train", config, TINY, explicit_settings(argv))
    told = unread_note("train", config, TINY, explicit_settings(argv))
    assert told == "not read by --estimator grpo: --q; not read by this run: --adam-eps (it needs --optimizer adam)"
    told = unread_note("evaluate", config, TINY, {"lr"})
    assert told == "not read by evaluate: --estimator, --q, --optimizer, --adam-eps"
    assert unread_note("evaluate", config, TINY, {"lr"}, config) is None
    # What a launcher makes a command line of names none of it.
    words = to_argv(without_unread(config, TINY))
    assert explicit_settings(words) == {"estimator", "optimizer", "lr"}


def test_only_flags_count_as_named():
    argv = [
        "--config",
        "x.toml",
        "--no-tensorboard",
        "--q=0.5",
        "--no-untie-embeddings-and-output-weights",
        "--lr",
        "1",
    ]
    assert explicit_settings(argv) == {"tensorboard", "q", "untie_embeddings_and_output_weights", "lr"}


def test_tables_name_real_settings_and_say_why():
    tables = [*READS.values(), LISTED, READ_BY, OF_THE_CHECKPOINT, [name for _, name in INSTEAD]]
    assert {name for table in tables for name in table} <= SETTINGS.keys()
    assert all(len(reason) > 10 for reason in (*LISTED.values(), *OF_THE_CHECKPOINT.values()))
    assert {command for command, _ in INSTEAD} <= READS.keys()
    for estimator in set(ALIASES) | set(ESTIMATORS):
        config = parse_args(["--estimator", estimator])
        assert unread("train", config, TINY).keys() <= SETTINGS.keys()


#: Files with flags of their own → those that read them.
PARSERS = {
    "megatron_jq/cli/evaluate.py": (), "megatron_jq/cli/convert.py": (), "megatron_jq/cli/preflight.py": (),
    "megatron_jq/cli/generate.py": (),
    "megatron_jq/cli/grid.py": (), "launch/slurm/node.py": (), "examples/study/run.py": (),
    "examples/minimal_loop.py": (),
    "launch/nemo_run/experiment.py": ("launch/nemo_run/train.py", "launch/nemo_run/sweep.py"),
    "launch/nemo_run/train.py": ("launch/nemo_run/experiment.py",),
    "launch/nemo_run/sweep.py": ("launch/nemo_run/experiment.py",),
    **{f"tools/{path.name}": () for path in sorted((ROOT / "tools").glob("*.py"))},
}  # fmt: skip


@pytest.mark.parametrize("file", PARSERS)
def test_every_flag_that_a_command_declares_is_read_there(file):
    trees = [ast.parse((ROOT / name).read_text(encoding="utf-8")) for name in (file, *PARSERS[file])]
    attributes = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    attributes |= {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    declared = [
        [word.value for word in node.args if isinstance(word, ast.Constant)]
        for node in ast.walk(trees[0])
        if isinstance(node, ast.Call) and _name(node.func) == "add_argument"
    ]
    for words in declared:
        dest = max(words, key=lambda word: word.startswith("--") and 1).lstrip("-").replace("-", "_")
        assert dest in attributes, f"{file} declares {words} and reads no .{dest}"


def test_every_command_with_flags_is_in_the_list():
    declaring = {
        str(path.relative_to(ROOT))
        for folder in ("megatron_jq", "tools", "launch", "examples")
        for path in (ROOT / folder).rglob("*.py")
        if ".add_argument(" in path.read_text(encoding="utf-8")
    }
    assert declaring <= PARSERS.keys(), f"add to PARSERS: {declaring - PARSERS.keys()}"
