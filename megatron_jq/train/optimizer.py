"""F4: Megatron-core's optimizer and learning-rate schedule from our configuration."""

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_jq.config import Config
from megatron_jq.model.build import TrainingModel
from megatron_jq.parallel.runtime import Runtime


def build_optimizer(model: TrainingModel, config: Config, runtime: Runtime) -> MegatronOptimizer:
    """Adam or SGD over this rank's parameters; state sharded over replicas with --use-distributed-optimizer.

    Uses Transformer Engine's or Apex's fused Adam where Megatron-core finds them, torch's otherwise.
    """
    o = config.optimizer
    with runtime.megatron():
        return get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer=o.optimizer,
                lr=o.lr,
                min_lr=o.min_lr,
                weight_decay=o.weight_decay,
                adam_beta1=o.adam_beta1,
                adam_beta2=o.adam_beta2,
                adam_eps=o.adam_eps,
                sgd_momentum=o.sgd_momentum,
                clip_grad=o.clip_grad,
                bf16=config.model.bf16,
                params_dtype=torch.bfloat16 if config.model.bf16 else torch.float32,
                use_distributed_optimizer=config.parallel.use_distributed_optimizer,
            ),
            model.chunks,
            use_gloo_process_groups=False,
            pg_collection=runtime.groups.collection,
        )


def build_schedule(optimizer: MegatronOptimizer, config: Config) -> OptimizerParamScheduler:
    """Learning rate by optimizer step. Stepped before each update, so the first warm-up step is not wasted at 0."""
    o = config.optimizer
    decay_iters = o.lr_decay_iters or config.training.train_iters
    if o.lr_decay_style == "constant":
        decay_iters = max(decay_iters, o.lr_warmup_iters + 1)  # Megatron-core wants a decay behind any warm-up
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=o.lr,
        min_lr=o.min_lr,
        lr_warmup_steps=o.lr_warmup_iters,
        lr_decay_steps=decay_iters,
        lr_decay_style=o.lr_decay_style,
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """The rate of the next update."""
    return float(optimizer.param_groups[0]["lr"])


def first_nonfinite_parameter(model: TrainingModel) -> str | None:
    """Name of this rank's first parameter whose reduced gradient is not finite."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter.main_grad).all():
            return name
    return None
