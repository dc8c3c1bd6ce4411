"""F3: what every engine's rollouts promise, checked against what was asked for."""

import math

from megatron_jq.records import Rollout
from megatron_jq.rollout.engine import Capabilities, RolloutRequest, SamplingOptions


def broken_promise(
    rollouts: list[Rollout],
    requests: list[RolloutRequest],
    options: SamplingOptions,
    vocab_size: int,
    capabilities: Capabilities,
) -> str | None:
    """Return what is wrong with the first rollout that breaks the contract, with its slot; None where all keep it.

    One Rollout a slot, in order; ids in the vocabulary; a drawn rationale ends at its close token, at the end of the
    text or at its budget, and with the close token in any case; an answer likewise; figures as the row declares.
    A Rollout that is not valid is held to its slot alone. No communication; cost: one look at each id.
    """
    slots = [(request, m) for request in requests for m in request.rationale_slots]
    if not isinstance(rollouts, list) or not all(isinstance(rollout, Rollout) for rollout in rollouts):
        return "it must return a list of Rollout"
    if len(rollouts) != len(slots):
        return f"{len(slots)} slots were asked for, {len(rollouts)} rollouts came back"
    for (request, m), rollout in zip(slots, rollouts, strict=True):
        asked, slot = (request.prompt_slot, m), (rollout.prompt_slot, rollout.rationale_slot)
        if slot != asked:
            return f"prompt slot {asked[0]}, rationale slot {m}: slot {slot} came back in its place"
        problem = _problem(rollout, request, options, vocab_size, capabilities) if rollout.valid else None
        if problem is not None:
            return f"prompt slot {asked[0]}, rationale slot {m}: {problem}"
    return None


def _problem(
    r: Rollout, request: RolloutRequest, options: SamplingOptions, vocab_size: int, capabilities: Capabilities
) -> str | None:
    for what, ids in (("rationale_ids", r.rationale_ids), ("answer_ids", r.answer_ids)):
        if not isinstance(ids, tuple) or not all(isinstance(token, int) for token in ids):
            return f"{what} must be a tuple of int"
    if not capabilities.draws:
        return None if r.rationale_ids == request.given_ids else "it is not the rationale that was given"
    for token in (*r.rationale_ids[: r.num_sampled], *r.answer_ids):
        if not 0 <= token < vocab_size:
            return f"token {token} was sampled, and the vocabulary has {vocab_size} tokens"
    return _rationale_problem(r, options) or _answer_problem(r, options) or _figure_problem(r, request, capabilities)


def _rationale_problem(r: Rollout, options: SamplingOptions) -> str | None:
    sampled, budget = r.rationale_ids[: r.num_sampled], options.rationale_budget
    if not 1 <= r.num_sampled <= budget:
        return f"num_sampled is {r.num_sampled}; a rationale has between 1 and {budget} sampled tokens"
    if r.rationale_ids[-1:] != (options.close_id,):
        return f"the rationale does not end with the close token, {options.close_id}"
    if len(r.rationale_ids) != r.num_sampled + (sampled[-1] != options.close_id):
        return f"{len(r.rationale_ids)} ids with num_sampled {r.num_sampled}; a close token alone is put there by force"
    ends = (options.close_id, options.eos_id)
    if any(token in ends for token in sampled[:-1]):
        return "the rationale goes on after its close token or the end of the text"
    if r.num_sampled < budget and sampled[-1] not in ends:
        return f"the rationale was closed by force after {r.num_sampled} tokens of {budget}"
    return None


def _answer_problem(r: Rollout, options: SamplingOptions) -> str | None:
    answer, budget = r.answer_ids, options.answer_budget
    if len(answer) > budget or (budget and not answer):
        return f"{len(answer)} answer tokens with an answer budget of {budget}"
    if options.eos_id in answer[:-1]:
        return "the answer goes on after the end of the text"
    if len(answer) < budget and answer[-1] != options.eos_id:
        return f"the answer ends after {len(answer)} tokens of {budget}, and not with the end of the text"
    return None


def _figure_problem(r: Rollout, request: RolloutRequest, capabilities: Capabilities) -> str | None:
    if r.log_prob is None and capabilities.gives_log_prob:
        return "log_prob is None, and the engine's row declares gives_log_prob"
    if r.log_w is None and request.gold_ids is not None:
        return "log_w is None, and y* was given to be scored"
    if capabilities.shares_weights:
        return None  # figures that are not finite are the weights' fault: the step names it and keeps the batch
    for name, figure in (("log_prob", r.log_prob), ("log_w", r.log_w)):
        if figure is not None and not (math.isfinite(figure) and figure <= 1e-3):
            return f"{name} is {figure}; the logarithm of a probability is finite and at most 0"
    return None
