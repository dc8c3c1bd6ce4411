"""F4: a process's parameters, tensor by tensor, as Megatron-core splits them."""

from dataclasses import dataclass

from megatron_jq.estimate.plan import Plan


@dataclass(frozen=True)
class Parameters:
    """Elements on one process."""

    shared: int  # all but experts: reduced over data-parallel replicas
    experts: int  # reduced over the copies of each expert
    largest: int  # of the largest tensor
    norms: int  # under sequence parallelism their gradients are summed over the tensor-parallel group
    query_key_norms: int  # theirs are summed there in any case

    @property
    def total(self) -> int:
        return self.shared + self.experts


def layer_tensors(plan: Plan) -> tuple[list[int], list[int]]:
    """Sizes of one layer's tensors: (shared ones, experts')."""
    a, tp = plan.architecture, plan.tp
    query, key = a.num_attention_heads * a.kv_channels, a.num_query_groups * a.kv_channels
    shared = [a.hidden_size * (query + 2 * key) // tp, query * a.hidden_size // tp]
    if a.add_qkv_bias:
        shared.append((query + 2 * key) // tp)
    if a.num_experts is None:
        return [*shared, 2 * a.ffn_hidden_size * a.hidden_size // tp, a.hidden_size * a.ffn_hidden_size // tp], []
    matrix = a.hidden_size * a.moe_ffn_hidden_size // plan.etp
    return [*shared, a.num_experts * a.hidden_size], [2 * matrix, matrix] * (a.num_experts // plan.ep)


def stage_parameters(plan: Plan, stage: int) -> Parameters:
    """Of the processes of one pipeline stage; a tied output layer on another stage than the embedding is a copy."""
    a, chunks = plan.architecture, plan.stages[stage]
    layers = sum(chunk.layers for chunk in chunks)
    shared, experts = layer_tensors(plan)
    vocabulary = plan.vocab_rows * a.hidden_size
    embeds, heads = (any(getattr(chunk, name) for chunk in chunks) for name in ("embeds", "heads"))
    tables = embeds + (heads and not (a.tie_embeddings and plan.pp == 1))
    query_key_norms = layers * 2 * a.kv_channels * a.qk_layernorm
    norms = layers * 2 * a.hidden_size + query_key_norms + heads * a.hidden_size
    largest = max([vocabulary] * tables + [*shared, *experts] * (layers > 0))
    return Parameters(
        shared=layers * sum(shared) + norms + tables * vocabulary,
        experts=layers * sum(experts),
        largest=largest,
        norms=norms,
        query_key_norms=query_key_norms,
    )


def matrix_parameters(plan: Plan, layers: int) -> float:
    """Parameters that a token is multiplied with in so many layers of one process; of experts, those that it visits.
    Under sequence parallelism each process routes its own tokens, so that it counts a share of the router.
    """
    a = plan.architecture
    shared, _ = layer_tensors(plan)
    matrices = sum(shared) - (shared[2] if a.add_qkv_bias else 0)
    if a.num_experts is None:
        return layers * matrices
    router = a.num_experts * a.hidden_size
    visited = 3 * a.moe_router_topk * a.hidden_size * a.moe_ffn_hidden_size / plan.tp
    return layers * (matrices - router + router / plan.split + visited)
