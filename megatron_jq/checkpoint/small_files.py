"""F4: what lies beside the weights of an exported folder: config.json, generation_config.json, the tokenizer, a README.

A checkpoint that no run wrote passes on what it came with, byte for byte. A run ends its texts with its tokenizer's end
of text: that stands first in both files, so that `generate()` and servers stop where the run does.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_jq.architecture import Architecture
from megatron_jq.architecture_files import read_hugging_face_config
from megatron_jq.checkpoint import folder as folders
from megatron_jq.checkpoint.folder import TOKENIZER, Manifest
from megatron_jq.checkpoint.huggingface import CONFIG, read_json
from megatron_jq.checkpoint.tokenizer_export import check_with_transformers, forgeable, sentencepiece_files
from megatron_jq.config import settings_of_text
from megatron_jq.data.rationale_markers import MarkerChoice
from megatron_jq.data.tokenizers import SentencePieceTokenizer, Tokenizer, load_tokenizer
from megatron_jq.errors import UserError
from megatron_jq.files import inside
from megatron_jq.model.hf_config import hugging_face_config, with_token_ids

GENERATION, README = "generation_config.json", "README.md"


@dataclass(frozen=True)
class Companions:
    """What an export writes beside the weights, determined before they are written.

    dtype: of the weights. tokenizer: the run's; None where no run wrote the checkpoint. converted: name → text of the
    files that its sentencepiece model becomes. with_tokenizer: whether a tokenizer goes along. notes: lines for
    the user.
    """

    checkpoint: Path
    manifest: Manifest
    architecture: Architecture
    dtype: torch.dtype
    files: tuple[Path, ...]  # of the checkpoint's tokenizer folder
    tokenizer: Tokenizer | None
    with_tokenizer: bool
    converted: dict[str, str]
    notes: tuple[str, ...]


def companions(
    checkpoint: Path, manifest: Manifest, architecture: Architecture, dtype: torch.dtype, *, with_tokenizer: bool
) -> Companions:
    """UserError: the run's tokenizer has no form that transformers reads with the same ids, and is wanted."""
    carried = checkpoint / TOKENIZER
    # What the manifest lists was verified; what else lies there need not be the run's, or a link to anywhere.
    listed = sorted(name for name in manifest.files if name.startswith(f"{TOKENIZER}/"))
    paths = [inside(checkpoint, name, checkpoint / folders.MANIFEST) for name in listed]
    files = tuple(path for path in paths if path.parent == carried)
    tokenizer: Tokenizer | None = None
    converted: dict[str, str] = {}
    notes: list[str] = []
    if manifest.config is not None:
        names = {path.name for path in files}
        d = settings_of_text(manifest.config, f"{checkpoint}: its settings").data
        choice = MarkerChoice(d.think_open, d.think_close, or_end_of_turn=True)
        model = carried / "tokenizer.model"
        try:
            if "tokenizer.json" in names:
                tokenizer = load_tokenizer("huggingface", carried, choice)
            elif "tokenizer.model" in names:
                tokenizer = load_tokenizer("sentencepiece", model, choice)
        except UserError as error:
            if with_tokenizer:
                raise
            notes.append(f"no token that ends a text is written into config.json: {error}")
        if isinstance(tokenizer, SentencePieceTokenizer) and with_tokenizer:
            converted, note = sentencepiece_files(tokenizer, model, architecture.max_position_embeddings)
            notes += [note] * bool(note)
    beside = Companions(
        checkpoint, manifest, architecture, dtype, files, tokenizer, with_tokenizer, converted, tuple(notes)
    )
    if converted and tokenizer is not None:
        with tempfile.TemporaryDirectory() as scratch:
            _write_tokenizer(beside, Path(scratch))
            check_with_transformers(tokenizer, Path(scratch), strict=True)
    return beside


