"""Can Megatron-core's HybridModel, which 0.19 names as GPTModel's successor, carry our policy?

A spike: the same forward pass and head over a HybridModel of the pattern `*-` a layer (an attention layer and an MLP
layer), with a local spec of our own. Same weights, then log-likelihoods, logits and every parameter's gradient against
our GPTModel policy. What this does not exercise: checkpoints, conversion, experts, a run (docs/parallelism.md says what
is missing there).
"""

import dataclasses
import importlib.util
import re

import pytest
import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_jq.architecture import padded_vocab_size
from megatron_jq.model import build as building
from megatron_jq.model.initialise import mark_partitions
from megatron_jq.model.norm import LocalRMSNorm
from megatron_jq.model.policy import RowsForward
from megatron_jq.train import passes
from tests.distributed import reference
from tests.distributed.cases import POLICIES, TABLE, batch, build, build_options, estimator, share
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.core.models.hybrid") is None
    or importlib.util.find_spec("megatron.core.models.hybrid.hybrid_model") is None,
    reason="this Megatron-core has no HybridModel under that name (0.19 has)",
)
BATCHES = {
    "packed": passes.BatchOptions(micro_batch_size=4),
    "trees": passes.BatchOptions(micro_batch_size=4, share_prompts=True),
    "padded": passes.BatchOptions(micro_batch_size=4, sequence_multiple=16),
}


def _hybrid_policy(architecture, options, runtime, like):
    """A HybridModel under our forward pass, with the weights of `like`, our policy of the same layout."""
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.ssm.mlp_layer import MLPLayer

    class HybridPolicy(RowsForward, HybridModel):
        pass

    hybrid_block.TENorm = LocalRMSNorm  # the final norm's class is written into HybridStack
    layer = building.layer_specs(like.config, False, runtime.groups.pp.rank(), None).layer_specs[0].submodules
    attention = TransformerLayerSubmodules(
        input_layernorm=layer.input_layernorm,
        self_attention=layer.self_attention,
        self_attn_bda=layer.self_attn_bda,
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=layer.pre_mlp_layernorm, mlp=layer.mlp, mlp_bda=layer.mlp_bda
    )
    stack = ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        ),
    )
    a, groups = architecture, runtime.groups
    stages = groups.pp.size()
    config = dataclasses.replace(like.config, num_layers=2 * a.num_layers)
    with runtime.megatron():
        policy = HybridPolicy(
            config=config,
            hybrid_stack_spec=stack,
            hybrid_layer_pattern="|".join(["*-" * (a.num_layers // stages)] * stages),
            vocab_size=padded_vocab_size(options.vocab_size, options.make_vocab_size_divisible_by, groups.tp.size()),
            max_sequence_length=a.max_position_embeddings,
            pre_process=groups.is_first_stage,
            post_process=groups.is_last_stage,
            share_embeddings_and_output_weights=a.tie_embeddings,
            position_embedding_type="rope",
            pg_collection=groups.collection,
            true_vocab_size=options.vocab_size,
            chunk_tokens=options.head_chunk_tokens,
        )
    policy.rotary_pos_emb = like.rotary_pos_emb
    mark_partitions(policy)
    theirs = dict(like.named_parameters())
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.copy_(theirs.pop(gpt_name(name)))
    assert not theirs, f"without a counterpart: {sorted(theirs)}"
    return policy


def gpt_name(name: str) -> str:
    """HybridModel's name of a parameter → GPTModel's: layer i is 2i (attention) and 2i + 1 (MLP)."""
    name = name.replace("decoder.final_norm.", "decoder.final_layernorm.")
    return re.sub(r"(?<=decoder\.layers\.)\d+", lambda match: str(int(match.group()) // 2), name)


def _pass(policy, model, runtime, options, names):
    """Log-likelihoods, and gradients by GPTModel's names, on this rank."""
    sequences = share(batch(), runtime)
    scores = passes.score(model, sequences, TABLE, runtime, options, with_rationale=True)
    coefficients = estimator("garl").coefficients(scores.table, q=0.75, step=0)
    model.zero_grad_buffer()
    passes.train(model, sequences, coefficients, runtime, options)
    gradients = {names(name): p.main_grad.clone() for name, p in policy.named_parameters()}
    return scores, gradients


def _both(runtime, sequence_parallel: bool):
    """The largest differences of this rank, by policy and by way of cutting micro-batches."""
    worst = {}
    for name, architecture in POLICIES.items():
        options = build_options(architecture, sequence_parallel=sequence_parallel)
        gpt, model = build(runtime, architecture, reference.noisy_weights(architecture), options)
        hybrid = _hybrid_policy(architecture, options, runtime, gpt)
        hybrid_model = building.wrap_for_training([hybrid], options, runtime)
        for cut, batch_options in BATCHES.items():
            expected, expected_gradients = _pass(gpt, model, runtime, batch_options, str)
            scores, gradients = _pass(hybrid, hybrid_model, runtime, batch_options, gpt_name)
            assert gradients.keys() == expected_gradients.keys()
            gaps = {
                "ln p(z|x)": (scores.table.log_z_BM - expected.table.log_z_BM).abs().max().item(),
                "ln p(y|x,z)": (scores.table.log_w_BM - expected.table.log_w_BM).abs().max().item(),
            }
            for parameter, gradient in gradients.items():
                gaps[parameter] = (gradient - expected_gradients[parameter]).abs().max().item()
            assert any(gradient.abs().max() > 0 for gradient in gradients.values())
            worst[name, cut] = gaps
    return worst


@pytest.mark.parametrize(
    ("tp", "pp", "sequence_parallel"), [(1, 1, False), (2, 1, False), (2, 1, True), (1, 2, False), (2, 2, False)]
)
def test_scores_and_gradients_are_the_gpt_models(tp, pp, sequence_parallel):
    for rank in run_ranks(_both, sequence_parallel, tp=tp, pp=pp):
        for case, gaps in rank.items():
            assert {name: gap for name, gap in gaps.items() if gap != 0.0} == {}, case
