"""The policies, the batch and the passes that the distributed tests share."""

import random
from dataclasses import dataclass, replace

import torch

from megatron_jq.architecture import Architecture
from megatron_jq.model.build import BuildOptions, build_policies, wrap_for_training
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.records import Coefficients, TrainingSequence
from megatron_jq.rollout.engine import share_of_replica
from megatron_jq.train import passes
from megatron_jq.train.estimators import Estimator
from tests.distributed.shards import load_whole, named_tensors

#: 70 tokens pad to 80 rows on one tensor-parallel rank and to 96 on two; four heads of 16 do not make up the width.
SMALL = Architecture(
    num_layers=2, hidden_size=48, ffn_hidden_size=72, num_attention_heads=4, num_query_groups=2, kv_channels=16,
    max_position_embeddings=1024, qk_layernorm=True, tie_embeddings=True, vocab_size=70,
)  # fmt: skip
POLICIES = {
    "tied, qk norm": SMALL,
    "untied, qkv bias": replace(SMALL, tie_embeddings=False, add_qkv_bias=True, qk_layernorm=False),
}
NUM_PROMPTS, NUM_RATIONALES, Q = 3, 3, 0.75
TABLE = (NUM_PROMPTS, NUM_RATIONALES)


def build_options(architecture: Architecture, **changes) -> BuildOptions:
    defaults = {"vocab_size": architecture.vocab_size, "make_vocab_size_divisible_by": 16, "head_chunk_tokens": 7}
    return BuildOptions(**{**defaults, **changes})


def build(runtime: Runtime, architecture: Architecture, weights, options: BuildOptions):
    """(policy, policy wrapped for training) with the given whole weights."""
    [policy] = build_policies(architecture, options, runtime)
    load_whole(policy, runtime, weights)
    return policy, wrap_for_training([policy], options, runtime)


def batch(vocab_size: int = 70, seed: int = 3) -> list[TrainingSequence]:
    """Three prompts with three ragged rationales each; some end in forced tokens, one is forced throughout."""
    rng = random.Random(seed)
    sequences = []

    def ids(low, high):
        return tuple(rng.randrange(vocab_size) for _ in range(rng.randint(low, high)))

    for b in range(NUM_PROMPTS):
        prompt, answer = ids(2, 9), ids(1, 4)
        for m in range(NUM_RATIONALES):
            rationale = ids(2, 8)
            forced = (0, 1, len(rationale))[2 if (b, m) == (2, 0) else rng.randint(0, 1)]
            sequences.append(TrainingSequence(b, m, prompt, rationale, len(rationale) - forced, answer))
    return sequences


def share(sequences: list[TrainingSequence], runtime: Runtime) -> list[TrainingSequence]:
    """This replica's sequences, cut as a run cuts them: the middle prompt lies on both of two replicas."""
    dp = runtime.groups.dp
    mine = {(b, m) for b, slots in share_of_replica(*TABLE, dp.rank(), dp.size()) for m in slots}
    return [s for s in sequences if (s.prompt_slot, s.rationale_slot) in mine]


def estimator(name: str) -> Estimator:
    return Estimator(name, num_resamples=NUM_RATIONALES, normalize=True, seed=5)


@dataclass(frozen=True)
class Pass:
    """What one score-and-train pass left on one rank."""

    scores: passes.PassResult
    coefficients: Coefficients
    trained: passes.PassResult
    gradients: tuple  # named_tensors of the gradient buffers


def score_and_train(
    runtime: Runtime,
    policy,
    model,
    sequences: list[TrainingSequence],
    options: passes.BatchOptions,
    name: str,
    shape=TABLE,
) -> Pass:
    """Score, coefficients, forward-backward, as a training step does, for this replica's sequences."""
    scores = passes.score(model, sequences, shape, runtime, options, with_rationale=True)
    coefficients = estimator(name).coefficients(scores.table, q=Q, step=0)
    return train_with(runtime, policy, model, sequences, options, coefficients, scores)


def train_with(runtime, policy, model, sequences, options, coefficients, scores=None) -> Pass:
    model.zero_grad_buffer()
    trained = passes.train(model, sequences, coefficients, runtime, options)
    gather_gradient_shards(model)
    return Pass(scores, coefficients, trained, named_tensors(policy, runtime, lambda p: p.main_grad.float()))


def gather_gradient_shards(model) -> None:
    """With the distributed optimizer a replica holds the reduced gradient of its shard alone: fetch the others'."""
    for chunk in model.chunks:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                parts = list(bucket.grad_data.chunk(group.size()))
                torch.distributed.all_gather(parts, parts[group.rank()].clone(), group=group)
                bucket.grad_data.copy_(torch.cat(parts))
