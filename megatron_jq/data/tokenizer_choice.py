"""F2: which tokenizer a folder or file holds, so that nobody has to say what can be seen."""

from dataclasses import replace
from pathlib import Path

from megatron_jq.config import Config, DataConfig
from megatron_jq.data.gguf_files import gguf_in
from megatron_jq.data.prepared import is_prepared, manifest_of
from megatron_jq.data.rationale_markers import NO_OPENER, MarkerChoice
from megatron_jq.data.tokenizers import Tokenizer
from megatron_jq.errors import UserError
from megatron_jq.formats.markers import THINK_CLOSE, THINK_OPEN

SENTENCEPIECE, HUGGING_FACE = "sentencepiece", "huggingface"
_MODEL, _JSON = "tokenizer.model", "tokenizer.json"


def kind_of(kind: str, path: str | Path) -> tuple[str, Path]:
    """(kind, path) of --tokenizer-type and --tokenizer-model: a folder is never a sentencepiece model, nor a model file
    a folder, and a GGUF file is Hugging Face's kind; what cannot be told stays as it is, for load_tokenizer to refuse
    by its name.
    """
    path = Path(path)
    if path.is_dir() and kind == SENTENCEPIECE and (inner := tokenizer_in(path)) is not None:
        return inner
    if not (path / _JSON).is_file() and (gguf := gguf_in(path, "--tokenizer-model")) is not None:
        return HUGGING_FACE, gguf
    if path.name == _JSON and path.is_file():
        return HUGGING_FACE, path.parent
    return kind, path


def resolved(data: DataConfig) -> DataConfig:
    """The same settings with kind_of's kind and path."""
    if data.tokenizer_model is None:
        return data
    kind, path = kind_of(data.tokenizer_type, data.tokenizer_model)
    return replace(data, tokenizer_type=kind, tokenizer_model=str(path))


def marker_choice(config: Config, source: str | None = None, flag: str = "--train-data") -> MarkerChoice:
    """What opens and closes a rationale by the settings, or else by `source` where that is a prepared set."""
    d = config.data
    if source is not None and is_prepared(source):
        manifest = manifest_of(source, flag)
        return MarkerChoice(d.think_open or manifest.think_open, d.think_close or manifest.think_close)
    return MarkerChoice(d.think_open, d.think_close, or_end_of_turn=d.prompt_style == "warm")


def with_markers(config: Config, tokenizer: Tokenizer) -> Config:
    """The settings with the names of the tokens that open and close a rationale, for a checkpoint to keep."""
    names = {"think_open": tokenizer.think_open or NO_OPENER, "think_close": tokenizer.think_close}
    return replace(config, data=replace(config.data, **names))


def tokenizer_in(folder: Path) -> tuple[str, Path] | None:
    """(kind, path) of a checkpoint's or a Hugging Face folder's tokenizer; None where it holds none.

    Where both kinds lie there, sentencepiece's is the one to use if it knows `<think>`: it is one of ours, the other
    its export. Otherwise it is what the Hugging Face one was once made from, without the tokens that came later.
    """
    model, fast = folder / _MODEL, folder / _JSON
    if model.is_file() and (not fast.is_file() or _knows_rationales(model)):
        return SENTENCEPIECE, model
    return (HUGGING_FACE, folder) if fast.is_file() else None


def _knows_rationales(model: Path) -> bool:
    import sentencepiece

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError, UserError):
        return False
    return all(pieces.is_control(pieces.piece_to_id(piece)) for piece in (THINK_OPEN, THINK_CLOSE))
