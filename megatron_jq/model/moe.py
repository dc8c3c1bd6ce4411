"""F3: layers with experts: Megatron-core's, with a load-balancing loss that adds up like the J_Q loss does.

Megatron-core's own balances each micro-batch of each rank, and scales by a token count that we do not divide by. Ours
balances each sequence, a mean over the step's sequences: the same whatever the micro-batches, the replicas or the
coefficients (docs/loss-scaling.md).

Axes: T tokens of this rank, n sequences of the micro-batch, E experts.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_jq.parallel.megatron import versions

versions.bind_optional_names()


def balance_losses(
    probability_TE: Tensor, routed_TE: Tensor, member_nT: Tensor, topk: int, group: dist.ProcessGroup
) -> Tensor:
    """Return this rank's share of every sequence's E · Σ_e f_e · P_e, [n]; shares add up to it over the group.

    f_e: fraction of the sequence's routings that went to expert e (a constant for the gradient); P_e: the mean of its
    router probabilities. 1 where both are even. Switch Transformer (arXiv:2101.03961, eq. 4), per sequence.
    The group's ranks hold other tokens of the same sequences. Cost: one all-reduce of n·E numbers.
    """
    member_nT = member_nT.to(probability_TE.dtype)
    routed_nE = member_nT @ routed_TE.to(probability_TE.dtype)
    if group.size() > 1 and routed_nE.numel():
        dist.all_reduce(routed_nE, group=group)
    length_n1 = routed_nE.sum(dim=1, keepdim=True) / topk
    fraction_nE = routed_nE / (topk * length_n1)
    return probability_TE.shape[1] * (fraction_nE * (member_nT @ probability_TE) / length_n1).sum(dim=1)


def choose_experts(probability_TE: Tensor, topk: int, *, normalise: bool) -> tuple[Tensor, Tensor]:
    """Return (weight of each expert's output, zero where not chosen; whether chosen), [T, E], by router probability."""
    chosen_Tk, expert_Tk = probability_TE.topk(topk, dim=1)
    if normalise:
        chosen_Tk = chosen_Tk / chosen_Tk.sum(dim=1, keepdim=True)
    weight_TE = torch.zeros_like(probability_TE).scatter(1, expert_Tk, chosen_Tk)
    return weight_TE, torch.zeros_like(probability_TE, dtype=torch.bool).scatter(1, expert_Tk, True)


class SequenceBalancedRouter(TopKRouter):
    """Softmax router whose load-balancing loss is coefficient / sequences_of_step · Σ `balance_losses` over
    sequences, times loss_scale.

    It computes in the logits' dtype, float32 at least, where TopKRouter rounds float64 to float32. Its place for a
    padding mask takes a column for each sequence instead, True at the sequence's tokens: bool [T, n].
    """

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None, **options: Any):
        super().__init__(config, pg_collection, **options)  # options: what later versions of Megatron-core add
        self.sequences_of_step = 1  # over all replicas
        self.loss_scale = 1.0  # the factor on the whole loss
        self.balance: float | Tensor = 0.0  # sum of balance_losses over this rank's passes since begin_balancing

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits_TE = logits.view(-1, logits.shape[-1])
        probability_TE = logits_TE.softmax(dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weight_TE, routed_TE = choose_experts(
            probability_TE, self.topk, normalise=not self.config.moe_router_pre_softmax
        )
        if padding_mask is not None and torch.is_grad_enabled():
            total = balance_losses(probability_TE, routed_TE, padding_mask.t(), self.topk, self.tp_cp_group).sum()
            self.balance += total.detach()
            loss = total * (self.config.moe_aux_loss_coeff / self.sequences_of_step * self.loss_scale)
            weight_TE = MoEAuxLossAutoScaler.apply(weight_TE, loss)
        return weight_TE, routed_TE


def balances_experts(config: TransformerConfig) -> bool:
    """Whether training adds a load-balancing loss."""
    return config.num_moe_experts is not None and config.moe_aux_loss_coeff > 0


class HasModules(Protocol):
    """A module, or a TrainingModel of several."""

    def modules(self) -> Iterator[torch.nn.Module]: ...


def _routers(model: HasModules) -> list[SequenceBalancedRouter]:
    return [module for module in model.modules() if isinstance(module, SequenceBalancedRouter)]


def begin_balancing(model: HasModules, sequences_of_step: int, loss_scale: float = 1.0) -> None:
    """Tell this stage's routers the denominator of the training pass that follows, sequences over all replicas, and the
    factor on the loss."""
    for router in _routers(model):
        router.sequences_of_step, router.balance = max(sequences_of_step, 1), 0.0
        router.loss_scale = loss_scale


def mean_balance(model: HasModules, config: TransformerConfig, world: dist.ProcessGroup) -> float:
    """Return the mean over sequences and layers of E · Σ f_e · P_e in the pass since begin_balancing, on every rank."""
    routers = _routers(model)
    total = torch.stack([torch.as_tensor(router.balance, device=router.weight.device) for router in routers]).sum()
    dist.all_reduce(total, group=world)  # every rank holds other tokens or other layers
    return total.item() / (routers[0].sequences_of_step * config.num_layers)
