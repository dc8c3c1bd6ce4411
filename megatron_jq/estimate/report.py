"""F4: the estimate of one layout as tables for a terminal."""

from collections.abc import Sequence

from megatron_jq.estimate.figures import Estimate
from megatron_jq.estimators import row_of

GIB = 1 << 30


def verdict(estimate: Estimate, limit_bytes: float) -> tuple[bool, str]:
    """Return whether every process stays within the limit, and a line about it."""
    stage = estimate.fullest_stage
    fits = stage.memory.peak <= limit_bytes
    words = "fits in" if fits else "does not fit in"
    peak = f"stage {stage.stage} peaks at {_gib(stage.memory.peak)} GiB in {stage.memory.peak_phase}"
    return fits, f"{words} {_gib(limit_bytes)} GiB per process: {peak}"


def text(estimate: Estimate) -> str:
    """Return the whole estimate, for a terminal and for Markdown."""
    parts = [_heading(estimate), _memory_table(estimate), _work_table(estimate), _message_table(estimate)]
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
    return "rows" if row_of(e.estimator).pretrains else "rationales"


def _step(e: Estimate) -> str:
    """Describe what a step trains on."""
    row = row_of(e.estimator)
    if row.pretrains:
        return f"{e.prompts_per_step} rows of {e.prompt_tokens + e.answer_tokens} tokens"
    imitates = row.reads_rationales
    rationales = "given rationales" if imitates else f"x {e.num_rationales} rationales"
    closed = f"rationale {e.rationale_tokens} {'with' if imitates else 'and'} its close token"
    bridge = f", bridge {e.joint_tokens}" if e.joint_tokens else ""
    updates = f"; {e.updates} updates" if e.updates > 1 else ""
    lengths = f"prompt {e.prompt_tokens}, {closed}{bridge}, answer {e.answer_tokens}"
    return f"{e.prompts_per_step} prompts {'with ' if imitates else ''}{rationales}; tokens: {lengths}{updates}"


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
    """Return the messages of the stage that has the most to send: a line per phase, group and kind."""
    stage = max(e.stages, key=lambda stage: stage.wire_bytes)
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


def sweep_table(estimates: Sequence[Estimate], limit_bytes: float | None) -> str:
    """Return a table with a line per world size."""
    headings = ["processes", "TP", "PP", "DP", "EP", "rationales", "micro-batches", "tokens per pass", "peak GiB", "in"]
    headings += ["TFLOP", "GB to send"] + ["fits"] * (limit_bytes is not None)
    rows = []
    for e in estimates:
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
    """Return a Markdown table, aligned for a terminal too."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([line(headings), rule, *map(line, rows)])
