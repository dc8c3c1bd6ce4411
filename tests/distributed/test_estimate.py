"""The estimate against what runs: parameters built, tensors that autograd saves, messages sent, memory of processes."""

import contextlib
import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from megatron_jq.bench.figures import PHASES, Load
from megatron_jq.bench.meters import MessageCounter
from megatron_jq.bench.step import StepBench
from megatron_jq.config import parse_args
from megatron_jq.config_validate import derive
from megatron_jq.data.tokenizers import load_tokenizer
from megatron_jq.estimate.activations import chunk_saved, layer_saved, widths
from megatron_jq.estimate.arithmetic import step_work
from megatron_jq.estimate.memory import stage_memory
from megatron_jq.estimate.parameters import matrix_parameters, stage_parameters
from megatron_jq.estimate.plan import Lengths, Plan, make_plan
from megatron_jq.estimate.traffic import stage_traffic
from megatron_jq.model.build import build_options, build_policies, wrap_for_training
from megatron_jq.model.rows import pack_sequences
from megatron_jq.records import Example, TrainingSequence
from megatron_jq.train import rollouts
from megatron_jq.train.assemble import assemble
from megatron_jq.train.setup import DataSets
from tests.distributed.ranks import run_ranks

REPOSITORY = Path(__file__).resolve().parents[2]
VOCABULARY = 250
LENGTHS = Lengths(prompt=5, rationale=7, answer=3)
MOE = "--model tiny-moe"

#: Flags of the layout, and the processes beside those of tensor and pipeline parallelism.
LAYOUTS = {
    "one process": ("", 1),
    "each its prompt": ("--share-prompts off", 1),
    "untied": ("--untie-embeddings-and-output-weights", 1),
    "bf16": ("--bf16", 1),
    "selective": ("--recompute-granularity selective", 1),
    "full": ("--recompute-granularity full --recompute-method block --recompute-num-layers 3", 1),
    "full, uniform": ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 2", 1),
    "TP": ("--tensor-model-parallel-size 2", 1),
    "TP, recomputed": (
        "--tensor-model-parallel-size 2 --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 2",
        1,
    ),
    "TP, nucleus": ("--tensor-model-parallel-size 2 --top-p 0.9", 1),
    "SP": ("--tensor-model-parallel-size 2 --sequence-parallel", 1),
    "SP, bf16": ("--tensor-model-parallel-size 2 --sequence-parallel --bf16", 1),
    "PP": ("--pipeline-model-parallel-size 2", 1),
    "PP, uneven, untied": (
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|tttL "
        "--untie-embeddings-and-output-weights",
        1,
    ),
    "PP, rollout scores": ("--pipeline-model-parallel-size 2 --score-with rollout", 1),
    "VPP": ("--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2", 1),
    "DP": ("", 2),
    "DP, sharded optimizer": ("--use-distributed-optimizer", 2),
    "DP, by tokens": ("--max-tokens-per-micro-batch 40 --pad-sequences-to-multiple-of 4", 2),
    "MoE": (MOE, 1),
    "MoE, EP": (f"{MOE} --expert-model-parallel-size 2", 2),
    "MoE, SP": (f"{MOE} --tensor-model-parallel-size 2 --sequence-parallel", 1),
}
if importlib.util.find_spec("megatron.core.dist_checkpointing.gpt_checkpoint_interop") is not None:  # since 0.19
    LAYOUTS["hybrid, full"] = (f"{LAYOUTS['full'][0]} --model-class hybrid", 1)


def plan_of(name: str) -> Plan:
    """Eight rationales of two prompts in micro-batches of three, four layers."""
    flags, replicas = LAYOUTS[name]
    common = (
        f"--num-rationales 4 --prompts-per-step 2 --rationale-budget {LENGTHS.rationale} "
        f"--answer-budget {LENGTHS.answer} --max-prompt-tokens {LENGTHS.prompt}"
    )
    return planned(f"{common} {flags}", replicas, LENGTHS)


def planned(flags: str, replicas: int, lengths: Lengths) -> Plan:
    config = parse_args(f"--device cpu --num-layers 4 --micro-batch-size 3 {flags}".split())
    p = config.parallel
    size = p.tensor_model_parallel_size * p.pipeline_model_parallel_size * replicas
    return make_plan(config, size, lengths, VOCABULARY)


