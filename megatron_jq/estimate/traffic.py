"""F4: what one process of each pipeline stage sends and receives in a step: collectives by phase, group and kind.

Bytes are those of a call's input or output on this process, whichever is more, as bench/meters.py counts them. Small
exchanges of a step are named in docs/estimate.md and left out: agreement on metrics, sequences moved by the token
budget, sums of experts' balance, and whether expert-parallel peers are at work.
"""

from dataclasses import dataclass, replace

from megatron_jq.estimate.parameters import stage_parameters
from megatron_jq.estimate.phases import chunk_tokens
from megatron_jq.estimate.plan import Chunk, Plan

FLOAT32, FLOAT64, INT64 = 4, 8, 8
#: A stage sends the next one the shape of what follows, as three 64-bit numbers.
SHAPE = 3 * INT64
#: Sums over tokens that an update with clipping or a reference leaves (objective/clipping.py: TokenFigures).
TOKEN_FIGURES = 5


@dataclass(frozen=True)
class Message:
    """Calls of one kind for one purpose, in one phase of one step."""

    phase: str
    group: str  # tp, pp, dp, ep, etp (who shares an expert), or the product of several
    kind: str  # all-reduce, all-gather, reduce-scatter, all-to-all, broadcast, send, receive
    purpose: str
    calls: int
    bytes: float  # of all calls together
    ranks: int  # of the group

    @property
    def wire_bytes(self) -> float:
        """Bytes that this process has to send at least: rings for collectives."""
        others = (self.ranks - 1) / self.ranks
        factor = {"all-reduce": 2 * others, "all-gather": others, "reduce-scatter": others, "all-to-all": others}
        return self.bytes * factor.get(self.kind, 0.0 if self.kind == "receive" else 1.0)


def stage_traffic(plan: Plan, stage: int) -> list[Message]:
    """Messages of a process of this stage in the busiest replica; those of groups of one process are left out."""
    messages = [*_rollout(plan, stage), *_scoring(plan, stage), *_updates(plan, stage)]
    return [message for message in messages if message.calls and message.ranks > 1]


class _Rows:
    """Messages of the activations of forward (and backward) passes over rows of these lengths."""

    def __init__(self, plan: Plan, phase: str, rows: list[int], *, backward: bool) -> None:
        self.plan, self.phase, self.backward = plan, phase, backward
        self.passes = len(rows)
        self.bytes = sum(rows) * plan.element * plan.architecture.hidden_size  # of all rows, each one whole

    def message(self, group: str, kind: str, purpose: str, times: int, size: float | None = None) -> Message:
        ranks = {"tp": self.plan.tp, "pp": self.plan.pp, "ep": self.plan.ep, "etp": self.plan.etp}[group]
        call_bytes = self.bytes if size is None else size
        return Message(self.phase, group, kind, purpose, times * self.passes, times * call_bytes, ranks)

    def of_chunk(self, chunk: Chunk, *, head: bool) -> list[Message]:
        """Tensor- and expert-parallel ones of one model chunk. head: hidden states also go backward from the head."""
        return [*self._layers(chunk.layers), *self._edges(chunk, head=head), *self._experts(chunk.layers)]

    def _forward_layers(self, layers: int) -> int:
        """Layers that one pass goes forward through, recomputed ones twice."""
        p = self.plan.config.parallel
        if not self.backward or p.recompute_granularity != "full":
            return layers
        return layers + (layers if p.recompute_method == "uniform" else min(layers, p.recompute_num_layers))

    def _layers(self, layers: int) -> list[Message]:
        # attention, and the dense block: experts' rows travel otherwise
        blocks = 2 if self.plan.architecture.num_experts is None else 1
        forward, backward = blocks * self._forward_layers(layers), blocks * layers * self.backward
        if self.plan.split == 1:
            return [self.message("tp", "all-reduce", "layers", forward + backward)]
        gathers = forward + 2 * backward  # backward: the rows again for the weights' gradients, and what comes in
        return [
            self.message("tp", "all-gather", "layers", gathers),
            self.message("tp", "reduce-scatter", "layers", forward + backward),
        ]

    def _edges(self, chunk: Chunk, *, head: bool) -> list[Message]:
        messages, split = [], self.plan.split > 1
        if chunk.embeds:
            messages.append(self.message("tp", "reduce-scatter" if split else "all-reduce", "embedding", 1))
            if split and self.backward:
                messages.append(self.message("tp", "all-gather", "embedding", 1))
        if chunk.heads and split:
            messages.append(self.message("tp", "all-gather", "hidden states of the head", 1))
        if chunk.heads and head and self.backward:
            kind = "reduce-scatter" if split else "all-reduce"
            messages.append(self.message("tp", kind, "gradient of the head's hidden states", 1))
        return messages

    def _experts(self, layers: int) -> list[Message]:
        """Tokens on their way to experts and back with their probabilities, copies evenly spread."""
        plan, a = self.plan, self.plan.architecture
        if a.num_experts is None:
            return []
        tokens = self.bytes * a.moe_router_topk / plan.split
        probabilities = tokens / (plan.element * a.hidden_size) * FLOAT32
        forward, backward = self._forward_layers(layers), layers * self.backward
        ranks = plan.ep * plan.etp
        counts = self.passes * ranks * a.num_experts * INT64
        messages = [
            self.message("ep", "all-to-all", "tokens to experts and back", 2 * (forward + backward), tokens),
            self.message("ep", "all-to-all", "their probabilities", forward + backward, probabilities),
            Message(
                self.phase, "tp·ep", "all-gather", "tokens per expert", forward * self.passes, forward * counts, ranks
            ),
        ]
        # on CPU parts of unequal length are summed whole (parallel/megatron/cpu.py)
        scatter = "reduce-scatter" if plan.on_cuda else "all-reduce"
        for what, size, back in (("tokens", tokens, 1), ("probabilities", probabilities, 0)):
            purpose, size = f"{what} among an expert's processes", size * plan.etp
            messages += [
                self.message("etp", "all-gather", purpose, forward + back * backward, size),
                self.message("etp", scatter, purpose, back * forward + backward, size),
            ]
        return messages

    def between_stages(self, stage: int) -> list[Message]:
        """Of a process: its chunks' rows to and from the neighbours, with their shapes where lengths vary."""
        chunks = self.plan.stages[stage]
        out = sum(not chunk.heads for chunk in chunks)
        inward = sum(not chunk.embeds for chunk in chunks)
        size = self.bytes / self.plan.split
        if self.phase == "rollout":
            return [
                self.message("pp", "send", "hidden states", out, size),
                self.message("pp", "receive", "hidden states", inward, size),
            ]
        sends, receives = (out + inward, inward + out) if self.backward else (out, inward)
        shapes = self.passes * SHAPE
        return [
            self.message("pp", "send", "hidden states and gradients", sends, size),
            self.message("pp", "receive", "hidden states and gradients", receives, size),
            self.message("pp", "send", "shapes", sends, shapes),
            self.message("pp", "receive", "shapes", receives, shapes),
        ]


