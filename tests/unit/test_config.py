"""Settings: layering, strictness, round trips, and what validate refuses."""

import dataclasses
import json
import re
import subprocess
import sys
import typing
from typing import Literal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_jq.architecture import PRESETS
from megatron_jq.architecture_files import architecture_to_toml
from megatron_jq.cli.main import main
from megatron_jq.config import (
    ALIASES,
    SETTINGS,
    Config,
    explicit_settings,
    load_toml,
    old_name_notes,
    parse_args,
    settings_of_text,
    to_argv,
    to_toml,
    with_one_rationale,
)
from megatron_jq.config_estimators import READ_BY, schedule_notes
from megatron_jq.config_reads import unread_note
from megatron_jq.config_validate import AT_LEAST, derive, validate, validate_training
from megatron_jq.errors import UserError


def test_every_setting_has_one_flag_and_the_defaults_of_the_interface():
    names = [f.name for g in dataclasses.fields(Config) for f in dataclasses.fields(g.type)]
    assert len(names) == len(set(names)) == len(SETTINGS)
    config = parse_args([])
    assert config == Config()
    assert (config.objective.estimator, config.objective.q, config.rollout.num_rationales) == ("garl", 0.75, 8)
    assert (config.training.train_iters, config.optimizer.lr, config.model.params_dtype) == (100, 1e-3, "float32")


def test_every_setting_that_may_be_none_is_none_by_default():
    """TOML cannot write None, so a file that lacks the key must mean it."""
    for name, (group, kind) in SETTINGS.items():
        default = getattr(getattr(Config(), group), name)
        assert (type(None) in typing.get_args(kind)) == (default is None), name


def test_bounds_name_real_settings():
    assert {name for names in AT_LEAST.values() for name in names} <= set(SETTINGS)


