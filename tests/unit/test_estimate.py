"""tools/estimate.py: arithmetic against counts by hand, what it prints, and what it refuses."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_jq.config import parse_args
from megatron_jq.config_validate import derive
from megatron_jq.errors import UserError
from megatron_jq.estimate import activations
from megatron_jq.estimate.figures import estimate
from megatron_jq.estimate.memory import stage_memory
from megatron_jq.estimate.phases import in_flight
from megatron_jq.estimate.plan import Lengths, make_plan
from megatron_jq.estimate.report import GIB
from megatron_jq.estimate.rows import Layout
from megatron_jq.model import flash
from megatron_jq.model.rows import pack_sequences
from megatron_jq.records import TrainingSequence
from megatron_jq.train import batching
from megatron_jq.train.batching import micro_batches
from megatron_jq.train.passes import BatchOptions, row_tokens
from tools import estimate as tool

REPOSITORY = Path(__file__).resolve().parents[2]
STEP = "--device cpu --prompts-per-step 4 --num-rationales 8 --rationale-budget 20 --answer-budget 6"
LENGTHS = Lengths(prompt=10, rationale=20, answer=6)


def estimated(flags: str, world_size: int = 1, vocabulary: int = 1024):
    return estimate(make_plan(parse_args([*STEP.split(), *flags.split()]), world_size, LENGTHS, vocabulary))


def run(words: str, capsys) -> tuple[int, str, str]:
    code = tool.main(words.split())
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def rows_of(text: str) -> list[dict[str, str]]:
    """Every row of every Markdown table, by heading."""
    rows, headings = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            headings = None
        elif headings is None:
            headings = cells
        elif not line.startswith("|-"):
            rows.append(dict(zip(headings, cells, strict=True)))
    return rows


@pytest.mark.parametrize(
    ("flag", "tokens", "pairs"),
    [
        ("auto", 4 * 10 + 32 * 27, 4 * sum(range(1, 11)) + 32 * sum(range(11, 38))),
        ("off", 32 * 37, 32 * sum(range(1, 38))),
    ],
)
def test_flops_and_tokens_are_those_counted_by_hand(flag, tokens, pairs):
    e = estimated(f"--model small --share-prompts {flag}")
    layers = 6 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1536)
    head = 1024 * 512
    rationales = 32
    rollout = 4 * 10 + rationales * 19  # the last token drawn is never fed
    assert [work.tokens for work in e.work] == [rollout, *[tokens] * 2]
    assert [work.tokens_unshared for work in e.work] == [rationales * 29, *[rationales * 37] * 2]
    assert [work.head_rows for work in e.work] == [4 + rationales * 19, rationales * 6, rationales * 26]
    key = 4 * 8 * 64 * 6  # FLOP of a token and a key: scores and mixing, heads and layers
    keys = [4 * 55 + rationales * sum(range(11, 30)), *[pairs] * 2]
    factors = [(2, 2, 1), (2, 2, 1), (6, 6, 3.5)]
    for phase, work, attended, (matrix, logits, attention) in zip(
        ("rollout", "score", "train"), e.work, keys, factors, strict=True
    ):
        flop = matrix * layers * work.tokens + logits * head * work.head_rows + attention * key * attended
        assert getattr(e.flops, phase) == pytest.approx(flop)


@pytest.mark.parametrize(
    ("flags", "lengths", "tokens", "head_rows"),
    [
        ("--estimator sft", replace(LENGTHS, bridge=3), 10 + 20 + 3 + 6, 26),
        ("--estimator pretrain --seq-length 36 --data-path a --tokenizer-model b", Lengths(1, 0, 36), 37, 36),
    ],
)
def test_estimators_that_imitate_train_and_nothing_else(flags, lengths, tokens, head_rows):
    config = parse_args(f"--device cpu --prompts-per-step 4 --model small {flags}".split())
    actual = estimate(make_plan(config, 1, lengths, 1024))
    assert [(work.phase, work.tokens, work.head_rows, work.passes) for work in actual.work] == [
        ("rollout", 0, 0, 0),
        ("score", 0, 0, 0),
        ("train", 4 * tokens, 4 * head_rows, 1),
    ]
    assert actual.flops.step == actual.flops.train
    layers = 6 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1536)
    attended = 4 * 8 * 64 * 6 * sum(range(1, tokens + 1))
    assert actual.flops.train == pytest.approx(4 * (6 * (layers * tokens + 1024 * 512 * head_rows) + 3.5 * attended))
    memory = actual.stages[0].memory
    assert memory.kv_cache == 0 and memory.peak_phase in ("train", "update")


def test_updates_and_a_reference_repeat_the_training_pass_forward_or_both_ways():
    single, several, held = (
        estimated(f"--estimator grpo --tensor-model-parallel-size 2 {flags}", 2)
        for flags in ("", "--grpo-iterations 3", "--grpo-iterations 3 --grpo-kl-beta 0.1")
    )
    assert several.flops.train == held.flops.train == 3 * single.flops.train
    assert several.flops.rollout == single.flops.rollout and several.flops.score == single.flops.score
    (trained,), (repeated,) = ([work for work in e.work if work.phase == "train"] for e in (single, several))
    assert (repeated.tokens, repeated.passes) == (3 * trained.tokens, 3 * trained.passes)
    (reference,) = (work for work in held.work if work.phase == "reference")
    assert replace(reference, phase="train") == trained
    assert not [work for work in several.work if work.phase == "reference"] and several.flops.reference == 0
    # forward it is what scoring is, but for the rows of the rationales that meet the vocabulary
    (score,) = (work for work in held.work if work.phase == "score")
    more = 2 * single.vocab_size * 64 * (reference.head_rows - score.head_rows)
    assert held.flops.reference == pytest.approx(held.flops.score + more)


def test_a_bridge_is_context_of_every_answer():
    """It is scored nowhere, and fed in generation only before a sampled answer."""
    for flags, fed in (("", 19), ("--estimator grpo", 20 + 1 + 3 + 5), ("--score-with rollout", 19 + 2 + 3 + 5)):
        config = parse_args([*STEP.split(), *flags.split()])
        plain, joined = (estimate(make_plan(config, 1, replace(LENGTHS, bridge=n), 1024)) for n in (0, 3))
        trained, of_plain = joined.work[-1], plain.work[-1]
        assert trained.tokens == of_plain.tokens + 32 * 3 and trained.head_rows == of_plain.head_rows
        assert joined.work[0].tokens == 4 * 10 + 32 * fed


def sequences_of(slots, layout: Layout) -> list[TrainingSequence]:
    answer = (3,) * 2
    rationale = (2,) * (layout.branch - len(answer))
    m = layout.num_rationales
    return [TrainingSequence(s // m, s % m, (1,) * layout.prompt, rationale, len(rationale) - 1, answer) for s in slots]


LAYOUTS = st.builds(
    Layout,
    prompt=st.integers(1, 40),
    branch=st.integers(3, 20),
    num_rationales=st.integers(1, 6),
    share_prompts=st.booleans(),
    sequence_multiple=st.sampled_from([1, 4]),
    row_multiple=st.sampled_from([1, 2]),
)


@given(LAYOUTS, st.integers(0, 20), st.integers(1, 20), st.one_of(st.integers(1, 9), st.integers(20, 200)))
def test_rows_are_those_of_the_trainer(layout, first, count, bound):
    """bound: up to 9 sequences of a micro-batch, or tokens."""
    by_tokens, slots = bound > 9, list(range(first, first + count))
    actual = layout.rows_by_tokens(slots, bound) if by_tokens else layout.rows_by_count(slots, bound)
    batches = micro_batches(
        sequences_of(slots, layout),
        micro_batch_size=bound,
        max_tokens=bound if by_tokens else None,
        sequence_multiple=layout.sequence_multiple,
        share_prompts=layout.share_prompts,
    )
    options = BatchOptions(bound, sequence_multiple=layout.sequence_multiple)
    assert [row.sequences for row in actual] == [len(batch) for batch in batches]
    for row, batch in zip(actual, batches, strict=True):
        shared, unshared = (
            row_tokens(batch, options, layout.row_multiple, share_prompts=share)
            for share in (layout.share_prompts, False)
        )
        assert (row.tokens, row.tokens_unshared) == (shared, unshared)


@given(LAYOUTS, st.integers(1, 9), st.integers(1, 8))
def test_pairs_are_those_of_the_attention_mask(layout, count, first):
    """A token attends to what belongs to all of its own sequences and stands no later; padding to none here."""
    layout = replace(layout, sequence_multiple=1, row_multiple=1)
    slots = list(range(first, first + count))
    (row,) = layout.rows_by_count(slots, count)
    packed = pack_sequences(
        sequences_of(slots, layout),
        device=torch.device("cpu"),
        with_rationale=True,
        share_prompts=layout.share_prompts,
    )
    low, high = packed.owners_T2.unbind(dim=1)
    of_all = (low[None] <= low[:, None]) & (high[None] >= high[:, None])
    attends = of_all & (packed.position_T[None] <= packed.position_T[:, None])
    assert (row.tokens, row.pairs) == (len(packed.token_T), int(attends.sum()))
    if set(row.units) == {count} and count > 1:
        assert packed.attention.attended == row.pairs


@given(LAYOUTS, st.integers(1, 6), st.integers(2, 5))
def test_replicas_shares_are_those_of_the_trainers_balance(layout, prompts, replicas):
    total, shares = prompts * layout.num_rationales, []
    sequences, gathered = sequences_of(range(total), layout), batching._all_gather
    batching._all_gather = lambda *_: [sequences]
    try:
        for rank in range(replicas):
            dp = SimpleNamespace(size=lambda: replicas, rank=lambda rank=rank: rank)
            runtime = SimpleNamespace(groups=SimpleNamespace(dp=dp))
            share = batching.balance([], 64, runtime, share_prompts=layout.share_prompts)
            shares.append([s.prompt_slot * layout.num_rationales + s.rationale_slot for s in share])
    finally:
        batching._all_gather = gathered
    assert layout.balanced(total, replicas, 64) == shares


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        ("--tensor-model-parallel-size 2", 2),
        ("--pipeline-model-parallel-size 3", 3),
        ("--tensor-model-parallel-size 4 --pipeline-model-parallel-size 2", 16),
        # two micro-batches: an odd number of them would be made even with one of padding
        ("--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 3 --micro-batch-size 8", 4),
    ],
)
def test_a_layout_shares_the_flops_out_and_adds_none(flags, size):
    assert estimated(f"--model small {flags}", size).flops.step == pytest.approx(estimated("--model small").flops.step)


def test_optimizer_state_is_shared_out_over_replicas_and_experts_over_their_own():
    replicated, shared = (estimated(f"--bf16 {flag}", 4) for flag in ("", "--use-distributed-optimizer"))
    parameters = replicated.stages[0].parameters
    for e, replicas in ((replicated, 1), (shared, 4)):
        memory = e.stages[0].memory
        assert (memory.parameters, memory.gradients) == (2 * parameters, 4 * parameters)
        assert memory.optimizer == 12 * parameters / replicas
    moe = estimated("--model tiny-moe --expert-model-parallel-size 2 --use-distributed-optimizer", 8).stages[0]
    experts = 2 * 2 * 3 * 64 * 96  # layers, experts on a process, matrices: four processes hold the same ones
    assert moe.memory.optimizer == 8 * (experts / 4 + (moe.parameters - experts) / 8)


def test_a_frozen_reference_takes_its_parameters_and_no_more():
    plain, held = (estimated(f"--bf16 --estimator grpo --grpo-kl-beta {beta}", 1).stages[0] for beta in (0, 0.1))
    assert held.memory.parameters == 2 * plain.memory.parameters
    same = ("gradients", "optimizer", "activations", "head")
    assert all(getattr(held.memory, name) == getattr(plain.memory, name) for name in same)
    assert held.memory.peak - plain.memory.peak == plain.memory.parameters


@pytest.mark.parametrize(
    ("flags", "micro_batches", "held"),
    [
        ("--pipeline-model-parallel-size 4", 8, [[4], [3], [2], [1]]),
        ("--pipeline-model-parallel-size 4", 2, [[2], [2], [2], [1]]),
        # stage 0 goes through 2 micro-batches of its first chunk, 2 of its second, and one more before the first
        # backward pass; stage 1 through 2 and one
        ("--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2", 4, [[3, 2], [2, 1]]),
    ],
)
def test_a_stage_holds_as_many_micro_batches_as_the_schedule_has_in_flight(flags, micro_batches, held):
    config = parse_args([*STEP.split(), "--num-layers", "4", *flags.split()])
    plan = make_plan(config, config.parallel.pipeline_model_parallel_size, LENGTHS, 1024)
    assert [in_flight(plan, stage, micro_batches) for stage in range(plan.pp)] == held


def test_freed_memory_that_glibc_keeps_is_on_cpu_alone():
    flags = [*STEP.split(), "--device", "cuda"]
    on_cuda = make_plan(parse_args(flags), 1, LENGTHS, 1024)
    on_cpu = make_plan(parse_args(STEP.split()), 1, LENGTHS, 1024)
    live = stage_memory(on_cpu, 0, keeps_freed=False)
    assert stage_memory(on_cpu, 0).peak > live.peak
    assert stage_memory(on_cuda, 0).peak == stage_memory(on_cuda, 0, keeps_freed=False).peak


def test_it_plans_a_thousand_gpus_without_torch():
    words = (
        "--model qwen3-30b-a3b --bf16 --device cuda --tensor-model-parallel-size 4 --sequence-parallel "
        "--expert-model-parallel-size 8 --expert-tensor-parallel-size 1 --use-distributed-optimizer "
        "--prompts-per-step 512 --prompt-tokens 512 --answer-tokens 16 --rationale-budget 2048 --sweep 8 64 1024"
    )
    code = (
        "import sys; from tools.estimate import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'megatron', 'numpy'} & set(sys.modules); sys.exit(code)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, *words.split()], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    rows = rows_of(ended.stdout)
    assert [(row["processes"], row["DP"]) for row in rows] == [("8", "2"), ("64", "16"), ("1024", "256")]
    assert [int(row["rationales"]) for row in rows] == [2048, 256, 16]
    peaks = [float(row["peak GiB"]) for row in rows]
    assert peaks[0] > peaks[1] > peaks[2] > 2 * 30e9 / 8 / 4 / GIB  # the last: bfloat16 experts over eight processes


def test_tables_and_json_hold_the_same_figures(tmp_path, capsys):
    path = tmp_path / "figures.json"
    flags = f"{STEP} --model small --prompt-tokens 10 --pipeline-model-parallel-size 2 --tensor-model-parallel-size 2"
    code, out, _ = run(f"{flags} --world-size 8 --json {path}", capsys)
    assert code == 0
    (figures,) = json.loads(path.read_text())
    rows = rows_of(out)
    stages = [row for row in rows if "layers" in row]
    assert len(stages) == len(figures["stages"]) == 2
    for row, stage in zip(stages, figures["stages"], strict=True):
        memory = stage["memory"]
        for heading in ("parameters", "gradients", "optimizer", "activations", "head", "peak"):
            assert float(row[heading]) == pytest.approx(memory[heading] / GIB, abs=0.005001)
        assert float(row["KV cache"]) == pytest.approx(memory["kv_cache"] / GIB, abs=0.005001)
        assert row["in"] == memory["peak_phase"]
    phases = {row["phase"]: row for row in rows if "TFLOP" in row}
    for work in figures["work"]:
        assert (int(phases[work["phase"]]["tokens"]), int(phases[work["phase"]]["unshared"])) == (
            work["tokens"],
            work["tokens_unshared"],
        )
    messages = [row for row in rows if "calls" in row]
    sent = [sum(message["bytes"] for message in stage["messages"]) for stage in figures["stages"]]
    assert sum(float(row["MB"]) for row in messages) == pytest.approx(max(sent) / 1e6, abs=0.01 * len(messages))
    assert f"tokens through the layers: {sum(work['tokens'] for work in figures['work'])};" in out


def test_a_memory_limit_decides_the_exit_code(capsys):
    flags = f"{STEP} --model small --prompt-tokens 10"
    peak = estimated("--model small --max-prompt-tokens 10").stages[0].memory.peak / GIB
    code, out, _ = run(f"{flags} --memory-limit {1.001 * peak}", capsys)
    assert code == 0 and out.splitlines()[-1].startswith("fits in")
    code, out, _ = run(f"{flags} --memory-limit {0.999 * peak}", capsys)
    assert code == 1 and out.splitlines()[-1].startswith("does not fit in")
    code, out, _ = run(f"{flags} --memory-limit {0.999 * peak} --sweep 1 32", capsys)
    assert code == 0 and [row["fits"] for row in rows_of(out)] == ["no", "yes"]
    assert run(f"{flags} --memory-limit 0.1 --sweep 1 32", capsys)[0] == 1


def test_replicas_without_a_rationale_are_told(capsys):
    _, out, _ = run(f"{STEP} --prompt-tokens 10 --gpus 40", capsys)
    assert "8 replicas have none" in out
    assert math.ceil(32 / 40) == estimated("", 40).busiest_replica_rationales == 1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            f"{STEP} --prompt-tokens 10 --estimator sft --num-rationales 1",
            "step: 4 prompts with given rationales; tokens: prompt 10, rationale 20 with its close token, answer 6\n",
        ),
        (
            "--estimator pretrain --prompts-per-step 4 --data-path a --tokenizer-model b --seq-length 36",
            "step: 4 rows of 37 tokens\nbusiest replica: 4 rows in 1 micro-batches of at most 148 tokens\n"
            "tokens through the layers: 148\n",
        ),
        (
            f"{STEP} --prompt-tokens 10 --joint-tokens 2 --estimator grpo --grpo-iterations 3",
            "rationale 20 and its close token, bridge 2, answer 6; 3 updates\n",
        ),
    ],
)
def test_the_heading_says_what_a_step_takes_in(flags, told, capsys):
    code, out, _ = run(flags, capsys)
    assert code == 0 and told in out


def test_lengths_and_size_default_to_the_settings_of_a_run():
    args, config = tool.parse(
        "--tensor-model-parallel-size 2 --max-prompt-tokens 33 --rationale-budget 44 --answer-budget 5".split()
    )
    assert (args.prompt_tokens, args.rationale_tokens, args.answer_tokens, args.world_size) == (33, 44, 5, 2)
    args, config = tool.parse(
        "--prompt-tokens 3 --rationale-tokens 4 --answer-tokens 5 --rationale-budget 44 --gpus 6".split()
    )
    assert (config.data.max_prompt_tokens, config.rollout.rationale_budget, config.rollout.answer_budget) == (3, 4, 5)
    assert (args.world_size, args.vocab_size) == (6, tool.DEFAULT_VOCABULARY)


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        ("--tensor-model-parallel-size 4 --sequence-parallel", 6),
        ("--tensor-model-parallel-size 3", 3),
        ("--pipeline-model-parallel-size 5 --context-parallel-size 2", 10),
        ("--model tiny-moe --expert-model-parallel-size 3", 3),
        ("--rationale-tokens 5000", 1),
    ],
)
def test_a_layout_that_training_refuses_is_refused_in_its_words(flags, size, capsys):
    settings = flags.replace("rationale-tokens", "rationale-budget")
    lengths = "--max-prompt-tokens 10 --answer-budget 6"
    with pytest.raises(UserError) as refusal:
        derive(parse_args([*settings.split(), *lengths.split()]), size)
    code, out, err = run(f"{flags} --prompt-tokens 10 --answer-tokens 6 --world-size {size}", capsys)
    assert (code, out) == (2, "")
    assert err == "".join(f"estimate: error: {line}\n" for line in str(refusal.value).splitlines())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--answer-tokens 5", "--prompt-tokens is needed (or --max-prompt-tokens)"),
        ("--prompt-tokens 5", "--answer-tokens is needed (or --answer-budget)"),
        ("--prompt-tokens 0 --answer-tokens 5", "--prompt-tokens must be at least 1, not 0"),
        ("--prompt-tokens 5 --answer-tokens 5 --gpus 0", "--world-size must be at least 1, not 0"),
        ("--prompt-tokens 5 --answer-tokens 5 --sweep 8 0", "--sweep: sizes must be at least 1, not 0"),
        ("--prompt-tokens 5 --answer-tokens 5 --sweep 8 --gpus 8", "not allowed with argument"),
        ("--prompt-tokens 5 --answer-tokens 5 --memory-limit 0", "--memory-limit must be above 0"),
        ("--prompt-tokens 5 --answer-tokens 5 --memory-limit nan", "--memory-limit must be above 0"),
        ("--prompt-tokens 5 --answer-tokens 5 --json {}", "is a folder; name a file"),
        ("--prompt-tokens 5 --answer-tokens 5 --json {}/no/file", "the folder does not exist or cannot be written"),
        ("--prompt-tokens 5 --answer-tokens 5 --joint-tokens -1", "--joint-tokens must be at least 0, not -1"),
        (
            "--prompt-tokens 440 --answer-tokens 7 --joint-tokens 2",
            "a bridge of 2 and an answer of 7 are 514, more than 512 (context, or --max-tokens-per-micro-batch)",
        ),
        ("--prompt-tokens 5 --answer-tokens 5 --max-tokens-per-micro-batch 74", "are 75, more than 74 (context"),
        ("--estimator pretrain --answer-tokens 5", "--answer-tokens: rows of --estimator pretrain are as long as"),
        ("--prompt-tokens 5 --answer-tokens 5 --tensor-parallel 2", "unknown flag --tensor-parallel"),
        ("--prompt-tokens 5 --answer-tokens 5 --model tinny", "--model tinny: no such preset"),
    ],
)
def test_bad_input_is_told_in_a_line(words, message, tmp_path, capsys):
    code, out, err = run(words.format(tmp_path), capsys)
    assert (code, out) == (2, "")
    assert err.startswith("estimate: error: ") and message in err and err.count("\n") == 1


def test_plain_attention_on_cuda_is_counted_and_bounded_however_long_a_prompt_is():
    """In float32 alone: no whole matrix of scores, which would be 13 GB for one prompt of 8,192 tokens."""
    assert activations.SCORE_ELEMENTS == flash.SCORE_ELEMENTS
    flags = "--device cuda --transformer-impl local --max-position-embeddings 16384"
    wide, narrow, on_cpu = (
        make_plan(parse_args([*STEP.split(), *text.split()]), 1, LENGTHS, 1024)
        for text in (flags, f"{flags} --bf16", flags.replace("cuda", "cpu"))
    )
    w = activations.widths(wide)
    for backward, copies in ((False, 2), (True, 3)):
        assert activations.plain_scores(narrow, 8192, backward=backward) == 0
        assert activations.plain_scores(on_cpu, 8192, backward=backward) == 0
        repeated = 4 * (4 if backward else 2) * w.query
        short = activations.plain_scores(wide, 16, backward=backward) - 16 * repeated
        assert short == 4 * copies * w.heads * 16 * 16
        long = activations.plain_scores(wide, 8192, backward=backward) - 8192 * repeated
        assert long == 4 * copies * flash.SCORE_ELEMENTS < 4 * w.heads * 8192**2
