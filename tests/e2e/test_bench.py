"""tools/bench_step.py: its figures agree with each other, with counts made by hand, and with the printed table.

No figure of time is tested: a busy machine is not a fault.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_jq.architecture import PRESETS
from megatron_jq.bench.figures import Load, matrix_parameters, positions_needed
from megatron_jq.bench.meters import Memory, MessageCounter, Meter
from megatron_jq.errors import UserError
from megatron_jq.model.build import BuildOptions, build_policies
from tests.distributed.ranks import run_ranks
from tools import bench_sharing, bench_step

REPOSITORY = Path(__file__).resolve().parents[2]

PROMPTS, RATIONALES, RATIONALE, ANSWER, MICRO_BATCH = 3, 4, 5, 2, 5


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """(JSON, what was printed) of one run of the tool under torchrun, on two tensor-parallel processes."""
    path = tmp_path_factory.mktemp("bench") / "figures.json"
    flags = (
        f"--model tiny --tensor-model-parallel-size 2 --device cpu --prompts-per-step {PROMPTS} "
        f"--num-rationales {RATIONALES} --prompt-tokens 2:9 --rationale-tokens {RATIONALE} --answer-tokens {ANSWER} "
        f"--micro-batch-size {MICRO_BATCH} --steps 2 --json {path}"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = subprocess.run(
        [*launcher, str(REPOSITORY / "tools" / "bench_step.py"), *flags.split()],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(path.read_text()), ended.stdout


def phases(figures):
    return {phase["phase"]: phase for phase in figures["phases"]}


def test_tokens_are_those_counted_by_hand(benchmark):
    figures, _ = benchmark
    lengths, of = figures["prompt_lengths"], phases(figures)
    assert len(lengths) == PROMPTS and all(2 <= length <= 9 for length in lengths)
    drawn = PROMPTS * RATIONALES * (RATIONALE - 1)
    assert of["rollout"]["tokens_needed"] == of["rollout"]["tokens_processed"] == sum(lengths) + drawn
    behind = PROMPTS * RATIONALES * (RATIONALE + ANSWER)
    # Rationales of one prompt share it within a micro-batch, and repeat it where the next one begins among them.
    shared = {(slot // MICRO_BATCH, slot // RATIONALES) for slot in range(PROMPTS * RATIONALES)}
    trunks = sum(lengths[prompt] for _, prompt in shared)
    for phase in (of["score"], of["train"]):
        assert phase["tokens_needed"] == sum(lengths) + behind
        assert phase["tokens_needed_prompt_repeated"] == RATIONALES * sum(lengths) + behind
        # Every branch holds the close token and the answer's last token too, and nothing is padded.
        assert phase["tokens_processed"] == trunks + behind + PROMPTS * RATIONALES


def test_no_phase_processes_fewer_tokens_than_it_needs(benchmark):
    for phase in benchmark[0]["phases"]:
        assert phase["tokens_needed"] <= phase["tokens_needed_prompt_repeated"]
        assert phase["tokens_needed"] <= phase["tokens_processed"]


def test_the_step_is_the_sum_of_its_phases(benchmark):
    of = phases(benchmark[0])
    step, parts = of["step"], [of["rollout"], of["score"], of["train"]]
    for key in ("tokens_needed", "tokens_needed_prompt_repeated", "tokens_processed", "messages", "message_bytes"):
        assert step[key] == sum(part[key] for part in parts)
    assert step["peak_memory_bytes"] == max(part["peak_memory_bytes"] for part in parts)
    for phase in (step, *parts):
        assert phase["messages"] == sum(calls for calls, _ in phase["messages_by_kind"].values()) > 0
        assert phase["message_bytes"] == sum(size for _, size in phase["messages_by_kind"].values()) > 0


def test_rates_follow_from_seconds_tokens_and_parameters(benchmark):
    figures, of = benchmark[0], phases(benchmark[0])
    layers, head = figures["layer_parameters"], figures["head_parameters"]
    sequences = PROMPTS * RATIONALES
    met = {  # what of the head each phase needs: drawn tokens (a group's first draws share one row), y*, both
        "rollout": (2, PROMPTS + sequences * (RATIONALE - 1)),
        "score": (2, sequences * ANSWER),
        "train": (6, sequences * (RATIONALE + ANSWER)),
    }
    total = 0
    for name, (factor, head_positions) in met.items():
        flop = factor * (layers * of[name]["tokens_processed"] + head * head_positions)
        assert of[name]["flop_per_second"] * of[name]["seconds"] == pytest.approx(flop)
        total += flop
    assert of["step"]["flop_per_second"] * of["step"]["seconds"] == pytest.approx(total)
    for phase in of.values():
        assert phase["tokens_per_second"] * phase["seconds"] == pytest.approx(phase["tokens_processed"])
        assert phase["share_of_gemm"] * figures["gemm_flop_per_second"] == pytest.approx(phase["flop_per_second"])


def test_the_table_shows_the_numbers_of_the_json(benchmark):
    figures, printed = benchmark
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line[:1] == "|"]
    assert len({len(line) for line in printed.splitlines() if line[:1] == "|"}) == 1
    shown = {  # heading → (key, factor, half of the last digit that is shown)
        "seconds": ("seconds", 1, 5e-4),
        "tokens needed": ("tokens_needed", 1, 0),
        "prompt repeated": ("tokens_needed_prompt_repeated", 1, 0),
        "processed": ("tokens_processed", 1, 0),
        "tokens/s": ("tokens_per_second", 1, 0.5),
        "GFLOP/s": ("flop_per_second", 1e-9, 5e-3),
        "of GEMM": ("share_of_gemm", 100, 0.05),
        "peak MB": ("peak_memory_bytes", 1e-6, 0.05),
        "messages": ("messages", 1, 0),
        "message MB": ("message_bytes", 1e-6, 5e-3),
    }
    assert rows[0] == ["phase", *shown]
    assert [row[0] for row in rows[2:]] == ["rollout", "score", "train", "step"]
    for row, phase in zip(rows[2:], figures["phases"], strict=True):
        for cell, (key, factor, tolerance) in zip(row[1:], shown.values(), strict=True):
            assert float(cell.removesuffix(" %")) == pytest.approx(phase[key] * factor, abs=tolerance * 1.001, rel=0)
    for key in ("command", "commit", "machine"):
        assert f"{key}: {figures[key]}" in printed.splitlines()
    assert "torchrun --nproc-per-node 2 " in figures["command"] and "--prompt-tokens 2:9 " in figures["command"]


def test_a_rollout_that_scores_needs_what_one_pass_over_the_sequences_needs():
    load = Load(1, 1, rationale_tokens=6, answer_tokens=3, vocab_size=8, steps=1, warmup=0)
    needed = positions_needed([4, 5], 2, load, score_with_rollout=True)
    # By hand: two prompts, and four times six rationale tokens, a close token, and two of three answer tokens.
    assert needed == {"rollout": (9 + 4 * 9, 18 + 4 * 9), "score": (0, 0), "train": (9 + 4 * 9, 18 + 4 * 9)}


def _matrices(runtime, name):
    """A policy's matrix parameters that one token meets: (layers, head)."""
    architecture = PRESETS[name]
    (policy,) = build_policies(architecture, BuildOptions(vocab_size=128), runtime)
    layers = 0.0
    for key, parameter in policy.named_parameters():
        if key.startswith("decoder.layers") and parameter.dim() == 2:
            visited = architecture.moe_router_topk / architecture.num_experts if ".experts." in key else 1
            layers += parameter.numel() * visited
    return layers, policy.embedding.word_embeddings.weight.numel()


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
def test_flop_count_the_matrices_that_the_policy_holds(name):
    (held,) = run_ranks(_matrices, name)
    assert matrix_parameters(PRESETS[name], 128) == held


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


