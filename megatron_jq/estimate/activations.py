"""F4: bytes of activations on one process: what autograd keeps of a forward pass, and what comes and goes.

Derived from the tensors that autograd saves in Megatron-core 0.16's layers with our norm and attention; a test counts
them. H hidden, h query heads, g key/value groups, d channels per head, F width of the SwiGLU block, each divided by the
tensor-parallel size where it is split; e bytes per element. The local layers on CPU are exact; CUDA's and Transformer
Engine's follow from their sources and are untested.
"""

from dataclasses import dataclass

from megatron_jq.estimate.plan import Chunk, Plan

#: Of a softmax's or a norm's statistics, float32 at any activation format.
STATISTIC = 4
#: A token id or an index.
INDEX = 8
#: Scores that exist at one time where attention is computed plainly (model/flash.py).
SCORE_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class Widths:
    """Elements per token in one process's layers."""

    hidden: float  # H over the parts of sequence parallelism
    query: int  # h·d
    key: int  # g·d
    heads: int  # h
    groups: int  # g
    channels: int  # d, whole: rotary angles are on every process
    block: float  # F, or that of the experts that a token visits

    @property
    def mixed(self) -> int:
        """Output of the joint query, key and value projection."""
        return self.query + 2 * self.key


def widths(plan: Plan) -> Widths:
    a = plan.architecture
    heads, groups = a.num_attention_heads // plan.tp, a.num_query_groups // plan.tp
    if a.num_experts is None:
        block = a.ffn_hidden_size / plan.tp
    else:  # each token's copies, spread evenly over experts
        block = a.moe_router_topk * a.moe_ffn_hidden_size / plan.tp
    return Widths(
        a.hidden_size / plan.split, heads * a.kv_channels, groups * a.kv_channels, heads, groups, a.kv_channels, block
    )


def norm_saved(plan: Plan, width: float) -> float:
    """Return the bytes per token of RMSNorm over `width` channels: its input, the input over its norm, the norm.

    torch's CPU kernel is made of single operations, in float32; CUDA's and Transformer Engine's keep input and norm.
    """
    if plan.on_cuda:
        return plan.element * width
    return 2 * 4 * width


def layer_saved(plan: Plan, *, padded: float | None = None) -> float:
    """Return the bytes per token and layer that autograd keeps. padded: where sequences differ in length and none share
    a prompt, tokens of the attention's padded buckets per token of the row (model/attention.py); None: otherwise.
    """
    w, e = widths(plan), plan.element
    attention_norm = norm_saved(plan, w.hidden) + STATISTIC / plan.split + e * w.hidden
    return attention_norm + attention_saved(plan, w, padded) + block_saved(plan, w)


def attention_saved(plan: Plan, w: Widths, padded: float | None) -> float:
    """Between the first norm and the residual addition: projection, q/k norms, rotation, core attention."""
    e, total = plan.element, 0.0
    qk_norm = plan.architecture.qk_layernorm
    if qk_norm:
        total += STATISTIC * (w.heads + w.groups)
        if plan.on_cuda:
            total += e * (w.query if w.groups > 1 else 0)  # the key's input is a view of the projection
        elif e == 4:
            total += e * (w.query if w.groups > 1 else 0) + 4 * (w.query + w.key)
        else:
            total += 2 * 4 * (w.query + w.key)  # inputs turned to float32, and these over their norms
    if padded is None or (qk_norm and (e == 4 or plan.on_cuda)):
        total += e * w.mixed  # the values, or the keys' norm, look into it
    total += 4 * e * w.channels  # cosines and sines, once for queries and once for keys
    recomputed = plan.config.parallel.recompute_granularity == "selective"
    statistics = 0 if recomputed else STATISTIC * w.heads
    if padded is None:
        return total + e * (2 * w.query + w.key) + statistics  # queries, keys, output: over trees of any lengths too
    copies = e * (2 * w.query + 2 * w.key) + STATISTIC * w.heads  # copies by bucket
    return total + padded * copies + e * w.query


def block_saved(plan: Plan, w: Widths) -> float:
    """The second norm and the SwiGLU block (or router and experts)."""
    e, a = plan.element, plan.architecture
    norm = norm_saved(plan, w.hidden) + STATISTIC / plan.split + e * w.hidden
    if a.num_experts is None:
        # gate|up, their product; without a fused kernel also silu(gate) and up + 0
        return norm + e * (3 if plan.on_cuda else 5) * w.block
    router = 3 * STATISTIC * a.num_experts + a.moe_router_topk * (STATISTIC + 3 * INDEX)
    copies = a.moe_router_topk * e * a.hidden_size * plan.etp  # the experts' inputs, in their order
    # as above, and the product times the router's probability
    return norm + (router + copies) / plan.split + e * (4 if plan.on_cuda else 6) * w.block


def embedding_saved(plan: Plan) -> float:
    """Return the bytes per token: its id, and whether it lies on another process."""
    return INDEX + (plan.tp > 1)


