"""F4: Megatron-core's optimizer and learning-rate schedule from our configuration, and an update with them."""

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_jq.config import Config
from megatron_jq.model.build import TrainingModel
from megatron_jq.parallel.megatron.versions import gradients_for_norm
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
    """Learning rate by optimizer step, stepped before each update: step n, counted from 0, trains at its entry n + 1.

    So the first step of a warm-up of W trains at lr/W, not at 0, and step W-1 at lr. A decay over D steps has min_lr
    from step D on, which with the default D = train_iters comes after the run's last step.
    """
    o = config.optimizer
    decay_iters = o.lr_decay_iters or config.training.train_iters
    if o.lr_decay_style == "constant":
        decay_iters = max(decay_iters, o.lr_warmup_iters)  # Megatron-core wants a decay after any warm-up
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=o.lr,
        min_lr=o.min_lr,
        lr_warmup_steps=o.lr_warmup_iters,
        lr_decay_steps=decay_iters + 1,
        lr_decay_style=o.lr_decay_style,
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """The rate of the next update."""
    return float(optimizer.param_groups[0]["lr"])


#: Norms between which float32 holds the squares that Megatron-core's norm adds up; beyond them float64 does it again.
_ORDINARY_NORMS = (2.0**-50, 2.0**50)


def parts_of(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Return the optimizers that Megatron-core chains (for experts another one), without those that hold nothing."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Return the norm of the whole gradient after prepare_grads, alike on all ranks: Megatron-core's in float32, and
    where that cannot hold the squares of its elements (below 1e-15, above 1e15) one in float64.
    """
    norm = float(optimizer.get_grad_norm())
    low, high = _ORDINARY_NORMS
    if low <= norm <= high:
        return norm
    return float(_exact_norm(optimizer))


def device_of_collectives() -> torch.device:
    """Return where a tensor must lie that all ranks reduce."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def rounded(norm: float) -> float:
    """Return a norm as metrics.jsonl shows it: in float32, where that holds it."""
    low, high = _ORDINARY_NORMS
    return torch.tensor(norm, dtype=torch.float32).item() if low <= norm <= high else norm


def _exact_norm(optimizer: MegatronOptimizer) -> float:
    """As Megatron-core's ChainedOptimizer counts: every part's gradients once, summed over that part's group."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    shared = len(parts) == 1 or optimizer.grads_states_parallel_group_is_shared()
    totals = []
    for group_of_parts in [parts] if shared else [[part] for part in parts]:
        gradients = [g for part in group_of_parts for g in gradients_for_norm(part)]
        total = torch.zeros([], dtype=torch.float64, device=device_of_collectives())
        for gradient in gradients:
            total += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        dist.all_reduce(total, group=group_of_parts[0].get_grad_stats_parallel_group())
        totals.append(total.item())
    return math.sqrt(sum(totals))


@torch.no_grad()
def clip_and_step(optimizer: MegatronOptimizer, config: Config, *, norm: float, loss_scale: float = 1.0) -> None:
    """Update the weights from prepared gradients of loss_scale times the loss; norm: of the loss's own gradient.

    Gradients are multiplied by min(1, --clip-grad / (norm + 1e-6)), as Megatron-core does, with the true norm. Adam
    takes the scaled gradients: --adam-eps is compared with them. SGD's are divided by the scale again. Weight decay is
    decoupled for both: weights shrink by lr · decay, whatever the gradient.
    """
    o = config.optimizer
    for part in parts_of(optimizer):
        parameters = part.get_parameters()
        if not parameters:
            continue
        if o.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, o.clip_grad, norm)
        if o.optimizer == "sgd" and loss_scale != 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(1.0 / loss_scale)
    with decoupled_decay(optimizer) if o.optimizer == "sgd" else contextlib.nullcontext():
        optimizer.step_with_ready_grads()


@contextlib.contextmanager
def decoupled_decay(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Shrink the weights by 1 - lr · weight_decay now, and let the step that is made inside know of no decay.

    torch's SGD (and the fused ones) would add weight_decay · weight to the gradient, and so to the momentum.
    """
    groups = [(group, group["weight_decay"]) for group in optimizer.param_groups]
    for group, decay in groups:
        if decay:
            for parameter in group["params"]:
                parameter.mul_(1.0 - group["lr"] * decay)
        group["weight_decay"] = 0.0
    try:
        yield
    finally:
        for group, decay in groups:
            group["weight_decay"] = decay


def first_nonfinite_parameter(model: TrainingModel) -> str | None:
    """Name of this rank's first parameter whose reduced gradient is not finite."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if not torch.isfinite(parameter.main_grad).all():  # pyright: ignore[reportAttributeAccessIssue]
            return name
    return None
