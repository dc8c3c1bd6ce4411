"""F3: what a rollout engine is asked for, and the protocol that every engine meets.

An engine draws rationales: in this process with the weights that train, or somewhere else. docs/extending.md shows how
to add one. rollout/engines.py lists them; rollout/checked.py calls them and checks what they return.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_jq.config import Config
from megatron_jq.model.policy import Policy
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.records import Example, Rollout

#: Every tensor of the policy by its Hugging Face name, unsharded, one after another. An iterator is read once, to its
#: end: the ranks gather each tensor together.
NamedWeights = Callable[[], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True)
class RolloutRequest:
    """Draw rationales for one prompt: one for each slot of the step's [B, M] table that this replica serves.

    gold_ids: y* with its terminator; where given, each Rollout brings log_w = ln p(y*|x,z). bridge_ids: fed after the
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


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What an engine can do. Its row in rollout/engines.py declares it, so that a run is refused before anything is
    built, and what the engine returns is held to it.
    """

    draws: bool  # samples rationales; False: hands out those of the data
    scores_gold: bool  # brings log_w of every request that has gold_ids
    samples_answers: bool  # samples an answer after each rationale where options.answer_budget is above 0
    gives_log_prob: bool  # knows ln p(z|x) of what it drew; False: log_prob may be None, and nothing checks the draws
    shares_weights: bool  # draws with the very tensors that train: no weights are sent to it
    every_rank: bool  # generate is called on every rank of a model-parallel group; False: on its first rank alone


@dataclass(frozen=True)
class EngineSetup:
    """What an engine is built with, once per run. policies: this pipeline rank's model chunks, in order."""

    config: Config
    runtime: Runtime
    policies: list[Policy]
    vocab_size: int  # the tokenizer's ids lie below; the policy's padding is not counted


class RolloutEngine(Protocol):
    """An engine that draws rationales. rollout/checked.py calls it as its row declares.

    With every_rank, each method is called on all ranks at the same time, and ranks of one model-parallel group return
    the same; it raises on all of them or on none. Without, each method is called on the first rank of each
    model-parallel group, in a thread with a deadline, and may raise whatever it likes: every rank then stops with it.
    """

    #: Of the weights that `generate` draws with, as update_weights was last told; None before the first time.
    version: int | None

    def update_weights(self, version: int, named_weights: NamedWeights) -> None:
        """Take the weights of `version`, the number of training steps that made them, and note it as `version`.

        named_weights(): (name, tensor) of every tensor of the Hugging Face checkpoint, unsharded, in the policy's dtype
        and on its device. Call it once and read it to its end, or do not call it where shares_weights says that you
        need not. A tensor is yours to keep.
        """
        ...

    def generate(self, requests: list[RolloutRequest], options: SamplingOptions) -> list[Rollout]:
        """Return one Rollout a slot, in the order of requests and slots.

        What a slot draws depends on the weights and (seed, step, prompt slot, rationale slot) alone, not on the layout,
        on the replica, or on what else is in the batch. A slot that failed comes back with valid=False.
        """
        ...

    def close(self) -> None:
        """Let go of connections and processes. Called once, after the last step or a failure."""
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
