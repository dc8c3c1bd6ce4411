"""The policy over Megatron-core's HybridModel (--model-class hybrid) is the policy over GPTModel, bit for bit.

The same initial weights, the same shards in checkpoints, and from the same weights the same log-likelihoods, gradients
and balance of experts. Runs and resumes across the two: tests/e2e/test_model_class.py.
"""

import importlib.util
from dataclasses import dataclass, field, replace

import pytest
import torch

from megatron_jq.checkpoint.shards import parameter_shards
from megatron_jq.errors import UserError
from megatron_jq.model.build import build_policies, policy_class, wrap_for_training
from megatron_jq.model.initialise import global_name
from megatron_jq.parallel.megatron import versions
from megatron_jq.train import passes
from tests.distributed import reference
from tests.distributed.cases import POLICIES, SMALL, TABLE, batch, build_options, estimator, share
from tests.distributed.ranks import run_ranks
from tests.distributed.shards import load_whole

HAS_HYBRID = importlib.util.find_spec("megatron.core.dist_checkpointing.gpt_checkpoint_interop") is not None
needs_hybrid = pytest.mark.skipif(not HAS_HYBRID, reason="this Megatron-core has no HybridModel for it (0.19 has)")
BATCHES = {
    "packed": passes.BatchOptions(micro_batch_size=4),
    "trees": passes.BatchOptions(micro_batch_size=4, share_prompts=True),
    "padded": passes.BatchOptions(micro_batch_size=4, sequence_multiple=16),
}
DEEP = {"tied": replace(SMALL, num_layers=4)}
EXPERTS = {
    "experts": replace(SMALL, num_experts=4, moe_ffn_hidden_size=40, moe_router_topk=2, moe_aux_loss_coeff=0.05),
}
FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}


@dataclass(frozen=True)
class Case:
    layout: dict = field(default_factory=dict)  # of run_ranks
    options: dict = field(default_factory=dict)  # of the build
    architectures: dict = field(default_factory=lambda: POLICIES)


CASES = {
    "one process": Case(),
    "TP2": Case({"tp": 2}),
    "TP2, SP": Case({"tp": 2}, {"sequence_parallel": True}),
    "PP2": Case({"pp": 2}),
    "TP2 x PP2": Case({"tp": 2, "pp": 2}),
    "uneven interleaved stages, recomputed": Case(
        {"pp": 2, "virtual_stages": 2},
        {"pipeline_layout": "Et|tt||tL", "virtual_stages": 2, "recompute_method": "uniform", **FULL},
        DEEP,
    ),
    "interleaved, one layer recomputed": Case(
        {"pp": 2, "virtual_stages": 2}, {"virtual_stages": 2, "recompute_method": "block", **FULL}, DEEP
    ),
    "selective recompute": Case({}, {"recompute_granularity": "selective"}, DEEP),
    "experts, EP2, recomputed": Case({"dp": 2, "ep": 2}, {"recompute_method": "uniform", **FULL}, EXPERTS),
    "experts, TP2 with SP": Case({"tp": 2}, {"sequence_parallel": True}, EXPERTS),
}


def _global_parameters(policies) -> dict:
    return {global_name(policy, name): p for policy in policies for name, p in policy.named_parameters()}


def _stored(policies, runtime) -> dict:
    """{name: what a checkpoint holds of it}."""
    shards = parameter_shards(policies, runtime)
    return {
        name: [
            (s.key, s.global_shape, s.global_offset, s.local_shape, s.prepend_axis_num, s.replica_id, part.start)
            for part in shards[parameter]
            for s in (part.sharded,)
        ]
        for name, parameter in _global_parameters(policies).items()
    }


def _pass(policies, model, runtime, options) -> dict:
    """{figure or parameter: its value} on this rank."""
    sequences = share(batch(), runtime)
    scores = passes.score(model, sequences, TABLE, runtime, options, with_rationale=True)
    coefficients = estimator("garl").coefficients(scores.table, q=0.75, step=0)
    model.zero_grad_buffer()
    trained = passes.train(model, sequences, coefficients, runtime, options)
    gradients = {name: p.main_grad.clone() for name, p in _global_parameters(policies).items()}
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())
    balance = torch.tensor(trained.expert_balance or 0.0)
    return {"ln p(z|x)": scores.table.log_z_BM, "ln p(y|x,z)": scores.table.log_w_BM, "balance": balance, **gradients}


def _differing(runtime, case: Case) -> dict:
    """{what was compared: the names that differ} of this rank."""
    differing = {}
    for name, architecture in case.architectures.items():
        options = build_options(architecture, **case.options)
        built = {
            kind: build_policies(architecture, replace(options, model_class=kind), runtime)
            for kind in ("gpt", "hybrid")
        }
        parameters = {kind: _global_parameters(policies) for kind, policies in built.items()}
        assert list(parameters["gpt"]) == list(parameters["hybrid"])  # in the same order: Megatron-core's buffers
        pairs = [(key, *(parameters[kind][key] for kind in built)) for key in parameters["gpt"]]
        differing[name, "initial weights"] = [key for key, gpt, hybrid in pairs if not torch.equal(gpt, hybrid)]
        stored = [_stored(policies, runtime) for policies in built.values()]
        differing[name, "checkpoint"] = [key for key in stored[0] if stored[0][key] != stored[1][key]]
        for policy in built["gpt"]:
            load_whole(policy, runtime, reference.noisy_weights(architecture))
        with torch.no_grad():
            for _, gpt, hybrid in pairs:
                hybrid.copy_(gpt)
        models = {kind: wrap_for_training(policies, options, runtime) for kind, policies in built.items()}
        for cut, batch_options in BATCHES.items():
            gpt, hybrid = (_pass(built[kind], models[kind], runtime, batch_options) for kind in built)
            assert gpt.keys() == hybrid.keys()
            differing[name, cut] = [key for key in gpt if not torch.equal(gpt[key], hybrid[key])]
    return differing


@needs_hybrid
@pytest.mark.parametrize("name", CASES)
def test_weights_shards_scores_and_gradients_are_those_of_gpt_model(name):
    case = CASES[name]
    for rank in run_ranks(_differing, case, **case.layout):
        assert len(rank) == len(case.architectures) * (2 + len(BATCHES))
        assert {what: names for what, names in rank.items() if names} == {}


def _recomputed_layers(runtime) -> dict[str, int]:
    options = build_options(SMALL, recompute_method="block", **FULL)
    kinds = {kind: build_policies(SMALL, replace(options, model_class=kind), runtime)[0] for kind in ("gpt", "hybrid")}
    return {kind: policy.config.recompute_num_layers / policy.MODULES for kind, policy in kinds.items()}


@needs_hybrid
def test_a_recomputed_layer_is_one_of_the_architecture():
    assert run_ranks(_recomputed_layers) == [{"gpt": 1, "hybrid": 1}]


@pytest.mark.skipif(HAS_HYBRID, reason="this Megatron-core has HybridModel")
def test_an_older_megatron_core_is_refused_with_the_version_that_it_takes():
    for refused in (versions.check_hybrid_model, lambda: policy_class("hybrid")):
        with pytest.raises(UserError, match=r"--model-class hybrid needs Megatron-core 0\.19 .* --model-class gpt"):
            refused()
