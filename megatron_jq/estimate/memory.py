"""F4: memory of one process of each pipeline stage: what stays, and what each phase adds at its peak."""

from dataclasses import dataclass

from megatron_jq.estimate import activations
from megatron_jq.estimate.parameters import Parameters, stage_parameters
from megatron_jq.estimate.plan import Chunk, Plan

#: Resident memory of a process behind its imports and the start of its groups, in bytes. CPU: measured with torch 2.13
#: and megatron-core 0.16.1 (docs/estimate.md). CUDA: assumed, for context, libraries and NCCL's buffers; it is not part
#: of what torch.cuda.max_memory_allocated reports.
PROCESS_BASELINE = {"cpu": 410_000_000, "cuda": 1_500_000_000}

#: Elements of a chunk of logits (parallel/logprob.py) and of the sampler's float64 rows (rollout/sampling.py).
CHUNK_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 27}
SAMPLING_ELEMENTS = 16_000_000

#: The cache grows by so many tokens at a time (rollout/cache.py).
CACHE_GROWTH = 64


@dataclass(frozen=True)
class Phase:
    """What one phase needs at its peak beside what stays: named parts, in bytes."""

    name: str
    parts: tuple[tuple[str, float], ...]

    @property
    def bytes(self) -> float:
        return sum(size for _, size in self.parts)