def test_flags_override_the_file_and_the_file_overrides_the_defaults(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('lr = 2\nnum-rationales = 4\n[objective]\nq = 0.25\nestimator = "paft"\n[training]\nseed = 7\n')
    config = parse_args(["--q", "1.0", "--config", str(path), "--seed=9"])
    assert (config.objective.q, config.training.seed) == (1.0, 9)  # flags
    assert (config.objective.estimator, config.rollout.num_rationales) == ("paft", 4)  # file
    assert config.optimizer.lr == 2.0 and isinstance(config.optimizer.lr, float)
    assert config.data == Config().data  # defaults


def test_an_old_name_of_a_setting_is_read_and_noted_wherever_it_stands(tmp_path):
    file = tmp_path / "old.toml"
    file.write_text('[training]\nnormalise = "squad"\n')
    note = ["--normalise is now --match-rule (match_rule in a file); the next version does not read the old name"]
    for argv, rule in ((["--normalise", "text"], "text"), (["--config", str(file)], "squad")):
        assert parse_args(argv).training.match_rule == rule and old_name_notes(argv) == note
        assert explicit_settings(argv) <= {"match_rule"}
    assert old_name_notes(["--normalise=text", "--config", str(file)]) == note  # once
    assert old_name_notes(["--match-rule", "text", "--run-dir", "normalise"]) == []
    # The record of a run from before, and what is written now.
    assert settings_of_text(file.read_text(), "config.toml").training.match_rule == "squad"
    assert "match_rule" in to_toml(Config()) and "normalise" not in to_toml(Config())
    file.write_text('normalise = "squad"\nmatch_rule = "text"\n')
    with pytest.raises(UserError, match="old.toml: match_rule is given twice"):
        parse_args(["--config", str(file)])
    file.write_text('normalise = "squat"\n')
    with pytest.raises(UserError, match="old.toml: match_rule = 'squat': expected one of auto, none"):
        parse_args(["--config", str(file)])


def test_switches_and_spellings():
    config = parse_args(["--sequence_parallel", "--no-tensorboard", "--untie-embeddings-and-output-weights"])
    assert config.parallel.sequence_parallel and not config.training.tensorboard
    assert config.model.untie_embeddings_and_output_weights is True
    assert parse_args(["--no-untie-embeddings-and-output-weights"]).model.untie_embeddings_and_output_weights is False
    assert parse_args(["--q", "0.1", "--q", "0.2"]).objective.q == 0.2
    assert parse_args(["--run-dir=--x_y=z", "--prompt-field", "-p q"]).training.run_dir == "--x_y=z"
    assert parse_args(["--num-layers", "3", "--num-layers", "None"]).model.num_layers is None


# Any text that the system can pass as an argument; surrogates stand for bytes that are no text. "None" is the word for
# a setting without a value.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12).filter("None".__ne__)
VALUES = {
    bool: st.booleans(),
    int: st.integers(-(10**20), 10**20),
    float: st.floats(allow_nan=False),
    str: TEXTS,
    type(None): st.none(),
}


def _values(kind) -> st.SearchStrategy:
    if typing.get_origin(kind) is Literal:
        return st.sampled_from(typing.get_args(kind))
    return VALUES[kind] if kind in VALUES else st.one_of(*(_values(option) for option in typing.get_args(kind)))


@st.composite
def configs(draw) -> Config:
    groups = {}
    for group in dataclasses.fields(Config):
        changed = draw(st.sets(st.sampled_from([f.name for f in dataclasses.fields(group.type)])))
        groups[group.name] = group.type(**{name: draw(_values(SETTINGS[name][1])) for name in sorted(changed)})
    config = Config(**groups)
    assume(config.objective.estimator not in ALIASES and with_one_rationale(config) == config)
    return config


@given(configs())
def test_command_line_round_trip(config):
    assert parse_args(to_argv(config)) == config


@given(configs())
def test_toml_round_trip(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("toml") / "config.toml"
    path.write_bytes(to_toml(config).encode())
    assert load_toml(path) == config


@given(st.lists(st.one_of(TEXTS, st.sampled_from([f"--{n.replace('_', '-')}" for n in SETTINGS])), max_size=4))
def test_any_argument_list_parses_or_is_a_user_error(argv):
    if {"-h", "--help"} & set(argv):
        return
    try:
        config = parse_args(argv)
    except UserError as error:
        assert str(error).strip()
    else:
        assert parse_args(to_argv(config)) == config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lrr", "3"], "unknown flag --lrr; did you mean --lr?"),
        (["--num-rationale=3"], "unknown flag --num-rationale; did you mean --num-rationales?"),
        (["--tensor-parallel-size", "2"], "did you mean --tensor-model-parallel-size?"),
        (["--tyro-print-completion", "bash"], "unknown flag --tyro-print-completion"),
        (["q", "1"], "unexpected argument 'q'"),
        (["--lr"], "--lr: a value must follow"),
        (["--run-dir", "--q", "1"], "--run-dir: a value must follow"),
        (["--lr", "fast"], "--lr fast: expected a number"),
        (["--num-layers", "1.5"], "--num-layers 1.5: expected a whole number"),
        (["--q", "1", "--estimator", "gral"], "--estimator gral: expected one of garl, paft, grpo, rloo, maxrl"),
        (["--bf16=true"], "write --bf16 or --no-bf16"),
        (["--config", "a.toml", "--config", "b.toml"], "--config is given twice"),
        (["--config", "no/such.toml"], "cannot read no/such.toml: No such file"),
    ],
)
def test_bad_command_lines_name_the_flag_and_the_fix(argv, message):
    with pytest.raises(UserError) as raised:
        parse_args(argv)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrr = 1", "unknown key lrr; did you mean lr?"),
        ("[optimizer]\nclip-gard = 1.0", "unknown key clip_gard; did you mean clip_grad?"),
        ("[optimiser]\nlr = 1.0", "unknown table [optimiser]; did you mean optimizer?"),
        ("[rollout]\nlr = 1.0", "lr belongs in [optimizer], not in [rollout]"),
        ("lr = 1\n[optimizer]\nlr = 1.0", "lr is given twice"),
        ("lr = '1e-3'", "lr = '1e-3': expected a number"),
        ("lr = true", "lr = True: expected a number"),
        ("train_iters = 1.0", "train_iters = 1.0: expected a whole number"),
        ("bf16 = 1", "bf16 = 1: expected true or false"),
        ("q_schedule = 'cos'", "expected one of constant, step, linear, cosine"),
        ("run_dir = ['a']", "run_dir = ['a']: expected text"),
        ("lr = ", "is not valid TOML"),
        ("[a\nb", "at line 1"),
    ],
)
def test_bad_toml_names_the_file_the_key_and_the_fix(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        load_toml(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


TP2 = "--tensor-model-parallel-size 2"


@pytest.mark.parametrize(
    ("argv", "world_size", "message"),
    [
        ("--q 1.5", 1, "--q must lie between 0 and 1, not 1.5"),
        ("--q=-0.1", 1, "--q must lie between 0 and 1, not -0.1"),
        ("--q nan", 1, "--q must be finite"),
        ("--q-schedule linear --q-final 2", 1, "--q-final must lie between 0 and 1"),
        ("--q-schedule cosine", 1, "--q-schedule cosine needs --q-final"),
        ("--q-schedule step --q-final 0", 1, "needs --q-schedule-iters"),
        ("--q-final 0", 1, "need --q-schedule step, linear or cosine"),
        ("--num-rationales 1", 1, "--num-rationales must be at least 2 for --estimator garl"),
        ("--num-rationales 1 --estimator rloo", 1, "--num-rationales must be at least 2"),
        ("--num-rationales 1 --estimator grpo", 1, "--num-rationales must be at least 2"),
        ("--num-rationales 1 --estimator maxrl", 1, "--num-rationales must be at least 2"),
        ("--num-rationales 0 --estimator paft", 1, "--num-rationales must be at least 1"),
        ("--num-resamples 4", 1, "--num-resamples is for --estimator paft alone, not garl"),
        ("--tensor-model-parallel-size 2", 3, "3 process(es) cannot be cut into tensor x pipeline groups of 2 x 1 = 2"),
        ("--tensor-model-parallel-size 2", 1, "1 process(es) cannot be cut"),
        ("--tensor-model-parallel-size 8", 8, "8 does not divide num_attention_heads (4)"),
        ("--tensor-model-parallel-size 4", 4, "4 does not divide num_query_groups (2)"),
        ("--tensor-model-parallel-size 2 --ffn-hidden-size 33", 2, "2 does not divide ffn_hidden_size (33)"),
        ("--pipeline-model-parallel-size 3", 3, "3 does not divide num_layers (2)"),
        ("--tensor-model-parallel-size 0", 1, "--tensor-model-parallel-size must be at least 1"),
        ("--expert-model-parallel-size 2", 2, "need a model with experts"),
        ("--expert-tensor-parallel-size 1", 1, "need a model with experts"),
        ("--num-experts 4", 1, "num_experts needs moe_ffn_hidden_size of at least 1, not None"),
        ("--moe-ffn-hidden-size 4", 1, "moe_ffn_hidden_size is set, num_experts is not"),
        ("--model tiny-moe --expert-model-parallel-size 3", 3, "3 does not divide num_experts (4)"),
        ("--model tiny-moe --expert-model-parallel-size 0", 1, "--expert-model-parallel-size must be at least 1"),
        ("--model tiny-moe --expert-model-parallel-size 4", 2, "(tensor 1 x data 2 processes)"),
        ("--model tiny-moe --expert-model-parallel-size 2 --pipeline-model-parallel-size 2", 2, "x data 1 processes)"),
        ("--model tiny-moe --moe-router-topk 5", 1, "moe_router_topk must lie between 1 and num_experts (4): 5"),
        ("--model tiny-moe --moe-aux-loss-coeff=-1", 1, "moe_aux_loss_coeff must be at least 0"),
        (f"--model tiny-moe {TP2}", 2, "with experts needs --sequence-parallel"),
        (f"--model tiny-moe {TP2} --sequence-parallel --moe-ffn-hidden-size 5", 2, "moe_ffn_hidden_size (5)"),
        (f"--model tiny-moe {TP2} --sequence-parallel --expert-tensor-parallel-size 1", 2, "give that size 2 or leave"),
        ("--sequence-parallel", 1, "--sequence-parallel needs --tensor-model-parallel-size above 1"),
        ("--optimizer sgd --use-distributed-optimizer", 1, "--use-distributed-optimizer is Megatron-core's for"),
        ("--finetune", 1, "--finetune needs --load"),
        ("--keep-best p_mean", 1, "--keep-best needs --keep-last"),
        ("--keep-best eval_maj_at_k --keep-last 1 --save-interval 4", 1, "--keep-best eval_maj_at_k is known after"),
        ("--keep-best eval_pass_at_k --keep-last 1 --save-interval 4 --eval-interval 3", 1, "a multiple of it"),
        ("--keep-last 0", 1, "--keep-last must be at least 1"),
        ("--rationale-budget 0", 1, "--rationale-budget must be at least 1"),
        ("--answer-budget 0", 1, "--answer-budget must be at least 1"),
        ("--rationale-budget 510", 1, "cannot hold a prompt of 1, a rationale of 510"),
        ("--max-prompt-tokens 500", 1, "cannot hold a prompt of 500"),
        ("--micro-batch-size 0", 1, "--micro-batch-size must be at least 1"),
        ("--train-iters 0", 1, "--train-iters must be at least 1"),
        ("--prompts-per-step 0", 1, "--prompts-per-step must be at least 1"),
        ("--temperature 0", 1, "--temperature must be above 0"),
        ("--top-p 0", 1, "--top-p must be above 0"),
        ("--top-p 1.1", 1, "--top-p must lie between 0 and 1"),
        ("--lr=-1", 1, "--lr must be at least 0"),
        ("--lr 0.1 --min-lr 0.2", 1, "--min-lr (0.2) must not be above --lr (0.1)"),
        ("--lr-decay-style cosine --lr-warmup-iters 100", 1, "--lr-warmup-iters (100) must be below"),
        ("--num-attention-heads 6 --num-query-groups 4", 1, "must be a multiple of num_query_groups (4)"),
        ("--kv-channels 15", 1, "kv_channels (15) must be even"),
        ("--model tinny", 1, "did you mean tiny?"),
        ("--model no/such/config.json", 1, "there is no file no/such/config.json"),
        ("--model llama-3.2-1b --tokenizer-vocab-size 128257", 1, "must not be above the model's vocabulary (128256)"),
        ("--tokenizer-type huggingface", 1, "needs --tokenizer-model"),
        ("--eval-samples 16", 1, "needs --eval-temperature above 0"),
        ("--run-dir=", 1, "--run-dir must not be empty"),
    ],
)
def test_bad_values_name_the_flag_and_the_fix(argv, world_size, message):
    config = parse_args(argv.split())
    with pytest.raises(UserError) as raised:
        validate_training(config, world_size)
    assert message in str(raised.value)


def test_bounds_and_readers_name_real_settings_and_estimators():
    assert set(READ_BY) <= set(SETTINGS)
    estimators = set(typing.get_args(SETTINGS["estimator"][1])) - set(ALIASES)
    assert all(set(readers) < estimators for readers in READ_BY.values())


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ("--estimator garl --num-resamples 3", "--num-resamples is for --estimator paft alone, not garl"),
        ("--estimator rloo --grpo-kl-beta 0.1", "--grpo-kl-beta is for --estimator grpo alone, not rloo"),
        ("--estimator sft --eod-mask-loss", "--eod-mask-loss is for --estimator pretrain alone, not sft"),
        ("--estimator verifree --data-path text", "--data-path is for --estimator pretrain alone, not garl"),
    ],
)
def test_training_refuses_what_is_another_estimators_and_evaluation_lets_it_be(flags, refused):
    """An evaluation of a run's checkpoint has that run's settings."""
    config = parse_args(flags.split())
    with pytest.raises(UserError) as raised:
        validate_training(config, 1)
    assert refused in str(raised.value)
    validate(config, 1)


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        ("--estimator grpo --q 0.5 --no-normalize", "not read by --estimator grpo: --q, --no-normalize"),
        (
            "--estimator sft --num-rationales 1 --top-p 0.5 --score-with rollout",
            "sft: --top-p, --score-with",
        ),
        ("--estimator garl --rationale-field why", "not read by --estimator garl: --rationale-field"),
        ("--estimator paft --q 0.5 --temperature 0.5", None),
    ],
)
def test_what_an_estimator_does_not_read_may_stay_for_another_and_is_told(flags, note):
    config = parse_args(flags.split())
    validate_training(config, 1)
    told = unread_note("train", config, PRESETS["tiny"])
    assert note in told if note else told is None