def on_ranks(function, plan: Plan, *arguments):
    """function(runtime, plan, *arguments) on every process of the plan."""
    virtual = plan.config.parallel.num_virtual_stages_per_pipeline_rank
    return run_ranks(function, plan, *arguments, tp=plan.tp, pp=plan.pp, dp=plan.dp, ep=plan.ep, virtual_stages=virtual)


#: Sampled tokens of four sequences that a micro-batch of the count holds; those of trees share one prompt.
ROWS = {
    "plain": [LENGTHS.rationale] * 4,
    "ragged": [3, LENGTHS.rationale - 1, LENGTHS.rationale, 1],
    "trees": [3, LENGTHS.rationale - 1, LENGTHS.rationale, 2],
}


@dataclass(frozen=True)
class Passed:
    """A forward pass through a process's first chunk."""

    saved_bytes: int  # of distinct storages that autograd saves, parameters apart
    tokens: int
    head_rows: int
    padded: float | None  # tokens of the attention's buckets for one of the row, where there are some


@dataclass(frozen=True)
class Built:
    """One process of a layout: its policy, and a pass of each of ROWS."""

    stage: int
    parameters: int
    largest: int
    met_by_a_token: float  # elements of matrices in layers
    passed: dict[str, Passed]


def _build(runtime, plan):
    options = build_options(plan.config, VOCABULARY)
    policies = build_policies(plan.architecture, options, runtime)
    named = [pair for policy in policies for pair in policy.named_parameters()]
    a, met = plan.architecture, 0.0
    for name, parameter in named:
        share = 1.0
        if ".experts." in name:  # of all experts, those that a token's copies visit
            share = a.moe_router_topk / a.num_experts * plan.ep
        elif "router" in name:  # under sequence parallelism each process routes its own tokens
            share = 1 / plan.split
        met += share * parameter.numel() * ("layers" in name and parameter.dim() == 2)
    sizes = [parameter.numel() for _, parameter in named]
    model = wrap_for_training(policies, options, runtime)
    passed = {kind: _pass(runtime, plan, policies[0], model, kind) for kind in ROWS}
    return Built(runtime.groups.pp.rank(), sum(sizes), max(sizes), met, passed)


