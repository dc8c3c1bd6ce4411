"""F4: from what every rank measured to one report, as a table and as JSON."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

from megatron_jq.architecture import Architecture
from megatron_jq.bench.meters import Findings

PHASES = ("rollout", "score", "train")


@dataclass(frozen=True)
class Load:
    """What a step has to process, in tokens, and how often it is measured."""

    prompt_low: int  # prompt lengths are drawn evenly from low..high
    prompt_high: int
    rationale_tokens: int  # sampled ones; the close token comes on top
    answer_tokens: int
    vocab_size: int
    steps: int
    warmup: int
    copied_prompts: bool = False  # generation copies a prompt's keys and values to each rationale


@dataclass
class RankRecord:
    """What rank 0 needs of a rank to write the report."""

    counts: bool  # of the ranks of a replica, the one that stands for its tokens
    baseline_memory_bytes: int
    gemm_flop_per_second: float = 0.0
    cache_bytes: int = 0
    seconds: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})  # one per step
    findings: dict[str, Findings] = field(default_factory=dict)  # of one more step


@dataclass(frozen=True)
class PhaseFigures:
    """One phase of a step, over all processes. Memory is the worst process's, messages are the busiest one's."""

    phase: str
    seconds: float  # median over the measured steps, barrier to barrier
    tokens_needed: int  # positions no step can do without: each prompt once for all its rationales
    tokens_needed_prompt_repeated: int  # the same where each rationale brings its own copy of the prompt
    tokens_processed: int  # positions that went through the layers, padding included
    tokens_per_second: float  # processed ones
    flop_per_second: float  # of the parameters' matrix products at the processed positions
    share_of_gemm: float  # flop_per_second over the machine's own matrix product, measured in the same run
    peak_memory_bytes: int  # above the baseline
    messages: int  # collective and point-to-point calls of one step
    message_bytes: int  # of the tensors in them
    messages_by_kind: dict[str, tuple[int, int]]  # kind → (calls, bytes)


@dataclass(frozen=True)
class BenchReport:
    """All figures of one benchmark."""

    model: str
    params_dtype: str
    layer_parameters: int
    head_parameters: int
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    data_parallel_size: int
    sequence_parallel: bool
    device: str
    threads_per_process: int
    prompts_per_step: int
    num_rationales: int
    prompt_lengths: list[int]
    rationale_tokens: int
    answer_tokens: int
    micro_batch_size: int
    max_tokens_per_micro_batch: int | None
    score_with: str
    steps: int
    warmup: int
    gemm_flop_per_second: float  # summed over processes, which multiplied at the same time
    baseline_memory_bytes: int  # the largest process's after the model's build; Adam's state comes with the first step
    copied_prompts: bool
    share_prompts: bool
    cache_bytes: int  # most of keys and values on a process
    phases: list[PhaseFigures]  # rollout, score, train, and the whole step

    def as_json(self) -> dict:
        return asdict(self)


def positions_of_rollout(prompt_lengths: Sequence[int], num_rationales: int, rationale: int) -> tuple[int, int]:
    """Positions with each prompt (once, once per rationale). A rationale's last token is drawn, never fed."""
    drawn = len(prompt_lengths) * num_rationales * (rationale - 1)
    return sum(prompt_lengths) + drawn, sum(prompt_lengths) * num_rationales + drawn


def positions_of_pass(
    prompt_lengths: Sequence[int], num_rationales: int, rationale: int, answer: int
) -> tuple[int, int]:
    """The same for a pass over whole sequences: rationale, close token, and the answer but its last token.

    Also what a rollout computes that then scores y* from its cache.
    """
    suffix = len(prompt_lengths) * num_rationales * (rationale + 1 + answer - 1)
    return sum(prompt_lengths) + suffix, sum(prompt_lengths) * num_rationales + suffix


def positions_needed(
    prompt_lengths: Sequence[int], num_rationales: int, load: Load, *, score_with_rollout: bool
) -> dict[str, tuple[int, int]]:
    """Phase → positions to compute with each prompt (once, once per rationale)."""
    passed = positions_of_pass(prompt_lengths, num_rationales, load.rationale_tokens, load.answer_tokens)
    if score_with_rollout:
        return {"rollout": passed, "score": (0, 0), "train": passed}
    return {
        "rollout": positions_of_rollout(prompt_lengths, num_rationales, load.rationale_tokens),
        "score": passed,
        "train": passed,
    }


def matrix_parameters(architecture: Architecture, vocab_rows: int) -> tuple[int, int]:
    """Parameters that a position is multiplied with: (layers, head). Embedding look-ups and norms are no products.

    Of a layer with experts: its router and the experts that one token visits.
    """
    a = architecture
    attention = a.hidden_size * a.kv_channels * (2 * a.num_attention_heads + 2 * a.num_query_groups)
    if a.num_experts is None:
        block = 3 * a.hidden_size * a.ffn_hidden_size
    else:
        block = a.hidden_size * (a.num_experts + 3 * a.moe_router_topk * a.moe_ffn_hidden_size)
    return a.num_layers * (attention + block), vocab_rows * a.hidden_size