def test_each_estimator_takes_every_setting_that_it_reads():
    changed = {
        "q": "0.5", "q_schedule": "step", "q_final": "0", "q_schedule_iters": "9", "num_resamples": "3",
        "temperature": "0.5", "score_with": "rollout", "rationale_field": "why", "rationale_budget": "9",
        "grpo_iterations": "2", "match": "substring", "seq_length": "9",
    }  # fmt: skip
    for estimator in ("garl", "paft", "grpo", "rloo", "maxrl", "star", "sft", "pretrain"):
        read = [name for name in changed if estimator in READ_BY[name]]
        flags = [word for name in read for word in (f"--{name.replace('_', '-')}", changed[name])]
        corpus = ["--data-path", "p", "--tokenizer-model", "m"] if estimator == "pretrain" else []
        validate_training(parse_args(["--estimator", estimator, *flags, *corpus]), 1)


def test_all_problems_are_told_at_once():
    config = parse_args("--q 2 --num-rationales 1 --train-iters 0 --pipeline-model-parallel-size 3".split())
    with pytest.raises(UserError) as raised:
        validate(config, 4)
    assert [line.split()[0] for line in str(raised.value).splitlines()] == [
        "--q",
        "--train-iters",
        "--num-rationales",
        "--pipeline-model-parallel-size",
        "4",
    ]


