"""A checkpoint read in another layout has the same weights and moments, exactly, and training goes on alike."""

import multiprocessing
from collections import namedtuple
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from megatron_jq.checkpoint.folder import Manifest, read_manifest
from megatron_jq.checkpoint.loader import Checkpoint, find_checkpoint, load_optimizer, load_random_states, load_weights
from megatron_jq.checkpoint.shards import RANDOM_PREFIX, parameter_shards
from megatron_jq.checkpoint.torch_dist import ShardReader
from megatron_jq.checkpoint.writer import CheckpointWriter
from megatron_jq.config import Config, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_jq.errors import UserError
from megatron_jq.model.build import build_policies, wrap_for_training
from megatron_jq.train import passes
from megatron_jq.train.optimizer import build_optimizer, build_schedule
from tests.distributed.cases import SMALL, TABLE, Q, batch, build_options, estimator, share
from tests.distributed.ranks import run_apart, run_ranks

FOUR = replace(SMALL, num_layers=4)
UNTIED = replace(SMALL, tie_embeddings=False, add_qkv_bias=True, qk_layernorm=False)
EXPERTS = replace(SMALL, num_experts=4, moe_ffn_hidden_size=24, moe_router_topk=2, moe_aux_loss_coeff=0.0)
VOCABULARY = SMALL.vocab_size
#: ranks and build options of one way to run a model
Layout = namedtuple("Layout", "ranks options")


def layout(*, tp=1, pp=1, dp=1, ep=1, virtual_stages=1, **options):
    ranks = {"tp": tp, "pp": pp, "dp": dp, "ep": ep, "virtual_stages": virtual_stages}
    return Layout(ranks, {"virtual_stages": virtual_stages, **options})


class Run:
    """A model in training on this rank: batches of cases.py, GARL, Adam."""

    def __init__(self, runtime, architecture, options, optimizer="adam"):
        self.runtime, self.architecture = runtime, architecture
        options = build_options(architecture, **options)
        self.policies = build_policies(architecture, options, runtime)
        self.model = wrap_for_training(self.policies, options, runtime)
        config = Config(
            model=ModelConfig(bf16=options.params_dtype == torch.bfloat16),
            optimizer=OptimizerConfig(optimizer=optimizer, lr=5e-3, weight_decay=0.1, lr_warmup_iters=10),
            parallel=ParallelConfig(use_distributed_optimizer=options.use_distributed_optimizer),
        )
        self.bf16, self.kind = config.model.bf16, optimizer
        self.optimizer = build_optimizer(self.model, config, runtime)
        self.schedule = build_schedule(self.optimizer, config)

    def steps(self, first, count):
        """ln w of every sequence, before each step."""
        found = []
        for number in range(first, first + count):
            sequences = share(batch(VOCABULARY, seed=number), self.runtime)
            options = passes.BatchOptions(micro_batch_size=2)
            scores = passes.score(self.model, sequences, TABLE, self.runtime, options)
            coefficients = estimator("garl").coefficients(scores.table, q=Q, step=number)
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            passes.train(self.model, sequences, coefficients, self.runtime, options)
            with self.runtime.megatron():
                self.schedule.step(increment=1)
                self.optimizer.step()
            found.append(scores.table.log_w_BM)
        return torch.stack(found)

    def save(self, folder, number, **options):
        writer = CheckpointWriter(folder, self.runtime, timedelta(seconds=60), **options)
        manifest = Manifest(
            number, asdict(self.architecture), VOCABULARY, self.bf16, layout={}, optimizer={"name": self.kind}
        )
        writer.save(self.policies, self.optimizer, manifest)
        return writer

    def load(self, folder):
        found = find_checkpoint(Path(folder), "--load", self.runtime, print)
        load_weights(found, self.policies, self.runtime)
        load_optimizer(found, self.policies, self.optimizer, self.runtime)
        self.schedule.step(increment=found.manifest.step)
        return found


def _write(runtime, folder, architecture, options, optimizer="adam"):
    run = Run(runtime, architecture, options, optimizer)
    run.steps(0, 2)
    run.save(folder, 2).wait()
    return run.steps(2, 3)


def _read(runtime, folder, again, architecture, options, optimizer="adam"):
    run = Run(runtime, architecture, {**options, "seed": 99}, optimizer)  # other weights than those to come
    run.load(folder)
    run.save(again, 2).wait()
    return run.steps(2, 3)


