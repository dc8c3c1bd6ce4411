"""Prompts that are computed once for all their rationales: figures and gradients are those of the plain sequences."""

from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_jq.architecture_files import load_architecture
from megatron_jq.checkpoint.convert import hf_to_megatron
from megatron_jq.checkpoint.folder import read_manifest
from megatron_jq.checkpoint.loader import Checkpoint, load_weights
from megatron_jq.checkpoint.slabs import ShardLayout
from megatron_jq.model.build import build_policies, wrap_for_training
from megatron_jq.model.hf import hugging_face_tensors
from megatron_jq.records import Coefficients, TrainingSequence
from megatron_jq.train import passes
from megatron_jq.train.passes import BatchOptions
from tests.distributed import families, reference
from tests.distributed.cases import SMALL, build_options, gather_gradient_shards
from tests.distributed.ranks import run_apart, run_ranks
from tests.distributed.shards import join, load_whole, named_tensors

#: prompt length, [(rationale length, sampled of these, answer length)]
Group = namedtuple("Group", "prompt branches")
Case = namedtuple("Case", "groups options batch ranks")
UNTIED = replace(SMALL, tie_embeddings=False, add_qkv_bias=True, qk_layernorm=False)


def sequences_of(groups: list[Group]) -> list[TrainingSequence]:
    draw = torch.Generator().manual_seed(11)

    def ids(count):
        return tuple(torch.randint(SMALL.vocab_size, (count,), generator=draw).tolist())

    found = []
    for b, group in enumerate(groups):
        prompt = ids(group.prompt)
        found += [TrainingSequence(b, m, prompt, ids(z), n, ids(y)) for m, (z, n, y) in enumerate(group.branches)]
    return found


def shape_of(groups: list[Group]) -> tuple[int, int]:
    return len(groups), max(len(group.branches) for group in groups)


def _passes(runtime, architecture, groups, options, batches: list[BatchOptions]):
    """[(scores, table of the trained pass, its token counts, gradients)] for each way to batch."""
    options = build_options(architecture, params_dtype=torch.float64, **options)
    policies = build_policies(architecture, options, runtime)
    for policy in policies:
        load_whole(policy, runtime, reference.noisy_weights(architecture))
    model = wrap_for_training(policies, options, runtime)
    dp, sequences, shape = runtime.groups.dp, sequences_of(groups), shape_of(groups)
    first, last = (len(sequences) * (dp.rank() + i) // dp.size() for i in (0, 1))
    mine = sequences[first:last]  # a group may lie on both sides of a cut
    draw = torch.Generator().manual_seed(12)
    coefficients = Coefficients(*(torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2)))
    found = []
    for batch in batches:
        scores = passes.score(model, mine, shape, runtime, batch)
        model.zero_grad_buffer()
        trained = passes.train(model, mine, coefficients, runtime, batch)
        gather_gradient_shards(model)
        gradients = [named_tensors(policy, runtime, lambda p: p.main_grad.clone()) for policy in policies]
        found.append((scores.table.log_w_BM, trained, gradients))
    return found


def assert_same(groups, options, batch: BatchOptions, ranks: dict, architecture=SMALL):
    ways = [batch, replace(batch, share_prompts=False)]
    ranks_found = run_ranks(_passes, architecture, groups, options, ways, **ranks)
    shared, plain = ([rank[way] for rank in ranks_found] for way in (0, 1))
    for mine, theirs in zip(shared, plain, strict=True):
        for a, b in ((mine[0], theirs[0]), *((getattr(mine[1].table, n), getattr(theirs[1].table, n)) for n in TABLES)):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, equal_nan=True)
    gradients, expected = (
        join([chunk for rank in way for chunk in rank[2]], SMALL.vocab_size, padding=0.0) for way in (shared, plain)
    )
    assert gradients.keys() == expected.keys()
    assert max(reference.norm_difference(gradients, expected).values()) <= 1e-10
    return shared[0][1], plain[0][1]


