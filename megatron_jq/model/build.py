"""F3: build the policy of one pipeline stage for a layout, and wrap it for training.

Decides once: Transformer Engine's layers where they can be imported and run (CUDA), Megatron-core's local layers
otherwise; fused kernels of NVIDIA Apex where they are installed. Core attention and head are ours in both cases.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_jq.architecture import Architecture, padded_vocab_size
from megatron_jq.config import Config
from megatron_jq.errors import UserError
from megatron_jq.model.initialise import initialise, mark_partitions
from megatron_jq.model.layers import layer_spec
from megatron_jq.model.policy import GPTPolicy, Policy
from megatron_jq.model.rotary import RotaryAt
from megatron_jq.parallel.megatron import versions
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.parallel.weighted_logprob import mark_gradient_arrival


@dataclass(frozen=True)
class BuildOptions:
    """What a run chooses about its model beside the architecture."""

    vocab_size: int  # true size: the tokenizer's or the checkpoint's
    make_vocab_size_divisible_by: int = 128
    params_dtype: torch.dtype = torch.float32
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    virtual_stages: int = 1  # model chunks per pipeline rank, interleaved
    pipeline_layout: str | None = None  # Megatron-core's notation, "Et|tt|tL"; None: even
    recompute_granularity: str | None = None  # full | selective; None keeps all activations
    recompute_method: str | None = None  # uniform | block, under full
    recompute_num_layers: int | None = None
    transformer_impl: str = "auto"  # auto | local | transformer_engine
    model_class: str = "gpt"  # gpt | hybrid
    head_chunk_tokens: int | None = None  # None: by memory
    seed: int = 1234


def build_options(config: Config, vocab_size: int) -> BuildOptions:
    """What a run's settings choose."""
    m, p = config.model, config.parallel
    return BuildOptions(
        vocab_size=vocab_size,
        make_vocab_size_divisible_by=m.make_vocab_size_divisible_by,
        params_dtype=torch.bfloat16 if m.bf16 else torch.float32,
        sequence_parallel=p.sequence_parallel,
        virtual_stages=p.num_virtual_stages_per_pipeline_rank,
        pipeline_layout=p.pipeline_model_parallel_layout,
        recompute_granularity=p.recompute_granularity,
        recompute_method=p.recompute_method,
        recompute_num_layers=p.recompute_num_layers,
        use_distributed_optimizer=p.use_distributed_optimizer,
        overlap_grad_reduce=p.overlap_grad_reduce,
        transformer_impl=p.transformer_impl,
        model_class=p.model_class,
        seed=config.training.seed,
    )


def use_transformer_engine(choice: str, device: torch.device) -> bool:
    """Whether layers come from Transformer Engine. Raises UserError when it is demanded and cannot be."""
    present = HAVE_TE  # it loaded: a package that is there need not (made for another CUDA, or without its torch part)
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
    recomputed = options.recompute_num_layers
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
        virtual_pipeline_model_parallel_size=options.virtual_stages if options.virtual_stages > 1 else None,
        pipeline_model_parallel_layout=options.pipeline_layout,
        # Batched point-to-point calls give wrong gradients on gloo when stages are interleaved; overlapped ones do not.
        overlap_p2p_comm=options.virtual_stages > 1,
        batch_p2p_comm=options.virtual_stages == 1,
        recompute_granularity=options.recompute_granularity,
        recompute_method=options.recompute_method,
        # It alone counts the decoder's modules; num_layers and the layout count layers of the architecture.
        recompute_num_layers=None if recomputed is None else recomputed * policy_class(options.model_class).MODULES,
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
        **(_expert_settings(architecture, options, runtime) if architecture.num_experts is not None else {}),
    )


def _expert_settings(architecture: Architecture, options: BuildOptions, runtime: Runtime) -> dict:
    """TransformerConfig's fields for layers with experts."""
    collection = runtime.groups.collection
    return dict(  # noqa: C408
        num_moe_experts=architecture.num_experts,
        moe_ffn_hidden_size=architecture.moe_ffn_hidden_size,
        moe_router_topk=architecture.moe_router_topk,
        moe_router_pre_softmax=not architecture.moe_norm_topk_prob,
        moe_router_dtype="fp64" if options.params_dtype == torch.float64 else "fp32",
        moe_aux_loss_coeff=architecture.moe_aux_loss_coeff,
        moe_router_load_balancing_type="seq_aux_loss",  # computed by our router: model/moe.py
        moe_grouped_gemm=use_transformer_engine(options.transformer_impl, runtime.device),
        expert_model_parallel_size=collection.ep.size(),
        expert_tensor_parallel_size=collection.expt_tp.size(),
    )


