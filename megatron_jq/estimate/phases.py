"""F4: what each phase of a step adds to the memory of one process, at the points that may be its fullest."""

from dataclasses import dataclass

from megatron_jq.estimate import activations
from megatron_jq.estimate.parameters import Parameters, stage_parameters
from megatron_jq.estimate.plan import Chunk, Plan

#: glibc keeps freed blocks below this size for later use; larger blocks go back to the system at once.
HEAP_BLOCK = 32 << 20

#: Elements of a chunk of logits (parallel/vocabulary.py) and of the sampler's float64 rows (rollout/sampling.py).
CHUNK_ELEMENTS = {"cpu": 3 << 24, "cuda": 1 << 27}
SAMPLING_ELEMENTS = 16_000_000

#: Bytes per element of logits while a nucleus is sought (parallel/nucleus.py: nucleus_threshold), logits included.
NUCLEUS_BYTES = 41

#: The cache grows by so many tokens at a time (rollout/cache.py).
CACHE_GROWTH = 64


@dataclass(frozen=True)
class Part:
    """Something in memory: `bytes` in all, in tensors of at most `block` bytes."""

    name: str
    bytes: float
    block: float


@dataclass(frozen=True)
class Moment:
    """What is in memory at one point of a phase beside what stays."""

    parts: tuple[Part, ...]

    @property
    def bytes(self) -> float:
        return sum(part.bytes for part in self.parts)

    @property
    def heap(self) -> float:
        """Bytes in blocks that glibc keeps when they are freed."""
        return sum(part.bytes for part in self.parts if part.block < HEAP_BLOCK)


@dataclass(frozen=True)
class Phase:
    """The points of one phase that may be its fullest."""

    name: str
    moments: tuple[Moment, ...]


def optimized(plan: Plan, count: Parameters) -> float:
    """Return the number of elements whose optimizer state is on one process."""
    if plan.config.parallel.use_distributed_optimizer:
        return count.shared / plan.dp + count.experts / plan.expert_dp
    return count.total


def _phase(name: str, moments: list[tuple[Part, ...]]) -> Phase:
    return Phase(name, tuple(map(Moment, moments)))


def _layers(plan: Plan, size: float, tokens: int) -> Part:
    return Part("layers' working memory", size, activations.largest_block(plan, tokens))


def _saved(plan: Plan, size: float, tokens: int) -> tuple[Part, Part]:
    """Activations that wait for the backward pass, by size of their tensors."""
    largest = activations.share_of_largest(plan) * size
    return (
        Part("saved activations", largest, activations.largest_block(plan, tokens)),
        Part("saved activations", size - largest, activations.other_block(plan, tokens)),
    )


def _heads(plan: Plan, stage: int) -> bool:
    return any(chunk.heads for chunk in plan.stages[stage])