TABLES = ("log_z_BM", "log_w_BM")
RAGGED = [
    Group(9, [(5, 5, 2), (1, 0, 1), (12, 11, 3)]),
    Group(1, [(4, 4, 1), (2, 1, 1)]),
    Group(17, [(0, 0, 1), (3, 3, 4), (0, 0, 2), (7, 6, 1), (1, 1, 1)]),
    Group(6, [(6, 6, 2)]),
]
SIXTEEN = [Group(20, [(1 + m % 5, 1 + m % 5, 1 + m % 2) for m in range(16)])]
CASES = {
    "ragged, one row": Case(RAGGED, {}, BatchOptions(100), {}),
    "groups split over rows": Case(RAGGED, {}, BatchOptions(2), {}),
    "groups split over replicas": Case(RAGGED, {}, BatchOptions(4), {"dp": 2}),
    "sixteen, split by tokens": Case(SIXTEEN, {}, BatchOptions(1, max_tokens=48), {}),
    "sixteen, padded branches, TP2 with SP": Case(
        SIXTEEN, {"sequence_parallel": True}, BatchOptions(100, sequence_multiple=4), {"tp": 2}
    ),
    "moved between replicas, PP2": Case(RAGGED + SIXTEEN, {}, BatchOptions(1, max_tokens=60), {"pp": 2, "dp": 2}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("architecture", [SMALL, UNTIED], ids=["tied", "untied"])
def test_scores_and_gradients_are_those_of_plain_sequences(name, architecture):
    case = CASES[name]
    shared, plain = assert_same(case.groups, case.options, case.batch, case.ranks, architecture)
    assert shared.tokens_saved > 0 and plain.tokens_saved == 0


def test_tokens_computed_and_saved_are_counted():
    shared, plain = assert_same(RAGGED, {}, BatchOptions(100), {})
    branches = sum(z + y for group in RAGGED for z, _, y in group.branches)
    assert shared.tokens_computed == sum(group.prompt for group in RAGGED) + branches
    assert plain.tokens_computed == sum(group.prompt * len(group.branches) for group in RAGGED) + branches
    assert shared.tokens_computed + shared.tokens_saved == plain.tokens_computed


branch = st.integers(0, 9).flatmap(lambda z: st.tuples(st.just(z), st.integers(max(0, z - 1), z), st.integers(1, 4)))
groups = st.lists(
    st.builds(Group, st.integers(1, 30), st.lists(branch, min_size=1, max_size=6)), min_size=2, max_size=4
)
layouts = st.sampled_from(
    [
        ({}, {}),
        ({"tp": 2}, {"sequence_parallel": True}),
        ({"pp": 2}, {}),
        ({"dp": 2}, {"use_distributed_optimizer": True}),
        ({"pp": 2, "virtual_stages": 2}, {"virtual_stages": 2}),
        ({}, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
    ]
)
batches = st.one_of(
    st.builds(BatchOptions, st.integers(1, 9), sequence_multiple=st.sampled_from([1, 4])),
    st.builds(BatchOptions, st.just(1), max_tokens=st.integers(44, 120), sequence_multiple=st.sampled_from([1, 4])),
)


@settings(max_examples=10, deadline=None)
@given(groups, layouts, batches)
def test_random_trees_layouts_and_budgets_change_nothing(groups, layout, batch):
    ranks, options = layout
    assert_same(groups, options, batch, ranks, replace(SMALL, num_layers=4))


def _hugging_face(folder, groups, coefficients):
    """Table [n, 2] of transformers' model on the plain sequences, and the gradient of each of its tensors."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    table, loss = [], 0.0
    for s in sequences_of(groups):
        ids = torch.tensor([*s.prompt_ids, *s.rationale_ids, *s.answer_ids])
        log_probs = model(ids[None], use_cache=False).logits[0].log_softmax(dim=-1)
        each = log_probs[:-1].gather(1, ids[1:, None])[:, 0]
        z, y = len(s.prompt_ids) - 1, len(s.prompt_ids) + len(s.rationale_ids) - 1
        row = torch.stack([each[z : z + s.num_sampled].sum(), each[y:].sum()])
        c = [table_BM[s.prompt_slot, s.rationale_slot] for table_BM in coefficients]
        loss = loss - (c[0] * row[0] + c[1] * row[1])
        table.append(row.detach())
    loss.backward()
    return torch.stack(table), {name: p.grad for name, p in model.named_parameters()}


def _ours(runtime, folder, source, groups, coefficients):
    architecture = replace(load_architecture(str(source)), max_position_embeddings=512)
    options = build_options(architecture, params_dtype=torch.float64)
    policies = build_policies(architecture, options, runtime)
    load_weights(Checkpoint(folder, read_manifest(folder)), policies, runtime)
    model = wrap_for_training(policies, options, runtime)
    model.zero_grad_buffer()
    trained = passes.train(model, sequences_of(groups), Coefficients(*coefficients), runtime, BatchOptions(100))
    slabs = {}
    for name, parameter in policies[0].named_parameters():
        slabs[name.removeprefix("module.")] = parameter.main_grad
    return trained, {t.name: _as_hugging_face(t, slabs) for t in hugging_face_tensors(architecture)}


def _as_hugging_face(tensor, gradients):
    """The rows of our gradients that the table puts into a tensor of transformers."""
    parts = []
    for span in tensor.spans:
        key = span.slab.key
        if span.slab.index:
            key = key.replace("layers.", f"layers.{span.slab.index[0]}.")
        key = key.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
        key = key.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
        parts.append(gradients[key][span.at : span.at + span.count])
    return torch.cat(parts)


@pytest.mark.parametrize("family", ["qwen3, tied", "llama, untied"])
def test_gradients_are_those_of_transformers_on_plain_sequences(family, tmp_path):
    source = tmp_path / "source"
    run_apart(families.make, family, source)
    folder = hf_to_megatron(source, tmp_path / "ours", ShardLayout())
    groups, draw = RAGGED, torch.Generator().manual_seed(4)
    coefficients = [torch.randn(shape_of(groups), generator=draw, dtype=torch.float64) for _ in range(2)]
    table, expected = run_apart(_hugging_face, source, groups, coefficients)
    [(trained, gradients)] = run_ranks(_ours, folder, source, groups, coefficients)
    slots = [(s.prompt_slot, s.rationale_slot) for s in sequences_of(groups)]
    log_p_n2 = torch.stack([torch.stack([getattr(trained.table, name)[slot] for name in TABLES]) for slot in slots])
    # transformers rounds the rotary angles' cosines to float32
    torch.testing.assert_close(log_p_n2, table, rtol=1e-6, atol=1e-6)
    assert trained.tokens_saved > 0
    assert gradients.keys() >= expected.keys()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