def policy_class(name: str) -> type[Policy]:
    """Return what --model-class names. UserError where this Megatron-core does not have it."""
    if name == "gpt":
        return GPTPolicy
    versions.check_hybrid_model()
    from megatron_jq.model.hybrid import HybridPolicy

    return HybridPolicy


def build_policies(architecture: Architecture, options: BuildOptions, runtime: Runtime) -> list[Policy]:
    """This pipeline rank's model chunks in order (one unless stages are interleaved), initialised, on the device.

    Float32, or options.params_dtype. Every chunk shares one configuration object, as Megatron-core's schedules expect.
    """
    groups, stages = runtime.groups, options.virtual_stages
    config = transformer_config(architecture, options, runtime)
    transformer_engine = use_transformer_engine(options.transformer_impl, runtime.device)
    versions.collect_deprecations()
    layer, norm = layer_spec(config, transformer_engine)
    policies = []
    for stage in range(stages):
        virtual_stage = stage if stages > 1 else None
        with runtime.megatron():
            policy = policy_class(options.model_class)(
                config=config,
                layer=layer,
                norm=norm,
                vocab_size=padded_vocab_size(
                    options.vocab_size, options.make_vocab_size_divisible_by, groups.tp.size()
                ),
                max_sequence_length=architecture.max_position_embeddings,
                pre_process=groups.is_first_stage and stage == 0,
                post_process=groups.is_last_stage and stage == stages - 1,
                share_embeddings_and_output_weights=architecture.tie_embeddings,
                position_embedding_type="rope",
                pg_collection=groups.collection,
                vp_stage=virtual_stage,
                true_vocab_size=options.vocab_size,
                chunk_tokens=options.head_chunk_tokens,
            )
            policy.rotary_pos_emb = RotaryAt(
                architecture.kv_channels, architecture.rotary_base, architecture.rope_scaling, runtime.device
            )
            mark_partitions(policy)
            initialise(policy, architecture, options.seed)
            policies.append(policy.to(runtime.device))
    return policies


class TrainingModel:
    """A pipeline rank's model chunks inside Megatron-core's mixed-precision and data-parallel wrappers.

    A frozen model has no data-parallel wrapper and no gradients.
    """

    def __init__(self, chunks: list[MegatronModule]):
        self.chunks = chunks

    @property
    def config(self) -> TransformerConfig:
        return self.chunks[0].config

    @property
    def policies(self) -> list[Policy]:
        return [unwrap(chunk) for chunk in self.chunks]

    def zero_grad_buffer(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()

    def modules(self) -> Iterator[torch.nn.Module]:
        for chunk in self.chunks:
            yield from chunk.modules()

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield (name within its chunk, parameter) of all chunks; `main_grad` holds the gradient."""
        for chunk in self.chunks:
            yield from chunk.named_parameters()


def wrap_for_training(policies: list[Policy], options: BuildOptions, runtime: Runtime) -> TrainingModel:
    """Wrap the chunks so that gradients are plain sums over micro-batches and replicas (docs/loss-scaling.md)."""
    config = policies[0].config
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=options.params_dtype != torch.float64,
        overlap_grad_reduce=options.overlap_grad_reduce,
        use_distributed_optimizer=options.use_distributed_optimizer,
    )
    chunks = []
    with runtime.megatron():
        for number, policy in enumerate(policies):
            module = Float16Module(config, policy) if config.bf16 else policy
            chunk = DistributedDataParallel(
                config, settings, module, disable_bucketing=number > 0, pg_collection=runtime.groups.collection
            )
            chunk.broadcast_params()
            chunks.append(chunk)
            if options.overlap_grad_reduce and policy.post_process:
                mark_gradient_arrival(policy.head_weight)
    no_sync = [chunk.no_sync for chunk in chunks]
    start_sync = [chunk.start_grad_sync for chunk in chunks]
    config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    if options.overlap_grad_reduce:
        config.grad_sync_func = start_sync if len(chunks) > 1 else start_sync[0]

    def finalize(models: list[MegatronModule], num_tokens: torch.Tensor | None, **kwargs: Any) -> None:
        # Megatron-core would divide by the token count next; the coefficients hold the denominators already.
        finalize_model_grads(models, None, **kwargs)

    config.finalize_model_grads_func = finalize
    return TrainingModel(chunks)


def unwrap(model: MegatronModule) -> Policy:
    """Return the Policy inside Megatron-core's wrappers."""
    while not isinstance(model, Policy):
        model = model.module
    return model
