"""F4: a GGUF file in the place of a Hugging Face folder: weights unpacked to float32, row by row as they are asked for.

The families are those of model/hf.py. llama.cpp turns the rows of a Llama's queries and keys within each head, for a
rotation of neighbours instead of halves: here they are turned back. What a value is after unpacking is the `gguf`
package's word (ggml's own reference); float32 holds it exactly.
"""

import contextlib
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import torch

from megatron_jq.architecture import Architecture, RopeScaling
from megatron_jq.architecture_files import read_hugging_face_config
from megatron_jq.checkpoint.huggingface import CONFIG, HuggingFaceReader, Signature, WeightReader
from megatron_jq.data.gguf_files import GgufFile, gguf_in, read_gguf
from megatron_jq.data.gguf_tokenizer import tokenizer_files
from megatron_jq.errors import UserError
from megatron_jq.model.hf import hugging_face_tensors
from megatron_jq.model.hf_config import CLASSES
from megatron_jq.model.rotary import RotaryAt

#: llama.cpp's name of a family → model_type. Mistral's files are Llama's.
_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe"}
#: config.json → the file's key after the family's name. The second line's may be missing.
_SIZES = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
_EXPERTS = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
_ROPE_FREQUENCIES = "rope_freqs.weight"
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError("GGUF files need: pip install megatron-jq[hf]") from error
    return gguf


class GgufReader:
    """Reads as HuggingFaceReader does: `signature` and `read`. UserError where the file has not the family's tensors,
    or one of a type that is not unpacked.

    config: what config.json would say.
    """

    def __init__(self, file: GgufFile, flag: str):
        self.file, self._library, self.folder = file, _gguf(), file.path
        self.config = _config(file, flag)
        if _ROPE_FREQUENCIES in file.tensors:
            self.config["rope_scaling"] = self._rope_scaling()
        #: Hugging Face's name → (the file's name, expert)
        self._places: dict[str, tuple[str, int | None]] = {}
        self.signature: Signature = {}

    def list_tensors(self, architecture: Architecture) -> None:
        """Fill `signature` with the tensors of an architecture."""
        kind = getattr(self._library.MODEL_ARCH, self.file.architecture.upper())
        names = self._library.get_tensor_name_map(kind, architecture.num_layers)
        for tensor in hugging_face_tensors(architecture):
            expert = _EXPERT.search(tensor.name)
            name = names.get_name(_EXPERT.sub(".experts.", tensor.name), try_suffixes=(".weight", ".bias"))
            self._places[tensor.name] = name, None if expert is None else int(expert[1])
        expected, present = {name for name, _ in self._places.values()}, self.file.tensors.keys() - {_ROPE_FREQUENCIES}
        for what, others in (("lacks", expected - present), ("has unexpected", present - expected)):
            if others:
                raise UserError(
                    f"{self.folder} {what} tensors, {len(others)} in all: {', '.join(sorted(others)[:3])}; it is not "
                    f"the {self.file.architecture} model that its keys describe, or a variant that is not converted"
                )
        size = self.folder.stat().st_size
        for name, (stored, expert) in self._places.items():
            tensor = self.file.tensors[stored]
            if tensor.start + math.prod(tensor.shape[:-1]) * self._row_bytes(stored) > size:
                raise UserError(f"{self.folder} ends within {stored}; download it again")
            self.signature[name] = tensor.shape if expert is None else tensor.shape[1:], torch.float32

    def _rope_scaling(self) -> dict[str, Any]:
        """Llama 3's scaling, of which the file has what each frequency is divided by. UserError for other divisors."""
        stored, size = self.file.tensors[_ROPE_FREQUENCIES], self.config["head_dim"]
        divisors = self._unpacked(_ROPE_FREQUENCIES, torch.zeros(1, dtype=torch.int64)).view(-1)
        scaling = RopeScaling(factor=float(divisors.max()))
        plain, scaled = (
            RotaryAt(size, self.config["rope_theta"], rule, divisors.device).inverse_frequency
            for rule in (None, scaling)
        )
        if stored.shape != plain.shape or not torch.allclose(divisors, plain / scaled, rtol=1e-3):
            raise UserError(
                f"{self.folder}: {_ROPE_FREQUENCIES} is no scaling of Llama 3's (factor {scaling.factor:g}, context "
                f"{scaling.original_max_position_embeddings}); such a model is not converted"
            )
        return {"rope_type": "llama3", **asdict(scaling)}

    def _row_bytes(self, stored: str) -> int:
        """Bytes of a row. UserError for a type without a way to unpack it."""
        tensor = self.file.tensors[stored]
        try:
            kind = self._library.GGMLQuantizationType(tensor.kind)
            elements, block_bytes = self._library.GGML_QUANT_SIZES[kind]
            row_bytes = tensor.shape[-1] // elements * block_bytes
            self._library.dequantize(numpy.zeros((1, row_bytes), dtype=numpy.uint8), kind)
        except (ValueError, KeyError, NotImplementedError) as error:
            known = {int(kind): kind.name for kind in self._library.GGMLQuantizationType}
            raise UserError(
                f"{self.folder}: {stored} has type {known.get(tensor.kind, tensor.kind)}, which the gguf package "
                "cannot unpack; take the model's F16 or Q8_0 file, or a newer package: pip install -U gguf"
            ) from error
        return row_bytes

    def read(self, name: str, rows: tuple[int, int], columns: tuple[int, int] | None = None) -> torch.Tensor:
        """Return rows [start, end) of a tensor and, of a matrix, columns [start, end), in float32."""
        stored, expert = self._places[name]
        shape = self.file.tensors[stored].shape
        if len(shape) == 1:
            return self._unpacked(stored, torch.zeros(1, dtype=torch.int64)).view(-1)[slice(*rows)]
        index = torch.arange(*rows) + (0 if expert is None else expert * shape[-2])
        if self.file.architecture == "llama" and name.endswith((".q_proj.weight", ".k_proj.weight")):
            # Row j of a head's first half lies at 2j, of its second half at 2j + 1.
            size = self.config["head_dim"]
            within, half = index % size, size // 2
            index = index - within + 2 * (within % half) + within // half
        block = self._unpacked(stored, index)
        return block if columns is None else block[:, slice(*columns)]

    def _unpacked(self, stored: str, index: torch.Tensor) -> torch.Tensor:
        """Rows of a tensor, of all its matrices in a row, in float32."""
        tensor, row_bytes = self.file.tensors[stored], self._row_bytes(stored)
        try:
            content = numpy.memmap(  # let go of after this call
                self.folder, mode="r", offset=tensor.start, shape=(math.prod(tensor.shape[:-1]), row_bytes)
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder}: {stored} cannot be read: {error}; has the file been changed?") from error
        rows = numpy.ascontiguousarray(content[index.numpy()])
        values = self._library.dequantize(rows, self._library.GGMLQuantizationType(tensor.kind))
        return torch.from_numpy(numpy.array(values, dtype=numpy.float32))