@dataclass(frozen=True)
class StageMemory:
    """One process of a pipeline stage, in bytes."""

    stage: int
    process_baseline: float
    parameters: float
    gradients: float  # Megatron-core's main_grad, float32
    main_weights: float  # float32 copies under bf16
    optimizer_moments: float
    communication: float  # buffers that stay
    phases: tuple[Phase, ...]

    @property
    def resident(self) -> float:
        """What is there in every phase."""
        parts = (self.parameters, self.gradients, self.main_weights, self.optimizer_moments, self.communication)
        return self.process_baseline + sum(parts)

    @property
    def peak_phase(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def peak(self) -> float:
        return self.resident + self.peak_phase.bytes


def stage_memory(plan: Plan, stage: int, process_baseline: float | None = None) -> StageMemory:
    """process_baseline None: PROCESS_BASELINE's."""
    count = stage_parameters(plan, stage)
    if process_baseline is None:
        process_baseline = PROCESS_BASELINE["cuda" if plan.on_cuda else "cpu"]
    phases = [_rollout(plan, stage), _score(plan, stage), _train(plan, stage), _update(plan, count)]
    return StageMemory(
        stage=stage,
        process_baseline=process_baseline,
        parameters=plan.element * count.total,
        gradients=4 * count.total,
        main_weights=4 * optimized(plan, count) if plan.element == 2 else 0,
        optimizer_moments=_moments(plan) * 4 * optimized(plan, count),
        communication=_communication(plan),
        phases=tuple(phases),
    )


def optimized(plan: Plan, count: Parameters) -> float:
    """Elements whose optimizer state is on one process."""
    if plan.config.parallel.use_distributed_optimizer:
        return count.shared / plan.dp + count.experts / plan.expert_dp
    return count.total


def _moments(plan: Plan) -> int:
    o = plan.config.optimizer
    return 2 if o.optimizer == "adam" else int(o.sgd_momentum > 0)


def _communication(plan: Plan) -> float:
    """Megatron-core's buffer for rows gathered under sequence parallelism, kept at its largest size."""
    if plan.split == 1:
        return 0
    prompts = max(prompts for _, prompts in plan.busiest_waves) * plan.lengths.prompt
    tokens = max(_largest_row(plan), prompts)
    return tokens * plan.element * plan.architecture.hidden_size


def _largest_row(plan: Plan) -> int:
    return plan.row_tokens(max(plan.micro_batches(plan.replica_rationales)))


def chunk_tokens(plan: Plan) -> int:
    """Head rows whose logits exist at one time (parallel/logprob.py: default_chunk_tokens)."""
    return max(32, CHUNK_ELEMENTS["cuda" if plan.on_cuda else "cpu"] // plan.vocab_rows)


def _rollout(plan: Plan, stage: int) -> Phase:
    """The fullest moment: prefill, a decoding pass, sampling behind one, or scoring y* from the cache."""
    w, chunks, r = activations.widths(plan), plan.stages[stage], plan.config.rollout
    rows, prompts = max(plan.busiest_waves)
    prompt_tokens = prompts * plan.lengths.prompt
    per_token = 2 * plan.element * w.key * sum(chunk.layers for chunk in chunks)
    cache = per_token * (prompt_tokens + rows * -(-plan.fed_tokens // CACHE_GROWTH) * CACHE_GROWTH)
    moments = [
        (("KV cache", per_token * prompt_tokens), ("layers' working memory", activations.forward_working(plan, prompt_tokens))),
        (("KV cache", cache), ("layers' working memory", activations.decode_working(plan, rows))),
        (("KV cache", cache), ("layers' working memory", _tail_working(plan, rows))),
    ]
    if any(chunk.heads for chunk in chunks):
        each = 16 if r.temperature == 0 else 24 if r.top_p == 1 else 41  # bytes an element of the float64 rows
        workspace = each * min(rows, max(1, SAMPLING_ELEMENTS // plan.vocab_rows)) * plan.vocab_rows
        logits = 4 * rows * plan.vocab_rows
        moments.append((("KV cache", cache), ("logits", logits), ("sampling workspace", workspace)))
    return _fullest("rollout", moments)


def _fullest(name: str, moments: list[tuple[tuple[str, float], ...]]) -> Phase:
    return Phase(name, max(moments, key=lambda parts: sum(size for _, size in parts)))


def _tail_working(plan: Plan, rows: int) -> float:
    """Scoring y* from the cache: a layer's cached keys and values copied twice, scores twice, masks."""
    tail = plan.tail_tokens
    if tail == 0:
        return 0
    w, cached = activations.widths(plan), plan.fed_tokens
    copies = 2 * rows * plan.element * (2 * w.key * cached + 2 * w.key * (cached + tail)) / 2
    scores = 3 * 4 * rows * tail * w.heads * (plan.lengths.prompt + cached + tail)
    return copies + scores + rows * tail * plan.element * (3 * w.hidden + 2 * w.mixed)


def _score(plan: Plan, stage: int) -> Phase:
    """The trainer's forward pass; with --score-with rollout only of the steps that compare."""
    r = plan.config.rollout
    if plan.scores_in_rollout and r.score_check_interval == 0:
        return Phase("score", ())
    sequences = max(plan.micro_batches(plan.replica_rationales))
    tokens = plan.row_tokens(sequences)
    layers = activations.forward_working(plan, tokens)
    rows = sequences * plan.lengths.answer
    head = _logits(plan, rows, alive=2) + rows * plan.element * plan.architecture.hidden_size
    head += tokens * plan.element * plan.architecture.hidden_size
    if head > layers and any(chunk.heads for chunk in plan.stages[stage]):
        return Phase("score", (("head chunk", head),))
    return Phase("score", (("layers' working memory", layers),))


def _logits(plan: Plan, rows: int, *, alive: int) -> float:
    """Bytes of the head's chunks of logits: float32, and the product itself where that is bfloat16."""
    chunk = min(rows, chunk_tokens(plan))
    chunks = alive if rows > chunk else 1
    return chunk * plan.vocab_rows * (4 * chunks + (2 if plan.element == 2 else 0))


def in_flight(plan: Plan, stage: int, micro_batches: int) -> list[int]:
    """Micro-batches of each chunk whose activations a stage holds at the schedule's peak (Megatron-core's 1F1B)."""
    chunks = len(plan.stages[stage])
    if chunks == 1:
        return [min(plan.pp - stage, micro_batches)]
    warm_up = (plan.pp - stage - 1) * 2 + (chunks - 1) * plan.pp
    passes = min(warm_up + 1, chunks * micro_batches)
    held = [0] * chunks
    for number in range(passes):  # rounds of pp micro-batches through each chunk in turn
        held[number // plan.pp % chunks] += 1
    return held


def _train(plan: Plan, stage: int) -> Phase:
    """The fullest moment of forward and backward passes: at the head, in a layer, or at the embedding's gradient."""
    counts = plan.micro_batches(plan.replica_rationales)
    sequences, chunks = max(counts), plan.stages[stage]
    tokens = plan.row_tokens(sequences)
    held = in_flight(plan, stage, len(counts))
    saved = [activations.chunk_saved(plan, chunk, tokens) for chunk in chunks]
    kept = sum(n * size for n, size in zip(held, saved, strict=True))
    moments = []
    for chunk, size in zip(chunks, saved, strict=True):
        again = tokens * activations.recomputed_layers(plan, chunk.layers) * activations.layer_saved(plan)
        own = size if not chunk.heads else size - activations.chunk_saved(plan, Chunk(0, False, True), tokens)
        working = activations.backward_working(plan, chunk, tokens)
        moments.append((("saved activations", kept - size + own + again), ("layers' working memory", working)))
        if chunk.heads:
            moments.append((("saved activations", kept), ("head chunk", _head_working(plan, sequences, tokens))))
        if chunk.embeds:
            table = plan.element * plan.vocab_rows * plan.architecture.hidden_size
            row = tokens * plan.element * plan.architecture.hidden_size
            moments.append((("saved activations", kept - size), ("embedding's gradient", table + row)))
    if plan.config.parallel.use_distributed_optimizer and plan.dp > 1 and not plan.on_cuda:
        # gloo reduces and scatters a copy of the whole buffer
        moments.append((("copy of the gradients", 4 * stage_parameters(plan, stage).total),))
    return _fullest("train", moments)


def _head_working(plan: Plan, sequences: int, tokens: int) -> float:
    """Logits, the rows with their gradient, and hidden states gathered or kept for the rows' gradient."""
    hidden, e = plan.architecture.hidden_size, plan.element
    rows = sequences * (plan.lengths.rationale + plan.lengths.answer)
    table = plan.vocab_rows * hidden
    total = 2 * rows * e * hidden + tokens * e * hidden * (1 + (plan.split > 1) / plan.split)
    if plan.config.rollout.top_p < 1:  # linear_log_probs with a nucleus: bisection, and its own backward pass
        chunk = min(rows, chunk_tokens(plan))
        return total + max(41 * chunk * plan.vocab_rows, _logits(plan, rows, alive=2) + table * (4 + 2 * e))
    total += _logits(plan, rows, alive=2 if plan.tp > 1 else 1)
    return total + (2 * table if e == 2 else 0)  # the weight's gradient of one chunk, before it is added in float32


def _update(plan: Plan, count: Parameters) -> Phase:
    """Adam's temporaries: torch's, one parameter at a time on CPU and all at once on CUDA; fused kernels have none."""
    if plan.config.optimizer.optimizer != "adam" or plan.transformer_engine:
        return Phase("update", ())
    own = optimized(plan, count)
    if plan.on_cuda:
        return Phase("update", (("Adam's temporaries", 4 * own),))
    return Phase("update", (("Adam's temporaries", 2 * 4 * min(count.largest, own)),))