def tensors(folder):
    """Every tensor of a checkpoint, without padding of the vocabulary."""
    reader, found = ShardReader(Path(folder) / "iter_0000002"), {}
    for key, (shape, _) in reader.tensors.items():
        if not key.startswith(RANDOM_PREFIX):
            whole = reader.read(key, (0,) * len(shape), shape)
            vocabulary = key.endswith(("word_embeddings.weight", "output_layer.weight"))
            found[key] = whole[:VOCABULARY] if vocabulary else whole
    return found


BF16 = {"params_dtype": torch.bfloat16}
SHARDED = {"use_distributed_optimizer": True}
CASES = {
    "TP2 to PP2": (SMALL, layout(tp=2), layout(pp=2)),
    "TP1 to TP2xPP2, untied": (UNTIED, layout(), layout(tp=2, pp=2)),
    "TP1 to DP2, distributed optimizer": (SMALL, layout(), layout(dp=2, **SHARDED)),
    "DP2 to PP2xDP2, both distributed": (SMALL, layout(dp=2, **SHARDED), layout(pp=2, dp=2, **SHARDED)),
    "DP2xTP2 distributed to one process": (UNTIED, layout(tp=2, dp=2, **SHARDED), layout()),
    "interleaved to plain": (FOUR, layout(pp=2, virtual_stages=2), layout(pp=2)),
    "plain to interleaved": (FOUR, layout(tp=2), layout(pp=2, virtual_stages=2)),
    "EP1 to EP2": (EXPERTS, layout(), layout(dp=2, ep=2)),
    "EP2 distributed to TP2": (EXPERTS, layout(dp=2, ep=2, **SHARDED), layout(tp=2, sequence_parallel=True)),
    "bf16, TP2 to DP2 distributed": (SMALL, layout(tp=2, **BF16), layout(dp=2, **BF16, **SHARDED)),
}


@pytest.mark.parametrize("case", CASES)
def test_another_layout_has_the_same_tensors_exactly_and_trains_on_alike(case, tmp_path):
    architecture, written, read = CASES[case]
    first, second = tmp_path / "first", tmp_path / "second"
    expected = run_ranks(_write, first, architecture, written.options, **written.ranks)[0]
    continued = run_ranks(_read, first, second, architecture, read.options, **read.ranks)[0]
    before, after = run_apart(tensors, first), run_apart(tensors, second)
    assert before.keys() == after.keys()
    assert {key.split(".")[2] for key in before if key.startswith("optimizer.state.")} >= {"exp_avg", "exp_avg_sq"}
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key
    moved = expected[0] - expected[-1]
    assert moved.abs().max() > 0.05  # training changes the figures by more than what is compared below
    tolerance = 2e-2 if "bf16" in case else 1e-5
    torch.testing.assert_close(continued, expected, rtol=tolerance, atol=tolerance)


def _resume_bitwise(runtime, folder, options, optimizer):
    expected = _write(runtime, folder, SMALL, options, optimizer)
    run = Run(runtime, SMALL, {**options, "seed": 99}, optimizer)
    run.load(folder)
    return torch.equal(expected, run.steps(2, 3))


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [("adam", {}), ("adam", SHARDED), ("adam", BF16), ("adam", {**BF16, **SHARDED}), ("sgd", {})],
    ids=["plain", "sharded", "bf16", "sharded bf16", "sgd"],
)
def test_the_same_layout_goes_on_bit_for_bit(options, optimizer, tmp_path):
    assert all(run_ranks(_resume_bitwise, tmp_path, options, optimizer, dp=2))


def _asynchronous(runtime, folder):
    """A save that goes on while training changes the weights, against one that does not."""
    run = Run(runtime, SMALL, SHARDED)
    run.steps(0, 2)
    run.save(folder / "now", 2).wait()
    writer = run.save(folder / "meanwhile", 2, asynchronous=True)
    assert writer.busy
    run.steps(2, 2)
    writer.wait()
    assert not writer.busy


def test_an_asynchronous_save_holds_the_state_at_its_beginning(tmp_path):
    run_ranks(_asynchronous, tmp_path, dp=2)
    now, meanwhile = run_apart(tensors, tmp_path / "now"), run_apart(tensors, tmp_path / "meanwhile")
    assert now.keys() == meanwhile.keys() and all(torch.equal(now[key], meanwhile[key]) for key in now)


