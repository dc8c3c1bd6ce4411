"""The head over a row that is split in Megatron's zig-zag order equals the head over the whole row (CP2, CP2 x TP2)."""

import pytest
import torch
import torch.distributed as dist

from megatron_jq.model.context import head_of_rank, zigzag_positions
from megatron_jq.model.head import score_rows
from megatron_jq.model.rows import pack_sequences
from megatron_jq.records import TrainingSequence
from tests.distributed.ranks import run_ranks

VOCABULARY, WIDTH = 46, 12


def test_zigzag_is_megatrons_order():
    assert zigzag_positions(8, 0, 2).tolist() == [0, 1, 6, 7]
    assert zigzag_positions(8, 1, 2).tolist() == [2, 3, 4, 5]


def _problem():
    generator = torch.Generator().manual_seed(5)
    sequences = [
        TrainingSequence(0, 0, (1, 2, 3), (4, 5, 9), 2, (7, 8)),
        TrainingSequence(0, 1, (1, 2, 3), (9,), 1, (7, 8)),
        TrainingSequence(1, 0, (6,), (5, 4, 3, 2, 9), 5, (1, 0, 8)),
    ]
    pairs = torch.randn(3, 2, generator=generator, dtype=torch.float64).tolist()
    rows = pack_sequences(
        sequences,
        device=torch.device("cpu"),
        with_rationale=True,
        coefficients=[tuple(pair) for pair in pairs],
        temperature=0.7,
        row_multiple=4,
    )
    hidden = torch.randn(len(rows.token_T), WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(48, WIDTH, generator=generator, dtype=torch.float64)
    return rows, hidden, weight


def _head_on_a_rank(runtime, context, tensor):
    """Groups by hand: Megatron-core's run refuses context parallelism on the local spec, the head itself does not."""
    ranks = range(context * tensor)
    groups_cp = [dist.new_group([r for r in ranks if r % tensor == t]) for t in range(tensor)]
    groups_tp = [dist.new_group([r for r in ranks if r // tensor == c]) for c in range(context)]
    cp, tp = groups_cp[runtime.rank % tensor], groups_tp[runtime.rank // tensor]
    rows, hidden, weight = _problem()
    mine = zigzag_positions(len(hidden), cp.rank(), cp.size())
    hidden_mine = hidden[mine].clone().requires_grad_()
    shard = weight.chunk(tensor)[tp.rank()].clone().requires_grad_()
    head = head_of_rank(rows.head, len(hidden), cp.rank(), cp.size())
    output = score_rows(
        hidden_mine[head.position_N], shard, head, tp=tp, cp=cp, vocab_size=VOCABULARY, chunk_tokens=2
    )
    loss, table = output.loss, torch.stack([output.log_z_n, output.log_w_n], dim=1)
    loss.backward()
    # What Megatron-core does with a replica's part: sum over context-parallel ranks (and over the shards, for hidden).
    dist.all_reduce(loss := loss.detach(), group=cp)
    dist.all_reduce(shard.grad, group=cp)
    dist.all_reduce(hidden_mine.grad, group=tp)
    return {"loss": loss, "table": table, "weight": shard.grad, "hidden": hidden_mine.grad, "places": mine}


@pytest.mark.parametrize(("context", "tensor"), [(2, 1), (2, 2)])
def test_split_head_equals_whole_head(context, tensor):
    rows, hidden, weight = _problem()
    hidden.requires_grad_()
    weight.requires_grad_()
    logits = (hidden @ weight.t())[:, :VOCABULARY]
    head = rows.head
    log_prob = (logits[head.position_N] * head.inverse_temperature_N[:, None]).log_softmax(-1)
    log_prob = log_prob.gather(1, head.target_N[:, None])[:, 0]
    table = torch.zeros(6, dtype=torch.float64).index_add(0, head.cell_N, log_prob).view(3, 2)
    loss = (head.coefficient_N * log_prob).sum()
    loss.backward()

    results = run_ranks(_head_on_a_rank, context, tensor, dp=context * tensor)
    for rank, result in enumerate(results):
        torch.testing.assert_close(result["table"], table.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(result["hidden"], hidden.grad[result["places"]], rtol=1e-6, atol=1e-7)
        shard = weight.grad.chunk(tensor)[rank % tensor]
        torch.testing.assert_close(result["weight"], shard, rtol=1e-6, atol=1e-7)
