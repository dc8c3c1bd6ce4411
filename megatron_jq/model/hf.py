"""F3: where each tensor of a Hugging Face checkpoint lies in Megatron-core's: one table, read in both directions.

Megatron-core stacks layers (and experts) in one global tensor a key: `decoder.layers.mlp.linear_fc2.weight` is
[layers, H, F]. The matrix (or vector) at one index of the leading axes is a slab here. A Hugging Face tensor differs
from slabs in the order of its rows and in nothing else, so the table is made of row spans:

    q, k, v   rows of linear_qkv, interleaved: a key/value group's query heads, then its key, then its value
    gate, up  the first and the second half of linear_fc1
    others    a slab each; the vocabulary's slabs may be longer than their tensors (padding)

Families differ in names and in which tensors they have, not in the order of rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_jq.architecture import Architecture

WORD_EMBEDDINGS, OUTPUT_LAYER = "embedding.word_embeddings.weight", "output_layer.weight"
#: Keys whose rows are the vocabulary, padded.
VOCABULARY = (WORD_EMBEDDINGS, OUTPUT_LAYER)

_LAYERS = "decoder.layers."


@dataclass(frozen=True)
class Slab:
    """What a global tensor holds at one index of its leading axes (layer, expert): a matrix or a vector."""

    key: str
    index: tuple[int, ...] = ()


@dataclass(frozen=True)
class RowSpan:
    """`count` rows of a Hugging Face tensor from `start` on are those of `slab` from `at` on; columns are the same."""

    start: int
    slab: Slab
    at: int
    count: int


@dataclass(frozen=True)
class HuggingFaceTensor:
    """One tensor of the checkpoint; its row spans, in order, fill it."""

    name: str
    shape: tuple[int, ...]
    spans: tuple[RowSpan, ...]


def hugging_face_tensors(architecture: Architecture) -> list[HuggingFaceTensor]:
    """Every tensor of the Hugging Face checkpoint, in the model's order. architecture.vocab_size must be set."""
    a = architecture
    assert a.vocab_size is not None, "the tokenizer's or the checkpoint's size is set first"
    vocabulary = (a.vocab_size, a.hidden_size)
    tensors = [_slab_tensor("model.embed_tokens.weight", Slab(WORD_EMBEDDINGS), vocabulary)]
    for layer in range(a.num_layers):
        tensors += _attention(a, layer)
        tensors += _dense(a, layer) if a.num_experts is None else _experts(a, layer)
    tensors.append(_slab_tensor("model.norm.weight", Slab("decoder.final_layernorm.weight"), (a.hidden_size,)))
    if not a.tie_embeddings:
        tensors.append(_slab_tensor("lm_head.weight", Slab(OUTPUT_LAYER), vocabulary))
    return tensors