def _messages(runtime):
    captured_before = dist.all_reduce
    alone, x = dist.new_group([0]), torch.ones(3, requires_grad=True)
    with MessageCounter() as counter:
        captured_before(torch.ones(10))
        dist.all_gather([torch.empty(4, dtype=torch.float64) for _ in range(2)], torch.ones(4, dtype=torch.float64))
        dist.broadcast(torch.ones(5), src=0)
        if runtime.rank == 0:
            dist.all_reduce(torch.ones(1000), group=alone)
            dist.send(torch.ones(7), dst=1)
        else:
            dist.recv(torch.ones(7), src=0)
        _SumBackward.apply(x).sum().backward()
        dist.barrier()
    dist.all_reduce(torch.ones(10))
    return counter.counted()


def test_messages_are_counted_by_kind_with_their_bytes_and_those_to_oneself_are_not():
    first, second = run_ranks(_messages, tp=2)
    common = {"allreduce": (2, 40 + 12), "allgather": (1, 64), "broadcast": (1, 20), "barrier": (1, 0)}
    assert first == {**common, "send": (1, 28)}
    assert second == {**common, "recv": (1, 28)}


def _peaks(runtime):
    (policy,) = build_policies(PRESETS["tiny"], BuildOptions(vocab_size=128), runtime)
    meter = Meter(policy, runtime)
    findings = []
    for size in (100, 25_000_000, 100):
        with meter.examine(findings.append):
            torch.ones(size).sum()
    before, large, after = (examined.peak_memory_bytes for examined in findings)
    return (before, after), large