def write_companions(beside: Companions, target: Path, log: Callable[[str], None]) -> None:
    """Write them into a folder that holds the weights. log: gets lines for the user."""
    _write_tokenizer(beside, target)
    if beside.tokenizer is None:
        for note in beside.notes:
            log(f"note: {note}")
        return
    _write_generation(beside, target)
    notes = list(beside.notes)
    if beside.with_tokenizer:
        note = "" if beside.converted else check_with_transformers(beside.tokenizer, target, strict=False)
        notes += [note] * bool(note)
        names = ", ".join(forgeable(beside.tokenizer, target)[:6])
        notes.append(
            f"in the exported tokenizer a text that spells {names} or another special token gives that token, which no "
            "text can in a run: escape what users write (transformers: apply_chat_template(..., "
            "sanitize_control_tokens=True))"
        )
    else:
        notes.append("the tokenizer is not exported (--no-tokenizer)")
    for note in notes:
        log(f"note: {note}")
    (target / README).write_text(_readme(beside, notes), encoding="utf-8")


def _write_tokenizer(beside: Companions, target: Path) -> None:
    """The tokenizer's files and config.json, by which transformers chooses the tokenizer's class."""
    for path in beside.files:
        if path.name == GENERATION or (beside.with_tokenizer and path.name != CONFIG and not beside.converted):
            shutil.copyfile(path, target / path.name)
    for name, text in beside.converted.items():
        (target / name).write_text(text, encoding="utf-8")
    _write_config(beside, target, str(beside.dtype).removeprefix("torch."))


def says(config: Path, architecture: Architecture) -> bool:
    """Whether a config.json describes this architecture, but for what is used in training alone."""
    described = read_hugging_face_config(config)
    training = {"init_method_std": architecture.init_method_std, "moe_aux_loss_coeff": architecture.moe_aux_loss_coeff}
    if architecture.num_experts is None:
        names = ("moe_ffn_hidden_size", "moe_router_topk", "moe_norm_topk_prob")
        training |= {name: getattr(architecture, name) for name in names}
    return replace(described, **training) == architecture


def _write_config(beside: Companions, target: Path, dtype: str) -> None:
    """As it came where it still describes the weights and the run's tokens."""
    carried, original = beside.checkpoint / TOKENIZER / CONFIG, None
    described = False
    if carried in beside.files and _is_understood(carried):
        original = read_json(carried)
        described = (original.get("dtype") or original.get("torch_dtype")) == dtype and says(
            carried, beside.architecture
        )
    config = (
        original if described and original is not None else hugging_face_config(beside.architecture, dtype, original)
    )
    if beside.tokenizer is not None:
        config = _with_ids(config, beside)
    if config == original:
        shutil.copyfile(carried, target / CONFIG)
    else:
        (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_generation(beside: Companions, target: Path) -> None:
    path = target / GENERATION
    original = read_json(path) if path.exists() else None
    config = {name: value for name, value in _with_ids(original or {}, beside).items() if value is not None}
    if config != original:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _with_ids(config: dict[str, Any], beside: Companions) -> dict[str, Any]:
    tokenizer, vocab_size = beside.tokenizer, beside.architecture.vocab_size
    assert tokenizer is not None and vocab_size is not None
    try:
        bos = tokenizer.bos_ids("on")[0]
    except UserError:
        bos = None
    ids = {"eos_token_id": tokenizer.eos_id, "bos_token_id": bos, "pad_token_id": tokenizer.pad_id}
    return with_token_ids(config, ids, vocab_size)


def _is_understood(config: Path) -> bool:
    """Whether it can be read: a tokenizer's folder may hold another family's config.json, in place of the policy's."""
    try:
        read_hugging_face_config(config)
    except UserError:
        return False
    return True


def _readme(beside: Companions, notes: list[str]) -> str:
    tokenizer, text = beside.tokenizer, beside.manifest.config
    assert tokenizer is not None and text is not None, "a run's checkpoint has both"
    d = settings_of_text(text, f"{beside.checkpoint}: its settings").data
    opens = "" if tokenizer.think_open is None else f", then `{tokenizer.think_open}`"
    end = f"token {tokenizer.eos_id}, {tokenizer.piece(tokenizer.eos_id)!r}"
    return "\n".join(
        [
            f"# Exported by megatron-jq, step {beside.manifest.step}",
            "",
            f"Texts end with {end}: `eos_token_id` in config.json and generation_config.json.",
            f"The run wrote prompts with `--prompt-style {d.prompt_style} --add-bos-token {d.add_bos_token}`: the "
            f"prompt{opens}; a rationale; `{tokenizer.think_close}`; the answer; the end.",
            "",
            *(f"- {note}" for note in notes),
            "",
        ]
    )
