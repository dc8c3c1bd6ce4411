"""F1: architectures from files: TOML, Hugging Face's config.json, and the folders that --model names."""

import json
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megatron_jq.architecture import PRESETS, Architecture, RopeScaling, architecture_problems
from megatron_jq.errors import UserError
from megatron_jq.toml_files import did_you_mean, format_table, read_toml

HUGGING_FACE_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")


def load_architecture(model: str) -> Architecture:
    """Read --model: a preset's name, an architecture TOML, a Hugging Face config.json, or a folder that holds one.

    UserError for anything else.
    """
    if model in PRESETS:
        return PRESETS[model]
    path = Path(model)
    refuse_gguf(path, "--model", " --model FOLDER/iter_0000000/tokenizer/config.json")
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise UserError(f"--model {model}: the folder holds no config.json{_instead_of_a_model(Path(model))}")
    elif not path.is_file():
        raise UserError(f"--model {model}: {_not_there(model)}")
    if path.suffix not in (".toml", ".json"):
        raise UserError(f"--model {model}: a file must end in .toml or .json")
    return read_architecture_toml(path) if path.suffix == ".toml" else read_hugging_face_config(path)


def has_weights(model: str) -> bool:
    """Return whether --model names a Hugging Face folder with weights, in whatever form: a run begins with them."""
    path = Path(model)
    if model in PRESETS or not path.is_dir():
        return False
    return any(next(path.glob(pattern), None) is not None for pattern in _WEIGHTS)


#: Files that hold weights, as Hugging Face folders have them. Only safetensors are read; a folder of others is refused.
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "*.pt", "*.pth", "*.gguf")


def refuse_gguf(path: Path, flag: str, others: str = "") -> None:
    """UserError where a path is a GGUF file, or a folder with such weights alone: they are read by `convert` only.

    others: flags to give beside --load.
    """
    in_folder = path.is_dir() and next(path.glob("*.gguf"), None) and not next(path.glob("*.safetensors*"), None)
    if path.suffix == ".gguf" or in_folder:
        raise UserError(
            f"{flag} {path}: GGUF files are converted first: megatron-jq convert hf-to-megatron --hf {path} "
            f"--save FOLDER; then give --load FOLDER{others}"
        )


def _instead_of_a_model(folder: Path) -> str:
    if next(folder.glob("iter_*"), None) is not None or (folder / "checkpoint.json").is_file():
        return ": it is a folder of checkpoints; give it to --load, and to --model the architecture"
    return "; name a Hugging Face folder, or an architecture .toml"


def _not_there(model: str) -> str:
    """Describe a --model that is neither a preset nor there, and the fix."""
    presets, path = ", ".join(PRESETS), Path(model)
    if path.suffix in (".toml", ".json"):
        return f"there is no file {path}"
    name = model.rpartition("/")[2].lower()
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):  # as the hub names a model, or a folder that was moved
        preset = f"; the preset {name} has its shape, with random weights" if name in PRESETS else ""
        return (
            f"there is no such folder. Nothing is downloaded: for the model of the Hugging Face hub, download it "
            f"(hf download {model} --local-dir {model.rpartition('/')[2]}) and name that folder{preset}"
        )
    if "/" in model or model.startswith((".", "~")):
        return f"there is no such file or folder; was it moved? (presets: {presets})"
    return f"no such preset ({presets}), and no such folder; {did_you_mean(model, PRESETS, 'give a path that exists')}"


def architecture_to_toml(architecture: Architecture) -> str:
    """Return the text of a file that read_architecture_toml turns back into an equal Architecture."""
    values = asdict(architecture)
    scaling = values.pop("rope_scaling")
    return format_table(values) + ("" if scaling is None else "\n[rope_scaling]\n" + format_table(scaling))


