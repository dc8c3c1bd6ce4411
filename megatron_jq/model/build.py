"""F3: build the policy of one pipeline stage for a layout, and wrap it for training.

Decides once: Transformer Engine's layers where they can be imported and run (CUDA), Megatron-core's local layers
otherwise; fused kernels of NVIDIA Apex where they are installed. Core attention and head are ours in both cases.
"""

import importlib.util
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_jq.architecture import Architecture, padded_vocab_size
from megatron_jq.errors import UserError
from megatron_jq.model.attention import PlannedAttention
from megatron_jq.model.initialise import initialise, mark_partitions
from megatron_jq.model.norm import LocalRMSNorm
from megatron_jq.model.policy import Policy
from megatron_jq.model.rotary import RotaryAt
from megatron_jq.parallel.runtime import Runtime


@dataclass(frozen=True)
class BuildOptions:
    """What a run chooses about its model beside the architecture."""

    vocab_size: int  # true size: the tokenizer's or the checkpoint's
    make_vocab_size_divisible_by: int = 128
    params_dtype: torch.dtype = torch.float32
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    transformer_impl: str = "auto"  # auto | local | transformer_engine
    head_chunk_tokens: int | None = None  # None: by memory
    seed: int = 1234


def use_transformer_engine(choice: str, device: torch.device) -> bool:
    """Whether layers come from Transformer Engine. Raises UserError when it is demanded and cannot be."""
    present = importlib.util.find_spec("transformer_engine") is not None
    if choice == "transformer_engine" and not (present and device.type == "cuda"):
        raise UserError(
            "--transformer-impl transformer_engine needs CUDA and the package transformer-engine "
            "(pip install megatron-jq[te]); use --transformer-impl auto to take Megatron-core's local layers otherwise"
        )
    return choice != "local" and present and device.type == "cuda"


def kernels(options: BuildOptions, runtime: Runtime) -> str:
    """Where layers and optimizer take their kernels from, in a word each, for the run's opening line."""
    layers = "Transformer Engine" if use_transformer_engine(options.transformer_impl, runtime.device) else "local"
    packages = {"transformer_engine": "Transformer Engine", "amp_C": "Apex"}  # in Megatron-core's order of preference
    fused = [name for module, name in packages.items() if importlib.util.find_spec(module) is not None]
    return f"{layers} layers, {fused[0] if fused else 'torch'} optimizer"


def transformer_config(architecture: Architecture, options: BuildOptions, runtime: Runtime) -> TransformerConfig:
    """Megatron-core's configuration for this architecture and layout."""
    on_cuda = runtime.device.type == "cuda"
    apex_wgrad = on_cuda and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        qk_layernorm=architecture.qk_layernorm,
        add_bias_linear=False,
        add_qkv_bias=architecture.add_qkv_bias,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=runtime.groups.tp.size(),
        pipeline_model_parallel_size=runtime.groups.pp.size(),
        sequence_parallel=options.sequence_parallel and runtime.groups.tp.size() > 1,
        params_dtype=options.params_dtype,
        pipeline_dtype=options.params_dtype,
        bf16=options.params_dtype == torch.bfloat16,
        use_cpu_initialization=not on_cuda,
        perform_initialization=False,  # initialise.py draws weights that do not depend on the layout
        # Rows of a micro-batch are packed and differ in length; stages tell each other the shape.
        variable_seq_lengths=runtime.groups.pp.size() > 1,
        moe_token_dispatcher_type="alltoall",  # Megatron-core ties variable lengths to it, dense models included
        # Gradients are plain sums over micro-batches and replicas: our coefficients hold every denominator.
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=apex_wgrad,
        bias_activation_fusion=on_cuda,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,  # positions are given token by token
    )


def layer_specs(config: TransformerConfig, transformer_engine: bool, pp_rank: int) -> TransformerBlockSubmodules:
    """Megatron-core's layer spec with our core attention (and, for local layers, our norm)."""
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        spec: ModuleSpec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        norm = TENorm
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
        norm = LocalRMSNorm
        spec.submodules.input_layernorm = norm
        spec.submodules.pre_mlp_layernorm = norm
        if config.qk_layernorm:
            spec.submodules.self_attention.submodules.q_layernorm = norm
            spec.submodules.self_attention.submodules.k_layernorm = norm
    spec.submodules.self_attention.submodules.core_attention = PlannedAttention
    layers = get_num_layers_to_build(config, None, pp_rank)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=norm)


def build_policy(architecture: Architecture, options: BuildOptions, runtime: Runtime) -> Policy:
    """This rank's pipeline stage and vocabulary shard, initialised; float32 or options.params_dtype."""
    groups = runtime.groups
    config = transformer_config(architecture, options, runtime)
    specs = layer_specs(config, use_transformer_engine(options.transformer_impl, runtime.device), groups.pp.rank())
    with runtime.megatron():
        policy = Policy(
            config=config,
            transformer_layer_spec=specs,
            vocab_size=padded_vocab_size(options.vocab_size, options.make_vocab_size_divisible_by, groups.tp.size()),
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=groups.is_first_stage,
            post_process=groups.is_last_stage,
            share_embeddings_and_output_weights=architecture.tie_embeddings,
            position_embedding_type="rope",
            pg_collection=groups.collection,
            true_vocab_size=options.vocab_size,
            chunk_tokens=options.head_chunk_tokens,
        )
        policy.rotary_pos_emb = RotaryAt(
            architecture.kv_channels, architecture.rotary_base, architecture.rope_scaling, runtime.device
        )
        mark_partitions(policy)
        initialise(policy, architecture, options.seed)
        return policy.to(runtime.device)


def wrap_for_training(policy: Policy, options: BuildOptions, runtime: Runtime) -> DistributedDataParallel:
    """Megatron-core's mixed-precision and data-parallel wrappers; gradients are plain sums (docs/loss-scaling.md)."""
    config = policy.config
    with runtime.megatron():
        module = Float16Module(config, policy) if config.bf16 else policy
        wrapped = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=options.params_dtype != torch.float64,
                overlap_grad_reduce=options.overlap_grad_reduce,
                use_distributed_optimizer=options.use_distributed_optimizer,
            ),
            module,
            pg_collection=runtime.groups.collection,
        )
        wrapped.broadcast_params()
    config.no_sync_func = wrapped.no_sync
    if options.overlap_grad_reduce and policy.post_process:
        policy.head_weight.needs_gradient_arrival = True  # parallel/logprob.py puts it into main_grad by itself

    def finalize(models, num_tokens, **kwargs):
        # Megatron-core would divide by the token count next; the coefficients hold the denominators already.
        finalize_model_grads(models, None, **kwargs)

    config.finalize_model_grads_func = finalize
    return wrapped


def unwrap(model: torch.nn.Module) -> Policy:
    """The Policy inside Megatron-core's wrappers."""
    while not isinstance(model, Policy):
        model = model.module
    return model