def _rollout(plan: Plan, stage: int) -> list[Message]:
    lengths, waves, drawn = plan.lengths, plan.busiest_waves, plan.drawn_tokens
    rows = [prompts * lengths.prompt for _, prompts in waves]
    rows += [count for count, _ in waves for _ in range(plan.fed_tokens)]
    rows += [count * plan.tail_tokens for count, _ in waves] if plan.tail_tokens else []
    passes = _Rows(plan, "rollout", [-(-row // plan.split) * plan.split for row in rows], backward=False)
    chunks, rationales = plan.stages[stage], sum(count for count, _ in waves)
    messages = [message for chunk in chunks for message in passes.of_chunk(chunk, head=False)]
    messages += passes.between_stages(stage)
    draws, size = drawn * len(waves), drawn * rationales * FLOAT64
    if any(chunk.heads for chunk in chunks):
        messages.append(Message("rollout", "tp", "all-gather", "sampling", draws, size * plan.tp, plan.tp))
        messages.append(Message("rollout", "tp", "all-reduce", "sampling", draws, 2 * size, plan.tp))
        if plan.config.rollout.top_p < 1:
            messages.append(Message("rollout", "tp", "all-gather", "nucleus", draws, 3 * size // 2 * plan.tp, plan.tp))
            messages.append(Message("rollout", "tp", "all-reduce", "nucleus", 32 * draws, 32 * size, plan.tp))
        if plan.tail_tokens:
            size = 3 * FLOAT32 * rationales * lengths.answer * plan.tp
            messages.append(Message("rollout", "tp", "all-gather", "head", len(waves), size, plan.tp))
    messages.append(
        Message("rollout", "pp", "broadcast", "drawn tokens", draws, 2 * drawn * rationales * FLOAT64, plan.pp)
    )
    if plan.tail_tokens:
        messages.append(Message("rollout", "pp", "broadcast", "ln w", len(waves), rationales * FLOAT64, plan.pp))
    return messages


def _scoring(plan: Plan, stage: int) -> list[Message]:
    """Score, and the reference's pass."""
    messages: list[Message] = []
    if not plan.imitates:
        by_trainer, size = not plan.scores_in_rollout, _table_bytes(plan)
        messages += _tables(plan, "score", size, "table of log-likelihoods", stages=by_trainer)
        messages += _pass(plan, stage, "score") if by_trainer else []
    if plan.derived.samples_answers:
        messages += _tables(plan, "score", FLOAT64 * plan.rationales, "rewards", stages=False)
    if plan.has_reference:
        messages += _pass(plan, stage, "reference")
    return messages


def _updates(plan: Plan, stage: int) -> list[Message]:
    """All updates' passes and what reduces their gradients."""
    messages = _tables(plan, "train", _table_bytes(plan), "table of log-likelihoods", stages=True)
    messages += _pass(plan, stage, "train")
    if plan.updates > 1 or plan.has_reference:
        messages += _tables(plan, "train", TOKEN_FIGURES * FLOAT64, "figures of tokens", stages=True)
    messages += _reductions(plan, stage)
    n = plan.updates
    return [replace(message, calls=n * message.calls, bytes=n * message.bytes) for message in messages]


def _table_bytes(plan: Plan) -> int:
    """Of the step's table, with what ranks count beside it (train/passes.py: _empty_table)."""
    return FLOAT64 * (3 * plan.rationales + 2)


def _tables(plan: Plan, phase: str, size: int, purpose: str, *, stages: bool) -> list[Message]:
    """What the head computed: from the last stage to the others (stages), then summed over replicas."""
    summed = Message(phase, "dp", "all-reduce", purpose, 1, size, plan.dp)
    return [*([Message(phase, "pp", "broadcast", purpose, 1, size, plan.pp)] * stages), summed]


def _pass(plan: Plan, stage: int, phase: str) -> list[Message]:
    """All micro-batches once, forward, and in training backward."""
    passes = _Rows(plan, phase, [row.tokens for row in plan.busiest_rows], backward=phase == "train")
    messages = passes.between_stages(stage)
    for chunk in plan.stages[stage]:
        messages += passes.of_chunk(chunk, head=True)
        messages += _head(plan, phase) if chunk.heads else []
    return messages


def _head(plan: Plan, phase: str) -> list[Message]:
    """Three numbers per row and process: per micro-batch in scoring, per chunk in training and of a reference."""
    lengths = plan.lengths
    each = lengths.answer + (lengths.rationale if phase != "score" else 0)
    rows, nucleus = [row.sequences * each for row in plan.busiest_rows], plan.has_nucleus and phase != "score"
    size, chunks = 3 * FLOAT32 * sum(rows) * plan.tp, sum(max(1, -(-n // chunk_tokens(plan))) for n in rows)
    calls = chunks if phase != "score" and not nucleus else len(rows)
    messages = [Message(phase, "tp", "all-gather", "head", calls, size, plan.tp)]
    if nucleus:
        drawn = sum(row.sequences for row in plan.busiest_rows) * plan.drawn_tokens
        chunks = sum(_chunks_with_drawn(plan, each, n) for n in rows)
        messages.append(Message(phase, "tp", "all-gather", "nucleus", chunks, 3 * FLOAT32 * drawn * plan.tp, plan.tp))
        total = drawn * (32 * FLOAT64 + FLOAT32)
        messages.append(Message(phase, "tp", "all-reduce", "nucleus", 33 * chunks, total, plan.tp))
    return messages


def _chunks_with_drawn(plan: Plan, each: int, rows: int) -> int:
    """Chunks of a micro-batch's head rows, `each` of a sequence, that hold a drawn token: those come first."""
    size = chunk_tokens(plan)
    starts = range(0, rows, size)
    return sum(s % each < plan.drawn_tokens or (s // each + 1) * each < min(s + size, rows) for s in starts)


def _reductions(plan: Plan, stage: int) -> list[Message]:
    """Gradients over replicas, embedding ends and tensor-parallel processes; parameters after a sharded update."""
    count, p = stage_parameters(plan, stage), plan.config.parallel
    messages = []
    for name, elements, ranks in (("", count.shared, plan.dp), (" of experts", count.experts, plan.expert_dp)):
        calls = int(elements > 0)
        if p.overlap_grad_reduce and calls:  # Megatron-core's buckets
            calls = max(1, round(elements / max(40_000_000, 1_000_000 * ranks)))
        if p.use_distributed_optimizer:
            messages += [
                Message("train", "dp", "reduce-scatter", f"gradients{name}", calls, 4 * elements, ranks),
                Message("train", "dp", "all-gather", f"parameters{name}", calls, plan.element * elements, ranks),
            ]
        else:
            messages.append(Message("train", "dp", "all-reduce", f"gradients{name}", calls, 4 * elements, ranks))
    ends = any(chunk.embeds or chunk.heads for chunk in plan.stages[stage])
    if plan.architecture.tie_embeddings and ends:
        size = 4 * plan.vocab_rows * plan.architecture.hidden_size
        ranks = min(plan.pp, 2)
        messages.append(Message("train", "pp", "all-reduce", "gradient of the tied embedding", 1, size, ranks))
    norms = count.norms if plan.split > 1 else count.query_key_norms
    messages.append(Message("train", "tp", "all-reduce", "gradients of norms", int(norms > 0), 4 * norms, plan.tp))
    # over tensor- and pipeline-parallel processes, and over replicas where these share the optimizer's work
    ranks = plan.tp * plan.pp * (plan.dp if p.use_distributed_optimizer else 1)
    # Once: what the trainer looks at for faults is what it clips by.
    messages.append(Message("train", "tp·pp", "all-reduce", "gradient's norm", 1, FLOAT32, ranks))
    return messages