@contextlib.contextmanager
def hugging_face_source(source: Path, flag: str, log: Callable[[str], None]) -> Iterator[tuple[Path, WeightReader]]:
    """A folder with config.json and the tokenizer's files, and what reads the weights.

    source: a Hugging Face folder, itself, or a GGUF file (or a folder that holds one), for the time of the block made
    into such a folder of small files. log: gets a line where the tokenizer is left out. UserError: see the readers.
    """
    path = gguf_in(source, flag)
    if path is None:
        yield source, HuggingFaceReader(source, flag)
        return
    file = read_gguf(path, flag)
    reader = GgufReader(file, flag)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / CONFIG).write_text(json.dumps(reader.config, indent=2) + "\n", encoding="utf-8")
        try:
            reader.list_tensors(read_hugging_face_config(folder / CONFIG))
        except UserError as error:
            raise UserError(str(error).replace(str(folder / CONFIG), str(path))) from error
        try:
            for name, text in tokenizer_files(file).items():
                (folder / name).write_text(text, encoding="utf-8")
        except UserError as error:
            log(f"note: the checkpoint gets no tokenizer: {error}")
        yield folder, reader


def _config(file: GgufFile, flag: str) -> dict[str, Any]:
    """config.json of the file's model. UserError for another family, or a key that describes what is not converted."""
    family, values = file.architecture, file.values
    kind = _FAMILIES.get(family)
    if kind is None or (family == "llama" and values.get("llama.expert_count", 0)):
        experts = " with experts" if kind is not None else ""
        raise UserError(
            f"{flag} {file.path} holds a model of the family {family!r}{experts}; these are converted: "
            f"{', '.join(_FAMILIES)} (Mistral's files are of llama)"
        )

    def value(key: str, default: Any = None) -> Any:
        result = values.get(f"{family}.{key}", default)
        if isinstance(result, list) or result is None:
            is_missing = "is missing" if result is None else "differs from layer to layer"
            raise UserError(f"{flag} {file.path}: {family}.{key} {is_missing}; such a model is not converted")
        return result

    config = {name: value(key) for name, key in _SIZES.items()}
    heads = config["num_attention_heads"]
    config |= {
        "model_type": kind,
        "architectures": [CLASSES[kind]],
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": value("attention.key_length", config["hidden_size"] // max(1, heads)),
        "rms_norm_eps": _decimal(value("attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(value("rope.freq_base", 10000.0)),
        "vocab_size": len(values.get("tokenizer.ggml.tokens", ())),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "float32",
        **{f"{name}_token_id": values.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")},
        "pad_token_id": values.get("tokenizer.ggml.padding_token_id"),
    }
    size = config["head_dim"]
    for key, only in {
        "rope.scaling.type": "none", "rope.dimension_count": size, "attention.value_length": size,
        "attention.sliding_window": 0,
    }.items():  # fmt: skip
        if value(key, only) != only:
            raise UserError(f"{flag} {file.path}: {family}.{key} = {value(key)} is not converted, only {only}")
    if (embedding := file.tensors.get("token_embd.weight")) is not None:  # may have more rows than there are pieces
        config["vocab_size"] = embedding.shape[0]
    if kind == "qwen3_moe":
        config |= {name: value(key) for name, key in _EXPERTS.items()} | {"norm_topk_prob": True}
    return config


def _decimal(value: float) -> float:
    """The shortest number that the file's float32 stands for: 1e-05, not 9.999999747e-06."""
    return float(str(numpy.float32(value)))