def phase_figures(
    records: list[RankRecord], needed: dict[str, tuple[int, int]], parameters: tuple[int, int]
) -> list[PhaseFigures]:
    """Rollout, score, train, and the step as their sum. needed: by phase, (each prompt once, once per rationale).

    FLOP: 2 per parameter and position forward, 4 more backward; attention's own products are left out.
    """
    gemm = sum(record.gemm_flop_per_second for record in records)
    seconds = records[0].seconds  # from barrier to barrier: alike on all ranks
    rows, flop_of_step = [], 0
    for phase in PHASES:
        processed = sum(record.findings[phase].positions for record in records if record.counts)
        in_head = sum(record.findings[phase].head_positions for record in records if record.counts)
        flop = (6 if phase == "train" else 2) * (parameters[0] * processed + parameters[1] * in_head)
        flop_of_step += flop
        peak = max(record.findings[phase].peak_memory_bytes for record in records)
        busiest = max((record.findings[phase].messages for record in records), key=_calls)
        tokens = (*needed[phase], processed)
        rows.append(_figures(phase, statistics.median(seconds[phase]), tokens, flop, gemm, peak, busiest))
    step_seconds = [sum(phases) for phases in zip(*seconds.values(), strict=True)]
    columns = zip(*((r.tokens_needed, r.tokens_needed_prompt_repeated, r.tokens_processed) for r in rows), strict=True)
    step = _figures(
        "step",
        statistics.median(step_seconds),
        tuple(map(sum, columns)),
        flop_of_step,
        gemm,
        max(row.peak_memory_bytes for row in rows),
        _added(row.messages_by_kind for row in rows),
    )
    return [*rows, step]


def _calls(kinds: dict[str, tuple[int, int]]) -> int:
    return sum(calls for calls, _ in kinds.values())


def _added(many: Iterable[dict[str, tuple[int, int]]]) -> dict[str, tuple[int, int]]:
    total: dict[str, tuple[int, int]] = {}
    for kinds in many:
        for kind, (calls, size) in kinds.items():
            before = total.get(kind, (0, 0))
            total[kind] = before[0] + calls, before[1] + size
    return total


def _figures(
    phase: str,
    seconds: float,
    tokens: tuple[int, ...],
    flop: int,
    gemm: float,
    peak: int,
    kinds: dict[str, tuple[int, int]],
) -> PhaseFigures:
    return PhaseFigures(
        phase=phase,
        seconds=seconds,
        tokens_needed=tokens[0],
        tokens_needed_prompt_repeated=tokens[1],
        tokens_processed=tokens[2],
        tokens_per_second=tokens[2] / seconds,
        flop_per_second=flop / seconds,
        share_of_gemm=flop / seconds / gemm,
        peak_memory_bytes=peak,
        messages=_calls(kinds),
        message_bytes=sum(size for _, size in kinds.values()),
        messages_by_kind=kinds,
    )


#: Column of the table → (heading, how a PhaseFigures shows in it).
COLUMNS = (
    ("phase", lambda f: f.phase),
    ("seconds", lambda f: f"{f.seconds:.3f}"),
    ("tokens needed", lambda f: f"{f.tokens_needed}"),
    ("prompt repeated", lambda f: f"{f.tokens_needed_prompt_repeated}"),
    ("processed", lambda f: f"{f.tokens_processed}"),
    ("tokens/s", lambda f: f"{f.tokens_per_second:.0f}"),
    ("GFLOP/s", lambda f: f"{f.flop_per_second / 1e9:.2f}"),
    ("of GEMM", lambda f: f"{100 * f.share_of_gemm:.1f} %"),
    ("peak MB", lambda f: f"{f.peak_memory_bytes / 1e6:.1f}"),
    ("messages", lambda f: f"{f.messages}"),
    ("message MB", lambda f: f"{f.message_bytes / 1e6:.2f}"),
)


def table(report: BenchReport) -> str:
    """Return a Markdown table, aligned for a terminal too: a line per phase."""
    cells = [[heading for heading, _ in COLUMNS]]
    cells += [[show(phase) for _, show in COLUMNS] for phase in report.phases]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]

    def line(row: list[str]) -> str:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "| " + " | ".join([row[0].ljust(widths[0]), *numbers]) + " |"

    rule = "|" + "-" * (widths[0] + 2) + "|" + "|".join("-" * (w + 1) + ":" for w in widths[1:]) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def heading(report: BenchReport) -> str:
    """Describe what was measured, in a few lines above the table."""
    r, shortest, longest = report, min(report.prompt_lengths), max(report.prompt_lengths)
    prompt = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
    processes = r.tensor_model_parallel_size * r.pipeline_model_parallel_size * r.data_parallel_size
    rows = f"{r.micro_batch_size} sequences"
    if r.max_tokens_per_micro_batch is not None:
        rows = f"at most {r.max_tokens_per_micro_batch} tokens"
    return "\n".join(
        (
            f"model: {r.model}, {r.params_dtype}; a token meets {r.layer_parameters / 1e6:.2f} M parameters in layers "
            f"and {r.head_parameters / 1e6:.2f} M in the head",
            f"layout: TP {r.tensor_model_parallel_size} PP {r.pipeline_model_parallel_size} DP {r.data_parallel_size}"
            f"{', sequence parallel' if r.sequence_parallel else ''}; "
            f"{processes} process(es) x {r.threads_per_process} thread(s) on {r.device}",
            f"step: {r.prompts_per_step} prompts x {r.num_rationales} rationales; tokens: prompt {prompt}, rationale "
            f"{r.rationale_tokens} and its close token, answer {r.answer_tokens}; micro-batches of {rows}; scored by "
            f"the {r.score_with}; median of {r.steps} steps after {r.warmup}",
            f"matrix product: {r.gemm_flop_per_second / 1e9:.1f} GFLOP/s over all processes; memory before the first "
            f"step: {r.baseline_memory_bytes / 1e6:.0f} MB per process; keys and values: {r.cache_bytes / 1e6:.1f} MB"
            f"{', each prompt copied to its rationales' if r.copied_prompts else ''}",
        )
    )