def test_an_unknown_number_of_processes_leaves_out_only_its_own_checks():
    validate(parse_args(["--tensor-model-parallel-size", "2"]), None)
    with pytest.raises(UserError, match="does not divide num_query_groups"):
        validate(parse_args(["--tensor-model-parallel-size", "4"]), None)


@pytest.mark.parametrize("argv", [[], ["--estimator", "paft", "--num-rationales", "1"], ["--q", "0"], ["--q", "1"]])
def test_good_configurations_pass(argv):
    validate(parse_args(argv), 1)


@pytest.mark.parametrize(
    ("argv", "world_size"),
    [
        ("--expert-model-parallel-size 2", 2),
        ("--expert-model-parallel-size 2", 4),
        ("--expert-model-parallel-size 2 --pipeline-model-parallel-size 2", 4),
        (f"--expert-model-parallel-size 2 --expert-tensor-parallel-size 1 --sequence-parallel {TP2}", 2),
        (f"--expert-model-parallel-size 2 --sequence-parallel {TP2}", 4),
        (f"--sequence-parallel --ffn-hidden-size 33 {TP2}", 2),  # the dense block's width is not used
    ],
)
def test_layouts_of_experts_pass(argv, world_size):
    validate(parse_args(["--model", "tiny-moe", *argv.split()]), world_size)