def _megatron_reads_and_writes(runtime, folder):
    run = Run(runtime, SMALL, {})
    run.steps(0, 2)
    run.save(folder / "ours", 2).wait()
    expected = [parameter.detach().clone() for policy in run.policies for parameter in policy.parameters()]
    metadata = {"dp_cp_group": runtime.groups.collection.dp_cp}

    def sharded():
        with runtime.megatron():
            return {f"{i}": policy.sharded_state_dict(metadata=metadata) for i, policy in enumerate(run.policies)}

    def spoil():
        for policy in run.policies:
            for parameter in policy.parameters():
                parameter.data.fill_(7.0)

    def same():
        found = [parameter for policy in run.policies for parameter in policy.parameters()]
        return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    theirs = folder / "theirs" / "iter_0000002"
    if runtime.is_main:
        theirs.mkdir(parents=True)
    torch.distributed.barrier()
    multiprocessing.current_process()._config["daemon"] = False  # its writer starts processes of its own
    dist_checkpointing.save(sharded(), str(theirs))
    spoil()
    # Megatron-core's modules list an empty extra state each, which holds nothing and is not kept here.
    lenient = StrictHandling.IGNORE_ALL
    loaded = dist_checkpointing.load(sharded(), str(folder / "ours" / "iter_0000002"), strict=lenient)
    for i, policy in enumerate(run.policies):
        policy.load_state_dict(loaded[f"{i}"], strict=False)
    megatron_reads = same()
    spoil()
    manifest = read_manifest(folder / "ours" / "iter_0000002")
    load_weights(Checkpoint(theirs, manifest), run.policies, runtime)
    return megatron_reads, same()


@pytest.mark.parametrize("ranks", [{"tp": 2}, {"pp": 2}], ids=["TP2", "PP2"])
def test_megatron_core_reads_our_folders_and_we_read_its(ranks, tmp_path):
    assert run_ranks(_megatron_reads_and_writes, tmp_path, **ranks) == [(True, True)] * 2


def _covered(runtime, architecture, options):
    """Elements of each global tensor that the writing ranks hold, and its size."""
    run = Run(runtime, architecture, options)
    held: dict[str, int] = {}
    sizes = {}
    for shards in parameter_shards(run.policies, runtime).values():
        for shard in shards:
            sizes[shard.sharded.key] = torch.Size(shard.sharded.global_shape).numel()
            if shard.is_written and shard.sharded.replica_id[-1] == 0:
                held[shard.sharded.key] = held.get(shard.sharded.key, 0) + shard.sharded.data.numel()
    return held, sizes


@pytest.mark.parametrize("architecture", [SMALL, EXPERTS], ids=["dense", "experts"])
def test_each_element_of_the_model_has_one_writer(architecture):
    expert = architecture is EXPERTS
    options = {"sequence_parallel": True} if expert else {}
    found = run_ranks(_covered, architecture, options, tp=2, pp=1 if expert else 2, dp=2, ep=2 if expert else 1)
    sizes = {key: size for _, some in found for key, size in some.items()}
    totals = {key: sum(held.get(key, 0) for held, _ in found) for key in sizes}
    assert totals == sizes


def _random_states(runtime, folder):
    run = Run(runtime, SMALL, {})
    run.steps(0, 1)
    torch.manual_seed(100 + runtime.rank)
    run.save(folder, 2).wait()
    expected = torch.rand(3)
    found = find_checkpoint(folder, "--load", runtime, print)
    load_random_states(found, runtime, {"another": 1})
    other = torch.rand(3)
    load_random_states(found, runtime, {})
    return expected, torch.rand(3), other


def test_every_ranks_random_states_come_back_in_the_same_layout_only(tmp_path):
    drawn = run_ranks(_random_states, tmp_path, dp=2)
    for expected, restored, other in drawn:
        assert torch.equal(expected, restored) and not torch.equal(expected, other)
    assert not torch.equal(drawn[0][0], drawn[1][0])


def _refused(runtime, folder, architecture):
    run = Run(runtime, architecture, {})
    try:
        run.load(folder)
    except UserError as fault:
        return str(fault)


def test_a_model_of_other_tensors_is_refused_on_every_rank(tmp_path):
    run_ranks(_write, tmp_path, SMALL, {})
    wider = replace(SMALL, ffn_hidden_size=144)
    [one, two] = run_ranks(_refused, tmp_path, wider, tp=2)
    assert one == two and "linear_fc1.weight has shape (2, 144, 48), the model's is (2, 288, 48)" in one
    [fault] = run_ranks(_refused, tmp_path, UNTIED)
    assert "holds tensors that the model lacks: decoder.layers.self_attention.k_layernorm.weight" in fault