def megatron_tensors(architecture: Architecture, padded_vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Key → global shape of every parameter in Megatron-core's sharded state dict."""
    a, shapes = architecture, {}
    for tensor in hugging_face_tensors(a):
        for span in tensor.spans:
            slab, rows = span.slab, span.at + span.count
            lead = tuple(i + 1 for i in slab.index)
            known = shapes.get(slab.key, (*(0 for _ in lead), 0, *tensor.shape[1:]))
            shape = (*lead, rows, *tensor.shape[1:])
            shapes[slab.key] = tuple(max(pair) for pair in zip(known, shape, strict=True))
    for key in VOCABULARY:
        if key in shapes:
            shapes[key] = (padded_vocab_size, a.hidden_size)
    return shapes


def rows_of_slabs(tensors: list[HuggingFaceTensor]) -> dict[Slab, list[tuple[HuggingFaceTensor, RowSpan]]]:
    """Return the table from Megatron-core's side: the row spans that make up each slab, in the order of its rows."""
    spans: dict[Slab, list[tuple[HuggingFaceTensor, RowSpan]]] = {}
    for tensor in tensors:
        for span in tensor.spans:
            spans.setdefault(span.slab, []).append((tensor, span))
    return {slab: sorted(pairs, key=lambda pair: pair[1].at) for slab, pairs in spans.items()}


def _slab_tensor(name: str, slab: Slab, shape: tuple[int, ...], at: int = 0) -> HuggingFaceTensor:
    return HuggingFaceTensor(name, shape, (RowSpan(0, slab, at, shape[0]),))


def _attention(a: Architecture, layer: int) -> Iterator[HuggingFaceTensor]:
    prefix, megatron, dense = f"model.layers.{layer}.", f"{_LAYERS}self_attention.", a.num_experts is None
    heads, d = a.num_attention_heads // a.num_query_groups, a.kv_channels
    yield _slab_tensor(
        f"{prefix}input_layernorm.weight", Slab(f"{megatron}linear_qkv.layer_norm_weight", (layer,)), (a.hidden_size,)
    )
    for kind in ("weight", "bias") if a.add_qkv_bias else ("weight",):
        slab, columns = Slab(f"{megatron}linear_qkv.{kind}", (layer,)), (a.hidden_size,) if kind == "weight" else ()
        # A group's rows: its query heads from 0 on, its key after them, its value last.
        for letter, first, count in (("q", 0, heads), ("k", heads, 1), ("v", heads + 1, 1)):
            spans = tuple(
                RowSpan(g * count * d, slab, (g * (heads + 2) + first) * d, count * d)
                for g in range(a.num_query_groups)
            )
            shape = (a.num_query_groups * count * d, *columns)
            yield HuggingFaceTensor(f"{prefix}self_attn.{letter}_proj.{kind}", shape, spans)
    yield _slab_tensor(
        f"{prefix}self_attn.o_proj.weight",
        Slab(f"{megatron}linear_proj.weight", (layer,)),
        (a.hidden_size, a.num_attention_heads * d),
    )
    for letter in ("q", "k") if a.qk_layernorm else ():
        yield _slab_tensor(
            f"{prefix}self_attn.{letter}_norm.weight", Slab(f"{megatron}{letter}_layernorm.weight", (layer,)), (d,)
        )
    yield _slab_tensor(
        f"{prefix}post_attention_layernorm.weight",
        Slab(_LAYERS + ("mlp.linear_fc1.layer_norm_weight" if dense else "pre_mlp_layernorm.weight"), (layer,)),
        (a.hidden_size,),
    )


def _dense(a: Architecture, layer: int) -> Iterator[HuggingFaceTensor]:
    yield from _swiglu(a, f"model.layers.{layer}.mlp.", f"{_LAYERS}mlp.", (layer,), a.ffn_hidden_size)


def _experts(a: Architecture, layer: int) -> Iterator[HuggingFaceTensor]:
    prefix = f"model.layers.{layer}.mlp."
    num_experts, width = a.num_experts, a.moe_ffn_hidden_size
    assert num_experts is not None and width is not None
    router = Slab(f"{_LAYERS}mlp.router.weight", (layer,))
    yield _slab_tensor(f"{prefix}gate.weight", router, (num_experts, a.hidden_size))
    for e in range(num_experts):
        yield from _swiglu(a, f"{prefix}experts.{e}.", f"{_LAYERS}mlp.experts.experts.", (layer, e), width)


def _swiglu(
    a: Architecture, prefix: str, megatron: str, index: tuple[int, ...], width: int
) -> Iterator[HuggingFaceTensor]:
    both, shape = Slab(f"{megatron}linear_fc1.weight", index), (width, a.hidden_size)
    yield _slab_tensor(f"{prefix}gate_proj.weight", both, shape)
    yield _slab_tensor(f"{prefix}up_proj.weight", both, shape, at=width)
    yield _slab_tensor(f"{prefix}down_proj.weight", Slab(f"{megatron}linear_fc2.weight", index), (a.hidden_size, width))