def test_derived_values():
    config = parse_args(
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --prompts-per-step 6 --num-rationales 4 "
        "--estimator paft --q-schedule step --q-final 0 --q-schedule-iters 30 --bf16 --num-layers 4 "
        "--untie-embeddings-and-output-weights".split()
    )
    derived = derive(config, 8)
    assert (derived.data_parallel_size, derived.rationales_per_step) == (2, 24)
    assert (derived.num_resamples, derived.q_schedule_iters, derived.lr_decay_iters) == (4, 30, 100)
    assert (derived.samples_answers, derived.params_dtype) == (False, "bfloat16")
    expected = dataclasses.replace(PRESETS["tiny"], num_layers=4, tie_embeddings=False)
    assert derived.architecture == expected
    assert derive(parse_args(["--estimator", "grpo"]), 1).samples_answers


def test_an_architecture_file_is_resolved_like_a_preset(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(architecture_to_toml(PRESETS["llama-3.2-1b"]))
    assert derive(parse_args(["--model", str(path)]), 1).architecture == PRESETS["llama-3.2-1b"]


def test_user_errors_become_one_line_each_with_the_rank_and_exit_code_2(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["train", "--q", "2", "--train-iters", "0"]) == 2
    assert capsys.readouterr().err == (
        "megatron-jq: error: --q must lie between 0 and 1, not 2.0\n"
        "megatron-jq: error: --train-iters must be at least 1, not 0\n"
    )
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "[rank 3] megatron-jq: error: unknown command trian; did you mean train?\n"
    assert main([]) == 2
    assert "a command must follow" in capsys.readouterr().err


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    said = capsys.readouterr().out
    assert re.fullmatch(r"megatron-jq 0\.1\.0 \(megatron-core \S+, torch \S+, Python \S+\)\n", said)
    assert main(["--help"]) == 0
    assert "megatron-jq train" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in shown for name in SETTINGS)
    assert "--config FILE" in shown