def _pass(runtime, plan, policy, model, kind):
    shared = kind == "trees"
    sequences = [
        TrainingSequence(0 if shared else i, i, (1,) * LENGTHS.prompt, (2,) * (n + 1), n, (3,) * 3)
        for i, n in enumerate(ROWS[kind])
    ]
    rows = pack_sequences(
        sequences,
        device=runtime.device,
        with_rationale=True,
        coefficients=[(1.0, 1.0)] * 4,
        row_multiple=plan.split,
        share_prompts=shared,
    )
    tokens = len(rows.token_T)
    if runtime.groups.pp.rank() > 0:
        shape, dtype = (tokens // plan.split, 1, plan.architecture.hidden_size), next(policy.parameters()).dtype
        policy.set_input_tensor(torch.randn(shape, dtype=dtype, requires_grad=True))
    padded = sum(bucket.token_nS.numel() for bucket in rows.attention.buckets) / tokens if kind == "ragged" else None
    return Passed(_saved_bytes(runtime, model, rows), tokens, len(rows.head.position_N), padded)


def _saved_bytes(runtime, model, rows):
    own = {parameter.untyped_storage().data_ptr() for parameter in model.chunks[0].parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes(), tensor  # kept, so that its address is not another's too
        return tensor

    with runtime.megatron(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), runtime.native():
        model.chunks[0](rows)
    return sum(size for size, _ in found.values())


@cache
def built(name: str) -> list[Built]:
    return on_ranks(_build, plan_of(name))


BUILT = [
    name
    for name in LAYOUTS
    if not any(word in name for word in ("DP", "nucleus", "scores", "TP, recomputed", "each its prompt"))
]


@pytest.mark.parametrize("name", BUILT)
def test_parameters_of_each_stage_are_those_of_the_built_policy(name):
    plan = plan_of(name)
    for rank in built(name):
        count = stage_parameters(plan, rank.stage)
        assert (count.total, count.largest) == (rank.parameters, rank.largest)
        layers = sum(chunk.layers for chunk in plan.stages[rank.stage])
        assert matrix_parameters(plan, layers) == pytest.approx(rank.met_by_a_token, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in BUILT for kind in ROWS if kind != "ragged" or name in ("one process", "bf16", "SP")],
)
def test_saved_activations_are_those_that_autograd_saves(name, kind):
    plan, saved, predicted = plan_of(name), Counter(), Counter()
    for rank in built(name):
        chunk, passed = plan.stages[rank.stage][0], rank.passed[kind]
        size = chunk_saved(plan, chunk, passed.tokens)
        if passed.padded is not None:
            by_bucket = layer_saved(plan, padded=passed.padded) - layer_saved(plan)
            size += chunk.layers * passed.tokens * by_bucket
        if chunk.heads:  # beside the layers' part: the rows' gradient, and where each row lies
            size += passed.head_rows * (8 + plan.element * plan.architecture.hidden_size)
        else:  # what the schedule, not autograd, holds on to
            size -= passed.tokens * plan.element * widths(plan).hidden
        predicted[rank.stage] += size
        saved[rank.stage] += passed.saved_bytes
        if plan.ep == 1:  # tokens are not spread evenly over experts, so there only the sum is as estimated
            assert passed.saved_bytes == pytest.approx(size, rel=0.01)
    assert saved == pytest.approx(predicted, rel=0.01)


#: c10d's spelling → the estimate's.
KINDS = {
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "alltoall": "all-to-all",
    "broadcast": "broadcast",
    "send": "send",
    "recv": "receive",
}


def note(found: dict, phase: str, counter: MessageCounter) -> None:
    for name, (calls, size) in counter.counted().items():
        kind = next(ours for theirs, ours in KINDS.items() if name.startswith(theirs))
        entry = found.setdefault((phase, kind), [0, 0])
        entry[0] += calls
        entry[1] += size


def _counted(runtime, plan):
    """(stage, {(phase, kind): [calls, bytes]}, tokens by phase) of the benchmark's second step.

    Tokens are counted where they enter this process's first chunk.
    """
    lengths = plan.lengths
    load = Load(lengths.prompt, lengths.prompt, lengths.rationale, lengths.answer, VOCABULARY, 1, 0)
    bench = StepBench(plan.config, derive(plan.config, runtime.world_size), load, runtime)
    messages, tokens, now = {}, Counter(), [""]

    def count(policy, arguments):
        tokens[now[0]] += len(arguments[0].token_T)

    bench.step(0, lambda phase: contextlib.nullcontext())
    bench.engine.policies[0].register_forward_pre_hook(count)
    bench.step(1, lambda phase: counting(messages, now, phase))
    return runtime.groups.pp.rank(), messages, dict(tokens)


@contextlib.contextmanager
def counting(messages: dict, now: list[str], phase: str):
    """Count the messages of one stage of a step into `messages`; `now` says which it is."""
    now[0] = phase
    with MessageCounter() as counter:
        yield
    note(messages, phase, counter)


def expected(plan: Plan, stage: int) -> dict:
    sums = {}
    for message in stage_traffic(plan, stage):
        phase = "train" if message.phase == "reference" else message.phase  # the trainer makes no difference
        entry = sums.setdefault((phase, message.kind), [0, 0])
        entry[0] += message.calls
        entry[1] += message.bytes
    return sums


SENT = [name for name in LAYOUTS if "P" in name and name not in ("TP", "SP, bf16")]


@pytest.mark.parametrize("name", SENT)
def test_messages_and_tokens_are_those_that_are_counted(name):
    plan = plan_of(name)
    ranks = on_ranks(_counted, plan)
    for stage, found, _ in ranks:
        counted, predicted = dict(found), expected(plan, stage)
        if plan.config.training.max_tokens_per_micro_batch is not None:  # sequences on their way: left out
            assert [counted.pop((phase, "all-gather"))[0] for phase in ("score", "train")] == [2, 2]
        if plan.architecture.num_experts is not None:  # sums of experts' balance, and peers at work: left out
            for phase in ("rollout", "score", "train"):
                size = counted.pop((phase, "all-reduce"), [0, 0])[1]
                assert size - predicted.pop((phase, "all-reduce"), [0, 0])[1] < 5000
        assert {key: c[0] for key, c in counted.items()} == {key: p[0] for key, p in predicted.items()}
        for key, (_, size) in counted.items():
            # Megatron-core pads the buffer of gradients a little; copies are not spread evenly over experts
            assert size == pytest.approx(predicted[key][1], rel=0.12 if key[1] == "all-to-all" else 0.005), key
    passed = Counter()
    for _, _, tokens in ranks:
        passed.update(tokens)
    processes = plan.tp * plan.pp  # each counts the tokens of its replica
    assert {work.phase: work.tokens * processes for work in step_work(plan) if work.tokens} == dict(passed)


GIVEN = Lengths(prompt=5, rationale=7, answer=3, bridge=2)
JOINED = f"--prompts-per-step 2 --num-rationales 4 --rationale-budget {GIVEN.rationale} --answer-budget {GIVEN.answer}"
SFT = f"--estimator sft --prompts-per-step 8 --rationale-budget {GIVEN.rationale} --answer-budget {GIVEN.answer}"
GRPO = f"--estimator grpo {JOINED}"
PRETRAIN = "--estimator pretrain --prompts-per-step 8 --seq-length 12 --data-path none --tokenizer-model none"
#: Flags, replicas, lengths: what estimators do beside GARL without a bridge, which LAYOUTS have.
ESTIMATORS = {
    "a bridge": (f"{JOINED} --tensor-model-parallel-size 2 --score-with rollout", 1, GIVEN),
    "SFT": (f"{SFT} --tensor-model-parallel-size 2 --sequence-parallel", 1, GIVEN),
    "SFT, PP, DP": (f"{SFT} --pipeline-model-parallel-size 2", 2, GIVEN),
    "pretraining": (f"{PRETRAIN} --pipeline-model-parallel-size 2", 2, Lengths(1, 0, 12)),
    "GRPO, rollout scores": (f"{GRPO} --tensor-model-parallel-size 2 --score-with rollout", 1, GIVEN),
    "GRPO, three updates": (f"{GRPO} --grpo-iterations 3 --tensor-model-parallel-size 2", 2, GIVEN),
    "GRPO, a reference": (f"{GRPO} --grpo-kl-beta 0.1 --tensor-model-parallel-size 2", 1, GIVEN),
    "GRPO, both, PP": (f"{GRPO} --grpo-iterations 2 --grpo-kl-beta 0.1 --pipeline-model-parallel-size 2", 1, GIVEN),
}


@dataclass(frozen=True)
class OneThatNothingSays:
    """As much of a tokenizer as a step asks for. Close and end token are a padding row, which has probability zero: so
    rationales and answers take their whole budgets.
    """

    vocab_size: int = VOCABULARY
    think_close_id: int = VOCABULARY
    eos_id: int = VOCABULARY


def _counted_in_training(runtime, plan):
    """(stage, {(phase, kind): [calls, bytes]}, tokens by phase, head rows by phase) of the trainer's second step."""
    lengths, imitates = plan.lengths, plan.imitates
    rationale = (2,) * lengths.rationale if imitates else None
    examples = [
        Example(i, "", "", (1,) * lengths.prompt, (3,) * lengths.answer, (), (4,) * lengths.bridge, rationale)
        for i in range(2 * plan.config.rollout.prompts_per_step)
    ]
    data = DataSets(OneThatNothingSays(), examples, (), 0, lengths.answer, Path("none"), "jsonl")
    loop = assemble(plan.config, plan.derived, data, runtime)
    turns = itertools.cycle([True, False])  # an advantage for each; in a process of its own
    rollouts.answer_matches = lambda *_: next(turns)
    messages, tokens, head_rows, now = {}, Counter(), Counter(), [""]

    def count(_, arguments):
        tokens[now[0]] += len(arguments[0].token_T)
        head_rows[now[0]] += len(arguments[0].head.position_N)

    loop.engine = loop.engine.engine  # what its ranks tell each other of errors is not in the estimate
    loop.step(0)
    in_phases = lambda name: counting(messages, now, name) if name in PHASES else contextlib.nullcontext()  # noqa: E731
    loop.stage.instrument = in_phases
    models = [loop.model, *([loop.reference.model] if loop.reference else [])]
    for model in models:
        model.policies[0].register_forward_pre_hook(count)
    loop.step(1)
    return runtime.groups.pp.rank(), messages, tokens, head_rows


@pytest.mark.parametrize("name", ESTIMATORS)
def test_each_estimator_s_step_takes_what_the_trainer_s_takes(name):
    flags, replicas, lengths = ESTIMATORS[name]
    plan = planned(flags, replicas, lengths)
    ranks = on_ranks(_counted_in_training, plan)
    tokens, head_rows = Counter(), Counter()
    for stage, found, passed, asked in ranks:
        predicted = expected(plan, stage)
        assert {key: calls for key, (calls, _) in found.items()} == {
            key: calls for key, (calls, _) in predicted.items()
        }
        for key, (_, size) in found.items():
            assert size == pytest.approx(predicted[key][1], rel=0.005), key  # gradients' buffer is padded
        tokens.update(passed)
        head_rows.update(asked)
    processes, predicted = plan.tp * plan.pp, (Counter(), Counter())
    for work in step_work(plan):
        phase = "train" if work.phase == "reference" else work.phase
        predicted[0][phase] += work.tokens * processes
        predicted[1][phase] += work.head_rows * processes
    assert (+predicted[0], +predicted[1]) == (tokens, head_rows)


#: Trains, then leaves this process's greatest resident memory beside the run.
RANK = """
import os, sys
from megatron_jq.cli.main import main

if __name__ == "__main__":
    code = main(sys.argv[2:])
    status = dict(line.split(":") for line in open("/proc/self/status"))
    with open(os.path.join(sys.argv[1], "peak." + os.environ.get("RANK", "0")), "w") as file:
        file.write(str(1024 * int(status["VmHWM"].split()[0])))
    sys.exit(code)
"""
#: Two steps of `small`: the second has the optimizer's moments; lr 0 keeps rationales from ending early.
TRAIN = (
    "--model small --device cpu --prompts-per-step 2 --num-rationales 6 --micro-batch-size 12 --rationale-budget 32 "
    "--answer-budget 8 --tokenizer-vocab-size 400 --train-iters 2 --lr 0 --sample-interval 0 --no-tensorboard"
)


def train_and_measure(folder: Path, flags: list[str], processes: int, environment: dict[str, str]) -> list[int]:
    """Peak of each process in bytes, of `megatron-jq train`."""
    (folder / "rank.py").write_text(RANK)
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    )
    ended = subprocess.run(
        [sys.executable, *launcher, str(folder / "rank.py"), str(folder), "train", *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert ended.returncode == 0, ended.stderr
    return [int((folder / f"peak.{rank}").read_text()) for rank in range(processes)]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's peak")
@pytest.mark.parametrize(
    ("flags", "keeps_freed", "tolerance"),
    [
        # every freed block goes back to the system: what is alive, and no guess about glibc's heap
        ("", False, 0.03),
        ("--tensor-model-parallel-size 2", True, 0.1),
        ("--estimator sft --rationale-field solution --num-rationales 1 --prompts-per-step 12", False, 0.03),
        ("--estimator grpo --grpo-iterations 2 --grpo-kl-beta 0.1", False, 0.03),
    ],
    ids=["one process, live memory", "TP", "SFT", "GRPO with a reference"],
)
def test_peak_memory_is_that_of_a_run(flags, keeps_freed, tolerance, tmp_path):
    draw = random.Random(1)
    words = ["".join(draw.choices("aeiou", k=2) + draw.choices("bdfgklm", k=2)) for _ in range(200)]
    words_of = {"prompt": 40, "answer": 3, "solution": 14}
    record = {field: " ".join(draw.choices(words, k=count)) for field, count in words_of.items()}
    (tmp_path / "data.jsonl").write_text(64 * (json.dumps(record) + "\n"))
    flags = [*TRAIN.split(), *flags.split(), "--train-data", str(tmp_path / "data.jsonl")]
    config = parse_args(flags)
    processes = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    environment = {} if keeps_freed else {"MALLOC_MMAP_THRESHOLD_": "65536"}
    peaks = train_and_measure(tmp_path, [*flags, "--run-dir", str(tmp_path / "run")], processes, environment)
    tokenizer = load_tokenizer("sentencepiece", tmp_path / "run" / "tokenizer.model")
    prompt, answer, given = (len(tokenizer.encode(record[field])) + 1 for field in words_of)
    lengths = Lengths(prompt, 32, config.rollout.answer_budget if config.objective.estimator == "grpo" else answer)
    if config.objective.estimator == "sft":
        lengths = Lengths(prompt, given, answer)
    plan = make_plan(config, processes, lengths, tokenizer.vocab_size)
    for rank, peak in enumerate(peaks):
        memory = stage_memory(plan, rank * plan.pp // processes, keeps_freed=keeps_freed)
        assert memory.peak == pytest.approx(peak, rel=tolerance)
