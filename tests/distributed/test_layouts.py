"""The remaining layouts of Megatron-core give the one-process gradient: interleaved and uneven pipelines, recomputed
activations, overlapped reduction, sharded optimizer, token budgets, an idle replica. In float32 and in float64.
"""

from dataclasses import dataclass, field, replace

import pytest
import torch

from megatron_jq.model.build import build_policies, wrap_for_training
from megatron_jq.train import passes
from megatron_jq.train.passes import BatchOptions
from tests.distributed import reference
from tests.distributed.cases import (
    SMALL,
    TABLE,
    batch,
    build_options,
    estimator,
    gather_gradient_shards,
    share,
)
from tests.distributed.ranks import run_ranks
from tests.distributed.shards import join, load_whole, named_tensors

DEEP = replace(SMALL, num_layers=4)
POLICIES = {"tied": DEEP, "untied": replace(DEEP, tie_embeddings=False, add_qkv_bias=True)}
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@dataclass(frozen=True)
class Layout:
    """What differs from one process, one chunk, two sequences a micro-batch."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    virtual: int = 1
    options: dict = field(default_factory=dict)
    batch: BatchOptions = BatchOptions(micro_batch_size=2)
    idle: bool = False  # the last replica gets no sequence


LAYOUTS = {
    "sequence parallel": Layout(tp=2, options={"sequence_parallel": True}),
    "interleaved": Layout(pp=2, virtual=2),
    "interleaved, uneven number of micro-batches": Layout(pp=2, virtual=2, batch=BatchOptions(micro_batch_size=3)),
    "interleaved, TP2 with SP": Layout(tp=2, pp=2, virtual=2, options={"sequence_parallel": True}),
    "uneven stages": Layout(pp=2, options={"pipeline_layout": "Ettt|tL"}),
    "uneven interleaved stages": Layout(pp=2, virtual=2, options={"pipeline_layout": "Et|tt||tL"}),
    "full recompute": Layout(options=FULL_RECOMPUTE),
    "full recompute, TP2 with SP, PP2": Layout(tp=2, pp=2, options={"sequence_parallel": True, **FULL_RECOMPUTE}),
    "selective recompute": Layout(options={"recompute_granularity": "selective"}),
    "distributed optimizer": Layout(dp=2, options={"use_distributed_optimizer": True}),
    "overlapped reduction": Layout(dp=2, options={"overlap_grad_reduce": True}),
    "overlapped reduction, interleaved": Layout(pp=2, dp=2, virtual=2, options={"overlap_grad_reduce": True}),
    "token budget, packed": Layout(dp=2, batch=BatchOptions(micro_batch_size=1, max_tokens=60)),
    "token budget, PP2": Layout(pp=2, batch=BatchOptions(micro_batch_size=1, max_tokens=30, sequence_multiple=4)),
    "one row": Layout(batch=BatchOptions(micro_batch_size=100)),
    "an idle replica": Layout(dp=2, idle=True),
    "an idle replica, overlapped, PP2": Layout(pp=2, dp=2, idle=True, options={"overlap_grad_reduce": True}),
}


def _gradients(runtime, layout: Layout, dtype: torch.dtype):
    """{policy: (coefficients, log-likelihoods of the trained pass, [named gradients of each chunk])} of this rank."""
    results = {}
    for name, architecture in POLICIES.items():
        options = build_options(architecture, params_dtype=dtype, virtual_stages=layout.virtual, **layout.options)
        policies = build_policies(architecture, options, runtime)
        for policy in policies:
            load_whole(policy, runtime, reference.noisy_weights(architecture))
        model = wrap_for_training(policies, options, runtime)
        sequences = share(batch(), runtime)
        if layout.idle:  # replica 0 takes everything
            sequences = batch() if runtime.groups.dp.rank() == 0 else []
        for _ in range(2):  # the second pass finds what the first may have left behind
            scores = passes.score(model, sequences, TABLE, runtime, layout.batch)
            coefficients = estimator("garl").coefficients(scores.table, q=0.75, step=0)
            model.zero_grad_buffer()
            trained = passes.train(model, sequences, coefficients, runtime, layout.batch)
        gather_gradient_shards(model)
        gradients = [named_tensors(policy, runtime, lambda p: p.main_grad) for policy in policies]
        results[name] = (coefficients.rationale_BM, trained.table.log_z_BM, scores.table.log_w_BM, gradients)
    return results


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["float32", "float64"])
def alone(request):
    """(dtype, results of one process in float64 that computes every sequence with a prompt of its own).

    All layouts share prompts.
    """
    unshared = Layout(batch=BatchOptions(micro_batch_size=2, share_prompts=False))
    [result] = run_ranks(_gradients, unshared, torch.float64)
    return request.param, result


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradient_is_that_of_one_process(alone, name):
    dtype, expected = alone
    layout = LAYOUTS[name]
    ranks = run_ranks(
        _gradients, layout, dtype, tp=layout.tp, pp=layout.pp, dp=layout.dp, virtual_stages=layout.virtual
    )
    tolerance = TOLERANCE[dtype]
    for policy in POLICIES:
        *tables, whole = expected[policy]
        whole = join(whole, SMALL.vocab_size, padding=0.0)
        parts = []
        for rank in ranks:
            *found, chunks = rank[policy]
            parts.extend(chunks)
            for mine, theirs in zip(found, tables, strict=True):
                assert (mine - theirs).norm() <= tolerance * theirs.norm(), policy
        gradients = join(parts, SMALL.vocab_size, padding=0.0)
        assert gradients.keys() == whole.keys()
        differences = reference.norm_difference(gradients, whole)
        largest = max(differences, key=differences.get)
        assert differences[largest] <= tolerance, (policy, largest, differences[largest])