def chunk_saved(plan: Plan, chunk: Chunk, tokens: int) -> float:
    """Bytes of one micro-batch in flight that one model chunk keeps, head rows apart."""
    e, hidden = plan.element, widths(plan).hidden
    total = tokens * layers_saved(plan, chunk.layers)
    total += tokens * embedding_saved(plan) if chunk.embeds else 0
    if chunk.heads:
        return total + tokens * (norm_saved(plan, hidden) + STATISTIC / plan.split)
    return total + tokens * e * hidden  # the schedule holds on to what it sent


def layers_saved(plan: Plan, layers: int) -> float:
    """Return the bytes per token of so many layers, after recomputation has taken its share."""
    p = plan.config.parallel
    if p.recompute_granularity != "full":
        return layers * layer_saved(plan)
    w = widths(plan)
    checkpoint_input = plan.element * w.hidden
    angles = 4 * w.channels  # rotary ones, once for all layers
    if p.recompute_method == "uniform":
        return -(-layers // p.recompute_num_layers) * checkpoint_input + angles
    again = min(layers, p.recompute_num_layers)
    if p.model_class == "hybrid":
        checkpoint_input *= 2  # attention and MLP are made again one by one
    return again * checkpoint_input + angles + (layers - again) * layer_saved(plan)


def recomputed_layers(plan: Plan, layers: int) -> int:
    """Layers whose activations exist again, beside what is kept, while the last of them goes backward."""
    p = plan.config.parallel
    if p.recompute_granularity != "full":
        return 0
    if p.recompute_method == "uniform":
        return min(layers, p.recompute_num_layers)
    return 1 if layers <= p.recompute_num_layers else 0


def plain_scores(plan: Plan, tokens: int, *, backward: bool) -> float:
    """Bytes of scores and of repeated keys and values where attention is computed plainly: in float32 on CUDA. At most
    three matrices of scores exist at one time (two forward), of SCORE_ELEMENTS each or of all the tokens' pairs.
    """
    if not plan.on_cuda or plan.element != 4:
        return 0.0
    w = widths(plan)
    scores = min(SCORE_ELEMENTS, w.heads * tokens * tokens)
    return 4 * ((3 if backward else 2) * scores + (4 if backward else 2) * tokens * w.query)


def forward_working(plan: Plan, tokens: int) -> float:
    """Most bytes alive at once in a pass without gradient: four rows of hidden states and the inside of a layer."""
    w, e = widths(plan), plan.element
    attention = tokens * e * (w.mixed + 4 * w.query) + plain_scores(plan, tokens, backward=False)
    inside = max(tokens * e * (3 if plan.on_cuda else 5) * w.block, attention)
    return tokens * e * 4 * w.hidden + inside


def decode_working(plan: Plan, rows: int) -> float:
    """The same of one decoding step, whose attention holds all scores of a token three times in float32."""
    w, keys = widths(plan), plan.lengths.prompt + plan.fed_tokens
    attention = plan.element * (4 * w.hidden + w.mixed + 4 * w.query) + 3 * 4 * w.heads * keys
    return max(forward_working(plan, rows), rows * attention)


def tail_working(plan: Plan, rows: int) -> float:
    """The same of scoring y* from the cache: a layer's keys and values copied twice, scores and masks three times."""
    tail, cached = plan.tail_tokens, plan.fed_tokens
    if tail == 0:
        return 0
    w, e = widths(plan), plan.element
    copies = e * 2 * w.key * (2 * cached + tail)
    scores = 3 * 4 * tail * w.heads * (plan.lengths.prompt + cached + tail)
    attention = copies + scores + tail * e * (3 * w.hidden + 2 * w.mixed)
    return max(forward_working(plan, rows * tail), rows * attention)


def largest_block(plan: Plan, tokens: int) -> float:
    """Bytes of the largest single tensor among a row's activations: gate and up projections."""
    return tokens * plan.element * 2 * widths(plan).block


def other_block(plan: Plan, tokens: int) -> float:
    """Bytes of the largest one beside it."""
    w, e = widths(plan), plan.element
    return tokens * max(e * w.block, e * w.mixed, 4 * w.hidden)


def share_of_largest(plan: Plan) -> float:
    """Of what a layer keeps, what lies in tensors of the largest size."""
    return plan.element * 2 * widths(plan).block / layer_saved(plan)


def backward_working(plan: Plan, chunk: Chunk, tokens: int) -> float:
    """Most bytes a backward pass needs on top of what the layers keep, before it has freed much of that."""
    w, e, hidden = widths(plan), plan.element, plan.architecture.hidden_size
    row = tokens * e * hidden  # gathered under sequence parallelism
    matrix = e * hidden * w.block / (1 if plan.architecture.num_experts is None else plan.architecture.moe_router_topk)
    product = row + tokens * e * 2 * w.block  # gradients of silu(gate) and up, and of their product
    down = row + tokens * e * w.block + matrix
    up = 2 * row - tokens * e * 3 * w.block + 2 * matrix
    norm = tokens * w.hidden * (2 * e if plan.on_cuda else 6 * 4) if chunk.heads else 0
    # attention's gradients, over trees too, come when the block's share is freed, and are fewer, but for plain scores
    return max(product, down, up, norm, plain_scores(plan, tokens, backward=True))
