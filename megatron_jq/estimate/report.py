"""F4: the estimate of one layout, gathered: figures for JSON, tables for a terminal."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_jq.estimate.arithmetic import PHASES, StageFlops, Work, stage_flops, step_work
from megatron_jq.estimate.memory import StageMemory, stage_memory
from megatron_jq.estimate.parameters import stage_parameters
from megatron_jq.estimate.plan import Plan
from megatron_jq.estimate.traffic import Message, stage_traffic

GIB = 1 << 30

#: Parts of a phase (memory.py) → column of the table.
_COLUMN = {
    "saved activations": "activations",
    "layers' working memory": "activations",
    "head chunk": "head",
    "logits": "head",
    "sampling workspace": "head",
    "KV cache": "kv_cache",
    "embedding's gradient": "temporaries",
    "copy of the gradients": "temporaries",
    "Adam's temporaries": "temporaries",
}


@dataclass(frozen=True)
class MemoryFigures:
    """Bytes of one process. Activations, head, KV cache and temporaries are each at their own largest; the peak adds
    to what stays only those that are there at the same time, and what the allocator keeps of the others.
    """

    baseline: float
    parameters: float
    gradients: float
    optimizer: float  # main weights and moments
    communication: float
    activations: float
    head: float
    kv_cache: float
    temporaries: float
    peak: float
    peak_phase: str
    kept_by_allocator: float  # of the peak


@dataclass(frozen=True)
class StageEstimate:
    """One process of a pipeline stage in the busiest replica."""

    stage: int
    layers: int
    parameters: int
    memory: MemoryFigures
    flops: StageFlops
    messages: list[Message]

    @property
    def wire_bytes(self) -> float:
        return sum(message.wire_bytes for message in self.messages)


@dataclass(frozen=True)
class Estimate:
    """One step of one layout."""

    model: str
    estimator: str
    updates: int  # training passes a step
    params_dtype: str
    device: str
    world_size: int
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    data_parallel_size: int
    expert_model_parallel_size: int
    sequence_parallel: bool
    prompts_per_step: int
    num_rationales: int
    prompt_tokens: int
    rationale_tokens: int
    joint_tokens: int
    answer_tokens: int
    vocab_size: int
    share_prompts: str
    busiest_replica_rationales: int  # that it trains on
    idle_replicas: int  # without a rationale
    micro_batches: int  # of the busiest replica
    micro_batch_tokens: int  # of the largest one
    work: list[Work]
    flops: StageFlops  # over all processes
    stages: list[StageEstimate]

    @property
    def fullest_stage(self) -> StageEstimate:
        return max(self.stages, key=lambda stage: stage.memory.peak)

    @property
    def tokens(self) -> tuple[int, int]:
        """Positions of the step over all replicas: (computed, if every rationale brought a prompt of its own)."""
        return sum(work.tokens for work in self.work), sum(work.tokens_unshared for work in self.work)

    def as_json(self) -> dict:
        return asdict(self)


def memory_figures(memory: StageMemory) -> MemoryFigures:
    largest = dict.fromkeys(_COLUMN.values(), 0.0)
    for moment in (moment for phase in memory.phases for moment in phase.moments):
        here = dict.fromkeys(largest, 0.0)
        for part in moment.parts:
            here[_COLUMN[part.name]] += part.bytes
        largest = {column: max(size, here[column]) for column, size in largest.items()}
    peak_phase = memory.peak_phase
    return MemoryFigures(
        baseline=memory.process_baseline,
        parameters=memory.parameters,
        gradients=memory.gradients,
        optimizer=memory.main_weights + memory.optimizer_moments,
        communication=memory.communication,
        peak=memory.peak,
        peak_phase=peak_phase.name,
        kept_by_allocator=memory.kept_by_allocator(memory.fullest(peak_phase)),
        **largest,
    )


def estimate(plan: Plan) -> Estimate:
    """All figures of a plan."""
    c = plan.config
    stages = [
        StageEstimate(
            stage=stage,
            layers=sum(chunk.layers for chunk in plan.stages[stage]),
            parameters=stage_parameters(plan, stage).total,
            memory=memory_figures(stage_memory(plan, stage)),
            flops=stage_flops(plan, stage, [plan.busiest_replica]),
            messages=stage_traffic(plan, stage),
        )
        for stage in range(plan.pp)
    ]
    everyone = [stage_flops(plan, stage, list(range(plan.dp))) for stage in range(plan.pp)]
    return Estimate(
        model=c.model.model,
        estimator=c.objective.estimator,
        updates=plan.updates,
        params_dtype=c.model.params_dtype,
        device="cuda" if plan.on_cuda else "cpu",
        world_size=plan.derived.world_size,
        tensor_model_parallel_size=plan.tp,
        pipeline_model_parallel_size=plan.pp,
        data_parallel_size=plan.dp,
        expert_model_parallel_size=plan.ep,
        sequence_parallel=plan.split > 1,
        prompts_per_step=c.rollout.prompts_per_step,
        num_rationales=c.rollout.num_rationales,
        prompt_tokens=plan.lengths.prompt,
        rationale_tokens=plan.lengths.rationale,
        joint_tokens=plan.lengths.bridge,
        answer_tokens=plan.lengths.answer,
        vocab_size=plan.vocab_size,
        share_prompts=c.training.share_prompts,
        busiest_replica_rationales=sum(row.sequences for row in plan.busiest_rows),
        idle_replicas=max(0, plan.dp - plan.rationales),
        micro_batches=len(plan.busiest_rows),
        micro_batch_tokens=plan.largest_row,
        work=step_work(plan),
        flops=StageFlops(**{phase: plan.tp * sum(getattr(f, phase) for f in everyone) for phase in PHASES}),
        stages=stages,
    )


def verdict(found: Estimate, limit_bytes: float) -> tuple[bool, str]:
    """(whether every process stays within the limit, a line that says so)."""
    stage = found.fullest_stage
    fits = stage.memory.peak <= limit_bytes
    words = "fits in" if fits else "does not fit in"
    where = f"stage {stage.stage} peaks at {_gib(stage.memory.peak)} GiB in {stage.memory.peak_phase}"
    return fits, f"{words} {_gib(limit_bytes)} GiB a process: {where}"


def text(found: Estimate) -> str:
    """The whole estimate, for a terminal and for Markdown."""
    parts = [_heading(found), _memory_table(found), _work_table(found), _message_table(found)]
    return "\n\n".join(parts)


def _heading(e: Estimate) -> str:
    expert = f" EP {e.expert_model_parallel_size}" if e.expert_model_parallel_size > 1 else ""
    sequence = ", sequence parallel" if e.sequence_parallel else ""
    idle = f"; {e.idle_replicas} replicas have none" if e.idle_replicas else ""
    return "\n".join(
        (
            f"model: {e.model}, {e.params_dtype}, vocabulary of {e.vocab_size}",
            f"layout: {e.world_size} process(es) on {e.device}: TP {e.tensor_model_parallel_size} "
            f"PP {e.pipeline_model_parallel_size} DP {e.data_parallel_size}{expert}{sequence}",
            f"step: {_step(e)}",
            f"busiest replica: {e.busiest_replica_rationales} {_sequences(e)} in {e.micro_batches} micro-batches of at "
            f"most {e.micro_batch_tokens} tokens{idle}",
            _tokens(e),
        )
    )


def _sequences(e: Estimate) -> str:
    return "rows" if e.estimator == "pretrain" else "rationales"


def _step(e: Estimate) -> str:
    """What a step takes in."""
    if e.estimator == "pretrain":
        return f"{e.prompts_per_step} rows of {e.prompt_tokens + e.answer_tokens} tokens"
    given = e.estimator == "sft"
    rationales = "given rationales" if given else f"x {e.num_rationales} rationales"
    closed = f"rationale {e.rationale_tokens} {'with' if given else 'and'} its close token"
    bridge = f", bridge {e.joint_tokens}" if e.joint_tokens else ""
    updates = f"; {e.updates} updates" if e.updates > 1 else ""
    lengths = f"prompt {e.prompt_tokens}, {closed}{bridge}, answer {e.answer_tokens}"
    return f"{e.prompts_per_step} prompts {'with ' if given else ''}{rationales}; tokens: {lengths}{updates}"


def _tokens(e: Estimate) -> str:
    computed, unshared = e.tokens
    alone = "" if e.num_rationales == 1 else f"; {unshared} if every rationale brought a prompt of its own"
    return f"tokens through the layers: {computed}{alone}"


def _memory_table(e: Estimate) -> str:
    names = ("parameters", "gradients", "optimizer", "activations", "head", "kv_cache", "temporaries")
    headings = ["stage", "layers", *names, "baseline", "kept", "peak", "in"]
    rows = [
        [
            str(s.stage),
            str(s.layers),
            *(_gib(getattr(s.memory, name)) for name in names),
            _gib(s.memory.baseline + s.memory.communication),
            _gib(s.memory.kept_by_allocator),
            _gib(s.memory.peak),
            s.memory.peak_phase,
        ]
        for s in e.stages
    ]
    return "GiB of one process:\n\n" + _table([h.replace("kv_cache", "KV cache") for h in headings], rows)


def _work_table(e: Estimate) -> str:
    busiest = max(e.stages, key=lambda stage: stage.flops.step)
    rows = [
        [
            work.phase,
            str(work.tokens),
            str(work.tokens_unshared),
            str(work.head_rows),
            str(work.passes),
            f"{getattr(e.flops, work.phase) / 1e12:.3f}",
            f"{getattr(busiest.flops, work.phase) / 1e12:.3f}",
        ]
        for work in e.work
    ]
    computed, unshared = e.tokens
    totals = [sum(getattr(work, name) for work in e.work) for name in ("head_rows", "passes")]
    flops = [f"{figures.step / 1e12:.3f}" for figures in (e.flops, busiest.flops)]
    rows.append(["step", str(computed), str(unshared), *map(str, totals), *flops])
    headings = ["phase", "tokens", "unshared", "head rows", "passes", "TFLOP", "TFLOP of busiest process"]
    return _table(headings, rows)


def _message_table(e: Estimate) -> str:
    """Of the stage that has the most to send: a line a phase, group and kind."""
    stage = max(e.stages, key=lambda one: one.wire_bytes)
    sums: dict[tuple[str, str, str, int], list[float]] = {}
    for m in stage.messages:
        entry = sums.setdefault((m.phase, m.group, m.kind, m.ranks), [0, 0, 0])
        for i, value in enumerate((m.calls, m.bytes, m.wire_bytes)):
            entry[i] += value
    rows = [
        [phase, group, str(ranks), kind, str(calls), f"{size / 1e6:.2f}", f"{wire / 1e6:.2f}"]
        for (phase, group, kind, ranks), (calls, size, wire) in sums.items()
    ]
    if not rows:
        return "no messages: one process"
    headings = ["phase", "group", "ranks", "kind", "calls", "MB", "MB to send"]
    return f"messages of a process of stage {stage.stage}:\n\n" + _table(headings, rows)


def sweep_table(found: Sequence[Estimate], limit_bytes: float | None) -> str:
    """A line a world size."""
    headings = ["processes", "TP", "PP", "DP", "EP", "rationales", "micro-batches", "tokens a pass", "peak GiB", "in"]
    headings += ["TFLOP", "GB to send"] + ["fits"] * (limit_bytes is not None)
    rows = []
    for e in found:
        fullest = e.fullest_stage
        row = [e.world_size, e.tensor_model_parallel_size, e.pipeline_model_parallel_size, e.data_parallel_size]
        row += [e.expert_model_parallel_size, e.busiest_replica_rationales, e.micro_batches, e.micro_batch_tokens]
        row += [_gib(fullest.memory.peak), fullest.memory.peak_phase]
        row += [f"{max(s.flops.step for s in e.stages) / 1e12:.2f}"]
        row += [f"{max(s.wire_bytes for s in e.stages) / 1e9:.2f}"]
        row += [] if limit_bytes is None else ["yes" if verdict(e, limit_bytes)[0] else "no"]
        rows.append([str(cell) for cell in row])
    return "figures of the busiest replica's busiest process:\n\n" + _table(headings, rows)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _table(headings: list[str], rows: list[list[str]]) -> str:
    """Markdown, aligned for a terminal too."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([line(headings), rule, *map(line, rows)])