def rollout_phase(plan: Plan, stage: int) -> Phase:
    """Prefill, a decoding pass, sampling after one, or scoring y* from the cache."""
    if plan.imitates:
        return _phase("rollout", [()])
    w, r = activations.widths(plan), plan.config.rollout
    rows, prompts = plan.fullest_wave
    prompt_tokens, room = prompts * plan.lengths.prompt, -(-plan.fed_tokens // CACHE_GROWTH) * CACHE_GROWTH
    layer = plan.element * w.key * max(prompt_tokens, rows * room)  # of keys, or of values
    per_token = 2 * plan.element * w.key * sum(chunk.layers for chunk in plan.stages[stage])
    of_prompts = Part("KV cache", per_token * prompt_tokens, layer)
    cache = Part("KV cache", per_token * (prompt_tokens + rows * room), layer)
    moments = [
        (of_prompts, _layers(plan, activations.forward_working(plan, prompt_tokens), prompt_tokens)),
        (cache, _layers(plan, activations.decode_working(plan, rows), rows)),
        (cache, _layers(plan, activations.tail_working(plan, rows), rows * plan.tail_tokens)),
    ]
    if _heads(plan, stage):
        # cumulative probabilities in float64, and logits over the temperature
        each = NUCLEUS_BYTES if r.temperature > 0 and r.top_p < 1 else 8 if r.temperature in (0, 1) else 12
        elements = min(rows, max(1, SAMPLING_ELEMENTS // plan.vocab_rows)) * plan.vocab_rows
        logits = Part("logits", 4 * rows * plan.vocab_rows, 4 * rows * plan.vocab_rows)
        moments.append((cache, logits, Part("sampling workspace", each * elements, 8 * elements)))
    return _phase("rollout", moments)


def score_phase(plan: Plan, stage: int) -> Phase:
    """The trainer's forward pass; with --score-with rollout only of the steps that compare."""
    if plan.imitates or (plan.scores_in_rollout and plan.config.rollout.score_check_interval == 0):
        return _phase("score", [()])
    sequences, tokens = plan.largest_micro_batch, plan.largest_row
    moments = [(_layers(plan, activations.forward_working(plan, tokens), tokens),)]
    if _heads(plan, stage):
        rows, row = sequences * plan.lengths.answer, plan.element * plan.architecture.hidden_size
        logits = _logits(plan, rows, two=True)
        moments.append((Part("head chunk", (rows + tokens) * row, tokens * row), logits))
    return _phase("score", moments)


def chunk_tokens(plan: Plan) -> int:
    """Head rows whose logits exist at one time (parallel/vocabulary.py: default_chunk_tokens)."""
    return max(32, CHUNK_ELEMENTS["cuda" if plan.on_cuda else "cpu"] // plan.vocab_rows // 32 * 32)


def _logits(plan: Plan, rows: int, *, two: bool) -> Part:
    """The head's chunk of logits, float32, and the product itself where that is bfloat16. two: of one chunk's end and
    the next one's start.
    """
    chunk = min(rows, chunk_tokens(plan))
    alive = chunk + (min(rows - chunk, chunk) if two else 0)
    size = 4 * alive + (2 * chunk if plan.element == 2 else 0)
    return Part("logits", plan.vocab_rows * size, 4 * chunk * plan.vocab_rows)


def _nucleus(plan: Plan, rows: int, drawn: int) -> Part:
    """Of a chunk of `rows` head rows, of which so many were drawn: their logits are copied where others lie between."""
    chunk = min(rows, chunk_tokens(plan))
    searched = min(chunk, drawn)
    apart = 4 * chunk * (searched < chunk)
    return Part("logits", plan.vocab_rows * (apart + NUCLEUS_BYTES * searched), 8 * chunk * plan.vocab_rows)


def in_flight(plan: Plan, stage: int, micro_batches: int) -> list[int]:
    """Micro-batches of each chunk whose activations a stage holds at the schedule's peak (Megatron-core's 1F1B)."""
    chunks = len(plan.stages[stage])
    if chunks == 1:
        return [min(plan.pp - stage, micro_batches)]
    warm_up = (plan.pp - stage - 1) * 2 + (chunks - 1) * plan.pp
    passes = min(warm_up + 1, chunks * micro_batches)
    counts = [0] * chunks
    for number in range(passes):  # rounds of pp micro-batches through each chunk in turn
        counts[number // plan.pp % chunks] += 1
    return counts


def train_phase(plan: Plan, stage: int) -> Phase:
    """Forward and backward passes: in a layer, at the head, at the embedding's gradient."""
    tokens, chunks = plan.largest_row, plan.stages[stage]
    counts = in_flight(plan, stage, len(plan.busiest_rows))
    saved = [activations.chunk_saved(plan, chunk, tokens) for chunk in chunks]
    all_saved = sum(n * size for n, size in zip(counts, saved, strict=True))
    moments = []
    for chunk, size in zip(chunks, saved, strict=True):
        again = tokens * activations.recomputed_layers(plan, chunk.layers) * activations.layer_saved(plan)
        edge = activations.chunk_saved(plan, Chunk(0, False, True), tokens) if chunk.heads else 0
        working = activations.backward_working(plan, chunk, tokens)
        moments.append((*_saved(plan, all_saved - edge + again, tokens), _layers(plan, working, tokens)))
        if chunk.heads:
            moments += [(*_saved(plan, all_saved, tokens), *parts) for parts in _head(plan)]
        if chunk.embeds:
            table = _gradient_bytes(plan) * plan.vocab_rows * plan.architecture.hidden_size
            row = tokens * plan.element * plan.architecture.hidden_size
            gradient = Part("embedding's gradient", table + row, table)
            moments.append((*_saved(plan, all_saved - size, tokens), gradient))
    if plan.config.parallel.use_distributed_optimizer and plan.dp > 1 and not plan.on_cuda:
        copy = 4 * stage_parameters(plan, stage).total  # gloo reduces and scatters a copy of the whole buffer
        moments.append((Part("copy of the gradients", copy, copy),))
    return _phase("train", moments)


def _gradient_bytes(plan: Plan) -> int:
    """Return the bytes per element of a gradient on its way into main_grad; CPU copies a bfloat16 one to float32."""
    return plan.element + (4 if plan.element == 2 and not plan.on_cuda else 0)


def _head(plan: Plan) -> list[tuple[Part, ...]]:
    """Logits, the rows with their gradient, and hidden states gathered or kept for the rows' gradient; with what of the
    weight's gradient is not in main_grad yet.
    """
    row, sequences, tokens = plan.element * plan.architecture.hidden_size, plan.largest_micro_batch, plan.largest_row
    rows = sequences * (plan.lengths.rationale + plan.lengths.answer)
    around = Part("head chunk", 2 * rows * row + tokens * row * (1 / plan.split + (plan.split > 1)), tokens * row)
    table = plan.vocab_rows * plan.architecture.hidden_size
    if plan.has_nucleus:  # linear_log_probs: bisection forward, a gradient of its own backward
        weight_gradient = Part("head chunk", table * (4 + 2 * plan.element), 4 * table)
        search = _nucleus(plan, rows, sequences * plan.drawn_tokens)
        return [(around, search), (around, _logits(plan, rows, two=True), weight_gradient)]
    logits = _logits(plan, rows, two=plan.tp > 1)
    if plan.element == 4:
        return [(around, logits)]
    # under bf16 the weight's gradient of one chunk exists by itself before it is added in float32
    return [(around, logits, Part("head chunk", table * _gradient_bytes(plan), table * plan.element))]


def update_phase(plan: Plan, count: Parameters) -> Phase:
    """Adam's temporaries: torch's, one parameter at a time on CPU and all at once on CUDA; fused kernels have none."""
    if plan.config.optimizer.optimizer != "adam" or plan.transformer_engine:
        return _phase("update", [()])
    elements = optimized(plan, count)
    size = 4 * elements if plan.on_cuda else 2 * 4 * min(count.largest, elements)
    return _phase("update", [(Part("Adam's temporaries", size, size / 2),)])
