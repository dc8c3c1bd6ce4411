"""What a path that a user gives is taken for: a model, a folder that moved, the home directory, a tokenizer.

Why: a folder's name with a slip must not end in a preset's random weights, nor `--run-dir=~/runs` in a folder called ~.
"""

import os
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from megatron_jq.architecture import PRESETS
from megatron_jq.architecture_files import has_weights, load_architecture
from megatron_jq.cli.parser import as_path
from megatron_jq.config import PATHS, SETTINGS, Config, parse_args, with_home
from megatron_jq.data.dataset import train_tokenizer
from megatron_jq.data.tokenizer_choice import kind_of, resolved, tokenizer_in
from megatron_jq.errors import UserError
from tests.unit.hf_folders import make

#: --model → what the error says, and what it must not say.
MODELS = {
    "tinny": ("no such preset", "did you mean tiny?"),
    "Qwen/Qwen3-0.6B": (
        "Nothing is downloaded",
        "hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B",
        "random weights",
    ),
    "mistralai/Mistral-7B-v0.3": ("there is no such folder", "Nothing is downloaded"),
    "/data/models/qwen3": ("there is no such file or folder; was it moved?",),
    "./qwen3-0.6b": ("there is no such file or folder; was it moved?",),
    "models/x/y": ("there is no such file or folder; was it moved?",),
    "~nobody/qwen": ("there is no such file or folder",),
    "no/such/config.json": ("there is no file no/such/config.json",),
    "shape.toml": ("there is no file shape.toml",),
    "zzz": ("no such preset", "give a path that exists"),
}


@pytest.mark.parametrize("model", MODELS)
def test_a_model_that_is_not_there_is_told_as_what_it_looks_like(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        load_architecture(model)
    assert str(raised.value).startswith(f"--model {model}: ")
    assert all(words in str(raised.value) for words in MODELS[model]), raised.value
    assert not has_weights(model)


def test_a_folder_that_is_no_model_says_what_it_is(tmp_path):
    (tmp_path / "run" / "iter_0000010").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no config.json: it is a folder of checkpoints; give it to --load"):
        load_architecture(str(tmp_path / "run"))
    with pytest.raises(UserError, match="holds no config.json; name a Hugging Face folder"):
        load_architecture(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "weighs"),
    [
        ("model.safetensors", True),
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("pytorch_model.bin", True),
        ("consolidated.00.pth", True),
        ("training_args.bin", False),
        ("tokenizer.json", False),
    ],
)
def test_weights_in_any_form_make_a_folder_no_mere_shape(file, weighs, tmp_path, monkeypatch):
    """Those that cannot be read are refused where they are opened; none is passed over for random ones."""
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert not has_weights(str(tmp_path))
    (tmp_path / file).write_bytes(b"")
    assert has_weights(str(tmp_path)) == weighs
    assert not has_weights(str(tmp_path / "config.json"))  # the file: its shape alone is asked for
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "model.safetensors").write_bytes(b"")
    assert not has_weights("tiny") and "tiny" in PRESETS


@given(st.sampled_from(PATHS), st.text("a/~.", max_size=6))
def test_a_leading_tilde_is_the_home_directory_in_every_path(name, rest):
    home, flag = os.path.expanduser("~"), f"--{name.replace('_', '-')}"

    def value(text: str) -> str:
        return getattr(getattr(parse_args([f"{flag}={text}"]), SETTINGS[name][0]), name)

    assert value(f"~/{rest}") == f"{home}/{rest}"
    assert value(f"x~/{rest}") == f"x~/{rest}"
    assert as_path(f"~/{rest}") == Path(f"{home}/{rest}")


def test_every_setting_that_is_a_path_is_among_them(tmp_path):
    """By its comment or its name; one that is missing here would make a folder called ~."""
    words = ("_dir", "_path", "_data", "_model", "_template", "save", "load")
    by_name = {n for n, (_, kind) in SETTINGS.items() if n.endswith(words) and "str" in str(kind)}
    assert by_name <= set(PATHS), f"add to config.PATHS: {by_name - set(PATHS)}"
    (tmp_path / "a.toml").write_text("run_dir = '~/runs'\n", encoding="utf-8")
    config = parse_args(["--config", str(tmp_path / "a.toml")])
    assert config.training.run_dir == os.path.expanduser("~/runs")
    assert with_home(Config()) == Config()


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ours") / "tokenizer.model"
    train_tokenizer("builtin:recall", [], path, vocab_size=None)
    return path


def test_what_a_tokenizers_folder_holds_need_not_be_said(ours, tmp_path):
    folder = make(tmp_path / "hf")
    assert kind_of("sentencepiece", folder) == ("huggingface", folder)
    assert kind_of("sentencepiece", folder / "tokenizer.json") == ("huggingface", folder)
    assert kind_of("huggingface", folder) == ("huggingface", folder)
    assert kind_of("sentencepiece", ours) == ("sentencepiece", ours)
    assert kind_of("sentencepiece", ours.parent) == ("sentencepiece", ours)
    assert kind_of("sentencepiece", tmp_path / "none") == ("sentencepiece", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert kind_of("sentencepiece", tmp_path / "empty") == ("sentencepiece", tmp_path / "empty")
    assert tokenizer_in(tmp_path / "empty") is None
    data = parse_args(["--tokenizer-model", str(folder)]).data
    assert resolved(data).tokenizer_type == "huggingface" and resolved(Config().data) == Config().data


def test_of_two_kinds_in_one_folder_ours_is_ours_and_theirs_theirs(ours, tmp_path):
    """An export of ours holds both; a Llama's or Mistral's folder often holds the model that its JSON was made from."""
    folder = make(tmp_path / "hf")
    (folder / "tokenizer.model").write_bytes(ours.read_bytes())
    assert tokenizer_in(folder) == ("sentencepiece", folder / "tokenizer.model")
    (tmp_path / "text").write_text("some words for a model\n" * 30, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "plain"), vocab_size=16, minloglevel=2
    )
    (folder / "tokenizer.model").write_bytes((tmp_path / "plain.model").read_bytes())
    assert tokenizer_in(folder) == ("huggingface", folder)
    (folder / "tokenizer.model").write_bytes(b"no model")
    assert tokenizer_in(folder) == ("huggingface", folder)