def test_the_command_line_imports_nothing_heavy():
    code = (
        "import json, sys\n"
        "from megatron_jq.cli.main import main\n"
        "main(['train', '--q', '2'])\n"
        "print(json.dumps(sorted({'torch', 'megatron', 'matplotlib'} & set(sys.modules))))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
    assert "--q must lie between 0 and 1" in done.stderr


#: By the paper's poles: which estimator at which q a published method is.
PUBLISHED = [("rb-rloo", "garl", 0.0), ("verifree", "garl", 0.0), ("iwae", "garl", 1.0), ("trice", "paft", 1.0)]


def test_every_published_name_is_listed_here():
    assert sorted(name for name, _, _ in PUBLISHED) == sorted(ALIASES)


@pytest.mark.parametrize(("name", "estimator", "q"), PUBLISHED)
def test_a_published_name_is_an_estimator_at_a_q(name, estimator, q):
    assert parse_args(["--estimator", name]) == parse_args(["--estimator", estimator, "--q", str(q)])
    with pytest.raises(UserError, match=f"--estimator {name} is {estimator} at q = {q:g}"):
        parse_args(["--estimator", name, "--q", "0.5"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--q-schedule linear --q-final 0", None),
        ("--q-schedule linear --q-final 0 --q-schedule-iters 99", None),
        ("--q-schedule cosine --q-final 0 --q-schedule-iters 100", "q does not reach --q-final 0"),
        ("--lr-decay-style linear", None),
        ("--lr-decay-style linear --lr-decay-iters 100", None),
        ("--lr-decay-style cosine --lr-decay-iters 60", "steps 60 to 99 train at rate 0"),
        ("--lr-decay-style cosine --lr-decay-iters 60 --min-lr 1e-5", None),
        ("--lr-decay-style linear --lr-decay-iters 200", "does not reach --min-lr 0"),
        ("--lr-decay-iters 60", None),
    ],
)
def test_a_schedule_that_misses_its_end_or_wastes_steps_is_said(flags, said):
    notes = schedule_notes(parse_args(flags.split()))
    assert (said is None and not notes) or (len(notes) == 1 and said in notes[0])