@pytest.mark.skipif(not Memory.STATUS.exists(), reason="only Linux forgets a process's peak")
def test_a_phase_shows_its_own_peak_and_not_an_earlier_one():
    ((before, after), large) = run_ranks(_peaks)[0]
    assert 100e6 < large < 130e6
    assert before < 20e6 and after < 20e6


@pytest.mark.parametrize(
    ("argv", "message"),
    (
        ("--prompt-tokens 9:3", "--prompt-tokens 9:3: lengths must be at least 1, and LOW not above HIGH"),
        ("--prompt-tokens 0", "lengths must be at least 1"),
        ("--prompt-tokens long", "expected a whole number or LOW:HIGH, not long"),
        ("--rationale-tokens 0", "--rationale-tokens must be at least 1, not 0"),
        ("--answer-tokens 0", "--answer-tokens must be at least 1, not 0"),
        ("--steps 0", "--steps must be at least 1, not 0"),
        ("--warmup -1", "--warmup must be at least 0, not -1"),
        ("--vocab-size 1", "--vocab-size must be at least 2, not 1"),
        ("--estimator grpo", "--estimator must be garl"),
        ("--json {}/none/figures.json", "none/figures.json: the folder does not exist or cannot be written"),
        ("--json {}", "is a folder; name a file"),
        ("--prompt-tokens 500 --rationale-tokens 500", "context of 512 tokens cannot hold a prompt of 500"),
        ("--rational-tokens 5", "unknown flag --rational-tokens"),
        ("--tensor-model-parallel-size 2", "1 process(es) cannot be cut"),
        ("--num-rationales 1", "--num-rationales must be at least 2"),
    ),
)
def test_bad_input_is_told_in_a_line_before_any_work(argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(bench_step, "measure", lambda *_: pytest.fail("work was started"))
    words = [word.format(tmp_path) for word in argv.split()]
    with pytest.raises(UserError):
        bench_step.parse(words)
    assert bench_step.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench_step: error: ") and message in error and error.count("\n") == 1


def test_lengths_default_to_the_settings_of_a_run(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    args, config = bench_step.parse("--model qwen3-0.6b --rationale-budget 11 --answer-budget 3".split())
    assert (args.rationale_tokens, args.answer_tokens, args.prompt_tokens) == (11, 3, (64, 64))
    assert args.vocab_size == 151_936
    args, config = bench_step.parse("--rationale-budget 11 --rationale-tokens 12 --prompt-tokens 5:7".split())
    assert (args.rationale_tokens, config.rollout.rationale_budget) == (12, 12)
    assert (args.vocab_size, args.prompt_tokens, config.data.max_prompt_tokens) == (1024, (5, 7), 7)


def test_what_sharing_loses_is_below_1_in_its_table():
    def figures(seconds: float, tokens: int, rate: float, cache: float) -> dict:
        phase = {"tokens_processed": tokens, "seconds": seconds, "peak_memory_bytes": 8e6, "tokens_per_second": rate}
        return {"phases": [{"phase": name, **phase} for name in ("rollout", "score", "train")], "cache_bytes": cache}

    cells = bench_sharing.line(figures(1.0, 600, 50.0, 4e6), figures(2.0, 300, 25.0, 1e6), 16, 4)
    assert cells[:3] == ["16", "4", "1,200 → 600"] and cells[4] == "2.00 → 4.00"
    assert list(zip(bench_sharing.COLUMNS[3::2], cells[3::2], strict=True)) == [
        ("fewer", "2.00"), ("faster", "0.50"), ("smaller", "1.00"), ("faster", "0.50"), ("smaller", "4.00")
    ]  # fmt: skip
