"""F4: tokens and FLOPs of a step by phase: of the whole step, and of one process of each pipeline stage.

A matrix product of a token with a parameter is 2 FLOPs forward and 4 backward. Attention of a token to n keys is
4·n·(query channels): a prompt's tokens attend causally, a branch's to the prompt and causally to the branch; backward
twice that, and half of it again because flash kernels compute the scores twice. Norms, activations and the optimizer
are left out.
"""

from dataclasses import dataclass

from megatron_jq.estimate.parameters import matrix_parameters
from megatron_jq.estimate.plan import Plan
from megatron_jq.estimate.rows import causal

PHASES = ("rollout", "score", "reference", "train")

#: Backward over forward, by parts of the model.
_BACKWARD_MATRIX, _BACKWARD_ATTENTION = 2.0, 2.5


@dataclass(frozen=True)
class Work:
    """Positions of one phase, over all replicas."""

    phase: str
    tokens: int  # through the layers, padding included
    tokens_unshared: int  # the same if every rationale brought a prompt of its own
    head_rows: int  # that meet the vocabulary
    keys: int  # pairs of a token and a key it attends to
    passes: int  # of the busiest replica: forward passes, one after the other


@dataclass(frozen=True)
class StageFlops:
    """FLOPs by phase."""

    rollout: float
    score: float
    reference: float  # ln p of the frozen policy, with --grpo-kl-beta
    train: float

    @property
    def step(self) -> float:
        return self.rollout + self.score + self.reference + self.train


def step_work(plan: Plan, replicas: list[int] | None = None) -> list[Work]:
    """PHASES' work, the reference's only where there is one. replicas: counted ones; None: all."""
    replicas = list(range(plan.dp)) if replicas is None else replicas
    return [_rollout(plan, replicas), *_passes(plan, replicas)]


def _rollout(plan: Plan, replicas: list[int]) -> Work:
    lengths, fed, tail = plan.lengths, plan.fed_tokens, plan.tail_tokens
    waves = [wave for replica in replicas for wave in plan.waves(replica)]
    rationales, prompts = sum(rows for rows, _ in waves), sum(prompts for _, prompts in waves)
    tokens = prompts * lengths.prompt + rationales * (fed + tail)
    generated = sum(lengths.prompt + t for t in range(1, fed + tail + 1))
    head_rows = prompts + rationales * (plan.drawn_tokens - 1) + (rationales * lengths.answer if tail else 0)
    busiest = len(plan.busiest_waves) * (1 + fed + (tail > 0))
    keys = prompts * causal(lengths.prompt) + rationales * generated
    unshared = rationales * (lengths.prompt + fed + tail)
    return Work("rollout", tokens, unshared, head_rows, keys, busiest)


def _passes(plan: Plan, replicas: list[int]) -> list[Work]:
    lengths, rows = plan.lengths, [row for replica in replicas for row in plan.rows[replica]]
    rationales, passes = sum(row.sequences for row in rows), len(plan.busiest_rows)
    counts = sum(row.tokens for row in rows), sum(row.tokens_unshared for row in rows)
    pairs = sum(row.pairs for row in rows)
    trained = rationales * (lengths.rationale + lengths.answer)
    score = Work("score", *counts, rationales * lengths.answer, pairs, passes)
    if plan.scores_in_rollout or plan.imitates:
        score = Work("score", 0, 0, 0, 0, 0)
    reference = [Work("reference", *counts, trained, pairs, passes)] if plan.has_reference else []
    return [score, *reference, Work("train", *(plan.updates * n for n in (*counts, trained, pairs, passes)))]


def stage_flops(plan: Plan, stage: int, replicas: list[int]) -> StageFlops:
    """Of a process of this stage in each of these replicas, summed."""
    chunks = plan.stages[stage]
    layers, heads = sum(chunk.layers for chunk in chunks), any(chunk.heads for chunk in chunks)
    matrix = 2 * matrix_parameters(plan, layers)
    head = 2 * plan.vocab_rows * plan.architecture.hidden_size * heads
    query = plan.architecture.num_attention_heads * plan.architecture.kv_channels / plan.tp
    attention = 4 * query * layers
    by_phase = dict.fromkeys(PHASES, 0.0)
    for work in step_work(plan, replicas):
        parts = work.tokens * matrix, work.keys * attention, work.head_rows * head
        if work.phase == "train":
            again = _recomputed_share(plan, layers)
            factors = 1 + again + _BACKWARD_MATRIX, 1 + again + _BACKWARD_ATTENTION, 1 + _BACKWARD_MATRIX
            if plan.has_nucleus:
                factors = *factors[:2], 2 + _BACKWARD_MATRIX  # the head's logits are made again
            parts = tuple(factor * part for factor, part in zip(factors, parts, strict=True))
        by_phase[work.phase] = sum(parts)
    return StageFlops(**by_phase)


def _recomputed_share(plan: Plan, layers: int) -> float:
    """Of the layers' forward pass that a backward pass repeats."""
    p = plan.config.parallel
    if p.recompute_granularity != "full" or layers == 0:
        return 0.0
    if p.recompute_method == "uniform":
        return 1.0
    chunks = p.num_virtual_stages_per_pipeline_rank
    return min(layers, p.recompute_num_layers * chunks) / layers
