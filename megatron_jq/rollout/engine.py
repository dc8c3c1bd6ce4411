"""F3: what a rollout engine is asked for, and the protocol that every engine meets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_jq.records import Example, Rollout


@dataclass(frozen=True)
class RolloutRequest:
    """Draw rationales for one prompt: one for each slot of the step's [B, M] table that this replica serves.

    gold_ids: y* with its terminator; where given, each Rollout brings log_w = ln p(y*|x,z). bridge_ids: fed behind the
    close token, before the answer; they are context, not part of the Rollout. given_ids: the rationale to return, for
    the engine that draws none.
    """

    prompt_slot: int
    prompt_ids: tuple[int, ...]
    rationale_slots: tuple[int, ...]
    gold_ids: tuple[int, ...] | None = None
    bridge_ids: tuple[int, ...] = ()
    given_ids: tuple[int, ...] | None = None


def request_for(example: Example, prompt_slot: int, rationale_slots: tuple[int, ...], *, score: bool) -> RolloutRequest:
    """Rationales for one example; score: with ln p(y*|x,z)."""
    gold_ids = example.answer_ids if score else None
    return RolloutRequest(
        prompt_slot, example.prompt_ids, rationale_slots, gold_ids, example.bridge_ids, example.rationale_ids
    )


@dataclass(frozen=True)
class SamplingOptions:
    """How to draw. temperature 0 is greedy. answer_budget 0 draws no answer.

    rationale_budget counts sampled tokens, a sampled close token included; a forced close token comes on top of it.
    """

    rationale_budget: int
    answer_budget: int
    temperature: float
    top_p: float
    close_id: int
    eos_id: int
    seed: int
    step: int


class RolloutEngine(Protocol):
    def generate(self, requests: list[RolloutRequest], options: SamplingOptions) -> list[Rollout]:
        """One Rollout a slot, in the order of requests and slots, alike on every rank of a model-parallel group.

        What a slot draws depends on the weights and (seed, step, prompt slot, rationale slot) alone, not on the layout,
        on the replica, or on what else is in the batch. A slot that failed comes back with valid=False.
        """
        ...


def share_of_replica(
    num_prompts: int, num_rationales: int, replica: int, num_replicas: int
) -> list[tuple[int, tuple[int, ...]]]:
    """(prompt slot, rationale slots) that data-parallel replica `replica` draws: an even cut of the B·M slots in order.

    Prompts stay whole where B divides by the number of replicas; otherwise one prompt may lie on two replicas.
    """
    total = num_prompts * num_rationales
    start, end = total * replica // num_replicas, total * (replica + 1) // num_replicas
    share: dict[int, list[int]] = {}
    for slot in range(start, end):
        share.setdefault(slot // num_rationales, []).append(slot % num_rationales)
    return [(prompt, tuple(slots)) for prompt, slots in share.items()]


def requests_of_replica(
    examples: Sequence[Example], num_rationales: int, replica: int, num_replicas: int, *, first: int = 0, score: bool
) -> list[RolloutRequest]:
    """What replica `replica` draws of num_rationales rationales an example. first: the first example's prompt slot."""
    share = share_of_replica(len(examples), num_rationales, replica, num_replicas)
    return [request_for(examples[b], first + b, slots, score=score) for b, slots in share]
