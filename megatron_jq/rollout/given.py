"""F3: the engine that draws nothing: it hands out the rationales that the data brings, for imitation."""

from megatron_jq.records import Rollout
from megatron_jq.rollout.engine import EngineSetup, NamedWeights, RolloutRequest, SamplingOptions


class GivenRationales:
    """RolloutEngine over given rationales. No pass through the model, no log-probabilities.

    A Rollout is the request's given_ids, all of which carry weight: the close token that ends a rationale, too, is for
    the policy to learn. An empty one (pretraining) has no close token.
    """

    def __init__(self, setup: EngineSetup | None = None):
        self.version: int | None = None

    def update_weights(self, version: int, named_weights: NamedWeights) -> None:
        """Note the version: no rationale depends on the weights."""
        self.version = version

    def generate(self, requests: list[RolloutRequest], options: SamplingOptions) -> list[Rollout]:
        """Every slot of a prompt gets the one rationale that there is. Options do not matter."""
        rollouts = []
        for request in requests:
            assert request.given_ids is not None, "a rationale is given for every training example"
            ids = request.given_ids
            rollouts.extend(Rollout(request.prompt_slot, m, ids, len(ids)) for m in request.rationale_slots)
        return rollouts

    def close(self) -> None:
        """There is nothing to close."""
