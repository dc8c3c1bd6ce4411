"""Tiny GGUF files, written by the gguf package as llama.cpp's converter writes them."""

import json
import re
from pathlib import Path

import gguf
import numpy
import torch

from megatron_jq.architecture import Architecture
from megatron_jq.model.rotary import RotaryAt

#: Hugging Face's name → llama.cpp's, written out here: the product asks the package for them.
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
TYPES = gguf.GGMLQuantizationType


def write(
    path: Path, architecture: Architecture, tensors: dict[str, torch.Tensor], family: str, *,
    kind: TYPES = TYPES.F32, tokenizer: Path | None = None, left_out: str = "", keys: dict | None = None,
) -> Path:  # fmt: skip
    """kind: of the matrices. left_out: a tensor. keys: to add, or None for one to leave out."""
    a = architecture
    values = {
        "block_count": a.num_layers, "context_length": a.max_position_embeddings, "embedding_length": a.hidden_size,
        "feed_forward_length": a.ffn_hidden_size, "attention.head_count": a.num_attention_heads,
        "attention.head_count_kv": a.num_query_groups, "attention.key_length": a.kv_channels,
        "attention.value_length": a.kv_channels, "rope.dimension_count": a.kv_channels,
        "attention.layer_norm_rms_epsilon": a.norm_epsilon, "rope.freq_base": a.rotary_base,
    }  # fmt: skip
    if a.num_experts is not None:
        values |= {
            "expert_count": a.num_experts, "expert_used_count": a.moe_router_topk,
            "expert_feed_forward_length": a.moe_ffn_hidden_size,
        }  # fmt: skip
    writer = gguf.GGUFWriter(path, family)
    for key, value in {**{f"{family}.{name}": value for name, value in values.items()}, **(keys or {})}.items():
        if value is not None:
            {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}[
                type(value)
            ](key, value)
    _add_tokenizer(writer, tokenizer, a.vocab_size)
    for name, array in _stored(architecture, tensors, family).items():
        if name != left_out:
            number = kind if array.ndim > 1 else TYPES.F32
            plain = {TYPES.F32: numpy.float32, TYPES.F16: numpy.float16, TYPES.I8: numpy.int8}
            packed = array.astype(plain[number]) if number in plain else gguf.quantize(array, number)
            writer.add_tensor(name, packed, raw_dtype=None if number in plain else number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stored(a: Architecture, tensors: dict[str, torch.Tensor], family: str) -> dict[str, numpy.ndarray]:
    stored: dict[str, numpy.ndarray] = {}
    experts: dict[str, list[numpy.ndarray]] = {}
    for name, tensor in tensors.items():
        stem, _, suffix = name.rpartition(".")
        layer = re.match(r"model\.layers\.(\d+)\.(.*)", stem)
        stem, prefix = (layer[2], f"blk.{layer[1]}.") if layer else (stem, "")
        array = tensor.numpy()
        if family == "llama" and stem in ("self_attn.q_proj", "self_attn.k_proj"):
            array = array.reshape(-1, 2, a.kv_channels // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if expert := re.match(r"mlp\.experts\.\d+\.(\w+)_proj", stem):
            experts.setdefault(f"{prefix}ffn_{expert[1]}_exps.{suffix}", []).append(array)
        else:
            stored[f"{prefix}{NAMES[stem]}.{suffix}"] = array
    if a.rope_scaling is not None:
        device = torch.device("cpu")
        plain, scaled = (
            RotaryAt(a.kv_channels, a.rotary_base, rule, device).inverse_frequency for rule in (None, a.rope_scaling)
        )
        stored["rope_freqs.weight"] = (plain / scaled).numpy()
    return stored | {name: numpy.stack(arrays) for name, arrays in experts.items()}


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path | None, size: int) -> None:
    """Of a folder of tokenizer_kinds; None: pieces of no use."""
    if folder is None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("nobody-knows")
        writer.add_token_list([f"piece{n}" for n in range(size)])
        return
    table = json.loads((folder / "tokenizer.json").read_text())
    names = json.loads((folder / "tokenizer_config.json").read_text())
    vocab = table["model"]["vocab"] | {token["content"]: token["id"] for token in table["added_tokens"]}
    kinds = dict.fromkeys(vocab, NORMAL)
    kinds |= {t["content"]: CONTROL if t["special"] else USER_DEFINED for t in table["added_tokens"]}
    is_byte_level = not table["model"]["byte_fallback"]
    if not is_byte_level:
        kinds |= {f"<0x{value:02X}>": 6 for value in range(256)} | {"<unk>": 2}
    pieces = sorted(vocab, key=vocab.__getitem__)
    writer.add_tokenizer_model("gpt2" if is_byte_level else "llama")
    writer.add_token_list(pieces)
    writer.add_token_types([kinds[piece] for piece in pieces])
    if is_byte_level:
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges([" ".join(pair) for pair in table["model"]["merges"]])
    else:
        writer.add_token_scores([-float(vocab[piece]) for piece in pieces])
        writer.add_add_bos_token(False)
    writer.add_bos_token_id(vocab[names["bos_token"]])
    writer.add_eos_token_id(vocab[names["eos_token"]])
    writer.add_unk_token_id(vocab[names["unk_token"]])
    writer.add_pad_token_id(vocab[names["pad_token"]])
    writer.add_chat_template("{{ messages[0].content }}")
