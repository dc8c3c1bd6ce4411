"""F4: memory of one process of each pipeline stage: what stays, and the peak of each phase."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from megatron_jq.estimate.parameters import stage_parameters
from megatron_jq.estimate.phases import (
    Moment,
    Phase,
    optimized,
    rollout_phase,
    score_phase,
    train_phase,
    update_phase,
)
from megatron_jq.estimate.plan import Plan

#: Resident bytes of a process after its imports and the start of its groups. CPU: measured with torch 2.13 and
#: megatron-core 0.16.1 (docs/estimate.md); bfloat16 kernels bring workspace. CUDA: assumed, for context, libraries and
#: NCCL's buffers; torch.cuda.max_memory_allocated does not count it.
BASELINE_CPU, BASELINE_CPU_BF16, BASELINE_CUDA = 370_000_000, 480_000_000, 1_500_000_000

#: What a CUDA build of torch adds to a run on CPUs: its libraries, triton and the compiler. Measured with torch
#: 2.13.0+cu130 and megatron-core 0.19.2.
CUDA_BUILD_ON_CPU = 420_000_000

#: New blocks do not fill freed ones without gaps: glibc's heap grows to so many times the most that is alive in it,
#: where a step has one micro-batch, and where it has several. Measured (docs/estimate.md). Under
#: MALLOC_MMAP_THRESHOLD_=65536 freed blocks go back to the system at once.
HEAP_OF_ONE, HEAP_OF_SEVERAL = 1.4, 1.9


@dataclass(frozen=True)
class StageMemory:
    """One process of a pipeline stage, in bytes."""

    stage: int
    process_baseline: float
    parameters: float  # with those of a frozen reference (--grpo-kl-beta)
    gradients: float  # Megatron-core's main_grad, float32
    main_weights: float  # float32 copies under bf16
    optimizer_moments: float
    communication: float  # buffers that stay
    heap_growth: float | None  # glibc's heap for what is alive in it; None: freed memory is used again or returned
    phases: tuple[Phase, ...]

    @property
    def resident(self) -> float:
        """Bytes that are there in every phase."""
        parts = (self.parameters, self.gradients, self.main_weights, self.optimizer_moments, self.communication)
        return self.process_baseline + sum(parts)

    def kept_by_allocator(self, moment: Moment) -> float:
        """Bytes of freed blocks that this or another moment of a step left in the process."""
        if self.heap_growth is None:
            return 0
        largest = max(other.heap for phase in self.phases for other in phase.moments)
        return self.heap_growth * largest - moment.heap

    def total(self, moment: Moment) -> float:
        return self.resident + moment.bytes + self.kept_by_allocator(moment)

    def fullest(self, phase: Phase) -> Moment:
        """Return the moment that takes most of the system; among equals, the one of the most live bytes."""
        return max(phase.moments, key=lambda moment: (round(self.total(moment)), moment.bytes))

    @property
    def peak_phase(self) -> Phase:
        return max(self.phases, key=lambda phase: (round(self.peak_of(phase)), self.fullest(phase).bytes))

    def peak_of(self, phase: Phase) -> float:
        return self.total(self.fullest(phase))

    @property
    def peak(self) -> float:
        return self.peak_of(self.peak_phase)


def _is_cuda_build() -> bool:
    """Whether the installed torch is a CUDA build. It is not imported: that takes seconds."""
    torch = importlib.util.find_spec("torch")
    return torch is not None and any(Path(torch.origin).parent.glob("lib/*torch_cuda.*"))


def _baseline(plan: Plan) -> float:
    if plan.on_cuda:
        return BASELINE_CUDA
    of_type = BASELINE_CPU_BF16 if plan.element == 2 else BASELINE_CPU
    return of_type + CUDA_BUILD_ON_CPU * _is_cuda_build()


def stage_memory(plan: Plan, stage: int, *, keeps_freed: bool = True) -> StageMemory:
    """Return the memory of a process of this stage. keeps_freed False: only what is alive, which is all that CPU
    processes take under MALLOC_MMAP_THRESHOLD_=65536.
    """
    count = stage_parameters(plan, stage)
    several = len(plan.busiest_rows) > 1
    growth = HEAP_OF_SEVERAL if several else HEAP_OF_ONE
    copies = 2 if plan.has_reference else 1
    phases = (rollout_phase(plan, stage), score_phase(plan, stage), train_phase(plan, stage), update_phase(plan, count))
    return StageMemory(
        stage=stage,
        process_baseline=_baseline(plan),
        parameters=copies * plan.element * count.total,
        gradients=4 * count.total,
        main_weights=4 * optimized(plan, count) if plan.element == 2 else 0,
        optimizer_moments=_moments(plan) * 4 * optimized(plan, count),
        communication=_communication(plan),
        heap_growth=growth if keeps_freed and not plan.on_cuda else None,
        phases=phases,
    )


def _moments(plan: Plan) -> int:
    o = plan.config.optimizer
    return 2 if o.optimizer == "adam" else int(o.sgd_momentum > 0)


def _communication(plan: Plan) -> float:
    """Megatron-core's buffer for rows gathered under sequence parallelism, kept at its largest size."""
    if plan.split == 1:
        return 0
    prompts = max((prompts for _, prompts in plan.busiest_waves), default=0) * plan.lengths.prompt
    return max(plan.largest_row, prompts) * plan.element * plan.architecture.hidden_size
