"""F4: the estimate of one layout, gathered from its parts."""

from dataclasses import asdict, dataclass
from typing import Any

from megatron_jq.estimate.arithmetic import PHASES, StageFlops, Work, stage_flops, step_work
from megatron_jq.estimate.memory import StageMemory, stage_memory
from megatron_jq.estimate.parameters import stage_parameters
from megatron_jq.estimate.plan import Plan
from megatron_jq.estimate.traffic import Message, stage_traffic

#: Parts of a phase (phases.py) → column of the table.
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
    updates: int  # training passes per step
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

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def memory_figures(memory: StageMemory) -> MemoryFigures:
    largest = dict.fromkeys(_COLUMN.values(), 0.0)
    for moment in (moment for phase in memory.phases for moment in phase.moments):
        sizes = dict.fromkeys(largest, 0.0)
        for part in moment.parts:
            sizes[_COLUMN[part.name]] += part.bytes
        largest = {column: max(size, sizes[column]) for column, size in largest.items()}
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