def read_architecture_toml(path: str | Path) -> Architecture:
    """Read a file whose keys are Architecture's fields. Groups default to heads, channels to hidden_size / heads."""
    table = {key.replace("-", "_"): value for key, value in read_toml(path).items()}
    if isinstance(table.get("rope_scaling"), dict):
        table["rope_scaling"] = RopeScaling(**_checked(table["rope_scaling"], RopeScaling, ("factor",), path))
    needed = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings")
    values = _checked(table, Architecture, needed, path)
    heads = max(1, values["num_attention_heads"])
    derived = {"num_query_groups": heads, "kv_channels": values["hidden_size"] // heads}
    return _sound(Architecture(**{**derived, **values}), path)


def read_hugging_face_config(path: str | Path) -> Architecture:
    """Read a config.json of one of HUGGING_FACE_MODEL_TYPES. UserError for what Architecture cannot express."""
    try:
        source = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # neither JSON nor UTF-8
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(source, dict):
        raise UserError(f"{path} does not hold a JSON object")
    kind = source.get("model_type")
    if kind not in HUGGING_FACE_MODEL_TYPES:
        supported = ", ".join(HUGGING_FACE_MODEL_TYPES)
        raise UserError(f"{path}: model_type {kind!r} is not supported; these are: {supported}")
    for key, expected in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if source.get(key, expected) != expected:
            raise UserError(f"{path}: {key} = {source[key]!r} is not supported, only {expected!r}")
    values = {name: _hugging_face_number(source, key, path) for name, key in _HUGGING_FACE_SIZES.items()}
    if kind == "llama":  # its older files, from before grouped queries, leave this out
        source.setdefault("num_key_value_heads", values["num_attention_heads"])
    if not kind.startswith("qwen3") and source.get("head_dim") is None:
        source["head_dim"] = values["hidden_size"] // max(1, values["num_attention_heads"])
    # Within its window, sliding-window attention is full attention: so a shorter context keeps the function exact.
    window = source.get("sliding_window") if kind == "mistral" or source.get("use_sliding_window") else None
    if window is not None:
        values["max_position_embeddings"] = min(values["max_position_embeddings"], window)
    rotary_base, rope_scaling = _hugging_face_rope(source, path)
    return _sound(
        Architecture(
            **values,
            num_query_groups=_hugging_face_number(source, "num_key_value_heads", path),
            kv_channels=_hugging_face_number(source, "head_dim", path),
            rotary_base=rotary_base,
            rope_scaling=rope_scaling,
            norm_epsilon=float(source.get("rms_norm_eps", 1e-6)),
            qk_layernorm=kind.startswith("qwen3"),
            add_qkv_bias=kind == "qwen2",
            tie_embeddings=bool(source.get("tie_word_embeddings", False)),
            init_method_std=float(source.get("initializer_range", 0.02)),
            **(_hugging_face_experts(source, path) if kind == "qwen3_moe" else {}),
        ),
        path,
    )


_HUGGING_FACE_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "vocab_size": "vocab_size",
}


def _hugging_face_number(source: dict[str, Any], key: str, path: str | Path) -> int:
    if type(source.get(key)) is not int:
        raise UserError(f"{path}: {key} must be an integer, not {source.get(key)!r}")
    return source[key]


def _hugging_face_experts(source: dict[str, Any], path: str | Path) -> dict[str, Any]:
    if source.get("decoder_sparse_step", 1) != 1 or source.get("mlp_only_layers"):
        raise UserError(f"{path}: dense layers between those with experts are not supported")
    source.setdefault("num_experts", source.get("num_local_experts"))  # transformers 5 writes the latter
    return {
        "num_experts": _hugging_face_number(source, "num_experts", path),
        "moe_ffn_hidden_size": _hugging_face_number(source, "moe_intermediate_size", path),
        "moe_router_topk": _hugging_face_number(source, "num_experts_per_tok", path),
        "moe_norm_topk_prob": bool(source.get("norm_topk_prob", False)),
        "moe_aux_loss_coeff": float(source.get("router_aux_loss_coef", 0.001)),
    }


def _hugging_face_rope(source: dict[str, Any], path: str | Path) -> tuple[float, RopeScaling | None]:
    """Return (rotary_base, scaling). Transformers 5 keeps both in `rope_parameters`, earlier versions in two keys."""
    scaling = source.get("rope_parameters") or source.get("rope_scaling") or {}
    base = float(scaling.get("rope_theta") or source.get("rope_theta") or 10_000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return base, None
    if kind != "llama3":
        raise UserError(f"{path}: rope type {kind!r} is not supported; these are: default, llama3")
    try:
        return base, RopeScaling(**{f.name: f.type(scaling[f.name]) for f in fields(RopeScaling)})
    except KeyError as error:
        raise UserError(f"{path}: rope type 'llama3' lacks {error.args[0]}") from error


def _checked(table: dict[str, Any], record: type, needed: tuple[str, ...], path: str | Path) -> dict[str, Any]:
    """Return the table with integers widened to float as needed. UserError: an unknown or missing key, a wrong type."""
    known = {f.name: f.type for f in fields(record)}
    values = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UserError(f"{path}: unknown key {key}; {did_you_mean(name, known, f'valid: {list(known)}')}")
        kind = known[name]
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            wanted = kind.__name__ if isinstance(kind, type) else str(kind)
            raise UserError(f"{path}: {key} = {value!r} must be of type {wanted}")
        values[name] = value
    missing = [name for name in needed if name not in values]
    if missing:
        raise UserError(f"{path}: missing {', '.join(missing)}")
    return values


def _sound(architecture: Architecture, path: str | Path) -> Architecture:
    problems = architecture_problems(architecture)
    if problems:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    return architecture
