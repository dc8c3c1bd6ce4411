"""F4: the two passes of a step over Megatron-core's schedules: score (forward only) and train (forward and backward).

Gradients are plain sums over micro-batches and replicas of -coefficient · ln p; the coefficients hold every denominator
(docs/loss-scaling.md). So a sequence contributes the same wherever it lies.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_jq.model.build import TrainingModel
from megatron_jq.model.head import HeadOutput
from megatron_jq.model.moe import balances_experts, begin_balancing, mean_balance
from megatron_jq.model.rows import Rows, ScoreHead, pack_sequences, padded, prompt_groups
from megatron_jq.objective.table import StepTable
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.records import Coefficients, Rollout, TrainingSequence
from megatron_jq.train.batching import Unit, balance, in_step_with_expert_peers, micro_batches


@dataclass(frozen=True)
class BatchOptions:
    """How sequences are cut into micro-batches (batching.py), and how they were sampled.

    max_tokens, where given, bounds a micro-batch's tokens instead of micro_batch_size its sequences, and has replicas
    share the step's sequences evenly by cost.
    """

    micro_batch_size: int
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    tempered_answers: bool = False  # the answers were sampled along with the rationales (GRPO, RLOO)
    sequence_multiple: int = 1
    share_prompts: bool = True  # compute a prompt once for all its rationales in a micro-batch
    mask_loss_after_id: int | None = None  # a token that follows this one is not scored (rows.py)
    document_end_id: int | None = None  # nor does it attend to this one or to any before; not with share_prompts
    loss_scale: float = 1.0  # of a training pass: its gradients are those of this times the loss


@dataclass(frozen=True)
class PassResult:
    """The step's table as one pass found it, alike on every rank, and what the pass counted.

    In the table valid_BM says where a sequence came in, and the rest is NaN elsewhere: a NaN where valid_BM holds is an
    error of the model, not a rationale that failed. log_w_BM is of the answers that the sequences hold (a training pass
    of an estimator that samples answers: of those). log_z_BM is 0 where a pass did not score rationales.
    """

    table: StepTable
    tokens_computed: int = 0  # through the layers in this pass, padding included, over all replicas
    tokens_saved: int = 0  # that would have come on top, had no prompt been shared
    expert_balance: float | None = None  # mean over sequences and layers of E·Σ f·P, where training balances experts
    log_w_mismatch_max: float | None = None  # nats to another pass over the same sequences, where there was one


def score(
    model: TrainingModel,
    sequences: list[TrainingSequence],
    shape: tuple[int, int],
    runtime: Runtime,
    options: BatchOptions,
    *,
    with_rationale: bool = False,
) -> PassResult:
    """ln p(y|x,z) of every sequence (and ln p(z|x) with_rationale, else 0), completed over all ranks.

    sequences: this replica's. shape: (B, M). No power is taken here: partial sums over the vocabulary meet in the head,
    the last stage's table goes to all stages, and replicas' parts are summed, before q enters.
    """
    if options.max_tokens is not None:
        sequences = balance(sequences, model.config.hidden_size, runtime, share_prompts=options.share_prompts)
    batches = _cut(model, sequences, runtime, options)
    arguments = schedule_arguments(model, batches, runtime, options, with_rationale=with_rationale)
    with torch.no_grad(), runtime.megatron():
        outputs = get_forward_backward_func()(**arguments)
    return complete_table(model, outputs, batches, shape, runtime, options)


def table_of_rollouts(rollouts: list[Rollout], shape: tuple[int, int], runtime: Runtime) -> PassResult:
    """The engine's own ln w as the step's table: one all-reduce over replicas, no forward pass."""
    message, entry_BM3 = _empty_message(shape, runtime)
    host_BM3 = torch.zeros(entry_BM3.shape, dtype=torch.float64)  # one copy to the device for all, not one each
    for r in rollouts:
        if r.valid:
            assert r.log_w is not None, "the engine was not given y*"
            host_BM3[r.prompt_slot, r.rationale_slot, 1:] = torch.tensor([r.log_w, 1.0], dtype=torch.float64)
    entry_BM3.copy_(host_BM3)
    return _over_replicas(message, entry_BM3, runtime)


def train(
    model: TrainingModel,
    sequences: list[TrainingSequence],
    coefficients: Coefficients,
    runtime: Runtime,
    options: BatchOptions,
) -> PassResult:
    """Accumulate the gradient of the surrogate loss (times options.loss_scale, like that of the experts' balance) into
    the model's gradient buffers, reduced over replicas.

    Returns the log-likelihoods of the trained pass. A replica without sequences takes part in the reductions with
    zeros.
    """
    batches = training_batches(model, sequences, coefficients, runtime, options)
    begin_expert_balance(model, batches, runtime, options)
    arguments = schedule_arguments(model, batches, runtime, options, coefficients=coefficients)
    with runtime.megatron():
        outputs = get_forward_backward_func()(**arguments)
    prompts, rationales = coefficients.answer_BM.shape
    shape = prompts, rationales
    return with_expert_balance(model, complete_table(model, outputs, batches, shape, runtime, options), runtime)


def training_batches(
    model: TrainingModel,
    sequences: list[TrainingSequence],
    coefficients: Coefficients,
    runtime: Runtime,
    options: BatchOptions,
) -> list[list[TrainingSequence]]:
    """This replica's micro-batches of a training pass; over all replicas the same sequences as came in.

    Sequences whose coefficients are all zero are left out: they have no gradient, but where experts are balanced, which
    goes over all.
    """
    if not balances_experts(model.config):
        weight_BM = coefficients.weighed_BM
        sequences = [s for s in sequences if weight_BM[s.prompt_slot, s.rationale_slot]]
    if options.max_tokens is not None:
        sequences = balance(sequences, model.config.hidden_size, runtime, share_prompts=options.share_prompts)
    return _cut(model, sequences, runtime, options)


def begin_expert_balance(
    model: TrainingModel, batches: list[list[TrainingSequence]], runtime: Runtime, options: BatchOptions
) -> None:
    """Before a training pass over these micro-batches, where experts are balanced."""
    if balances_experts(model.config):
        count = torch.tensor(sum(map(len, batches)), device=runtime.device)
        begin_balancing(model, int(runtime.groups.sum_over_replicas(count)), options.loss_scale)


def with_expert_balance(model: TrainingModel, result: PassResult, runtime: Runtime) -> PassResult:
    """The pass's result with how evenly experts were used, where they are balanced."""
    if not balances_experts(model.config):
        return result
    return replace(result, expert_balance=mean_balance(model, model.config, runtime.groups.world))


def _pairs(coefficients: Coefficients, sequences: list[TrainingSequence]) -> list[tuple[float, float]]:
    """(rationale, answer) coefficient of each sequence."""
    rationale_BM, answer_BM = coefficients.rationale_BM.tolist(), coefficients.answer_BM.tolist()
    return [
        (rationale_BM[s.prompt_slot][s.rationale_slot], answer_BM[s.prompt_slot][s.rationale_slot]) for s in sequences
    ]


def _cut(model, sequences, runtime, options) -> list[list[TrainingSequence]]:
    """A replica's sequences as the micro-batches of one pass."""
    batches = micro_batches(
        sequences,
        micro_batch_size=options.micro_batch_size,
        max_tokens=options.max_tokens,
        sequence_multiple=options.sequence_multiple,
        share_prompts=options.share_prompts,
    )
    batches = in_step_with_expert_peers(batches, runtime)
    if len(model.chunks) > 1:  # the interleaved schedule works in rounds of as many micro-batches as there are stages
        batches = [*batches, *([[]] * (-len(batches) % runtime.groups.pp.size()))]
    return batches


def schedule_arguments(
    model: TrainingModel,
    batches: list[list[TrainingSequence]],
    runtime: Runtime,
    options: BatchOptions,
    *,
    with_rationale: bool = True,
    coefficients: Coefficients | None = None,
    head_of: Callable[[int, ScoreHead], ScoreHead] | None = None,
) -> dict[str, Any]:
    """Arguments for Megatron-core's schedule, which takes all micro-batches through the model, inside
    runtime.megatron(). It returns the head's output for each, a HeadOutput, on the last stage, else [].

    coefficients None: forward alone. Their loss is multiplied by options.loss_scale. head_of(number, head): what to ask
    the head instead, for a micro-batch by its number.
    """
    of_loss = None if coefficients is None else coefficients.of_loss(options.loss_scale)

    def rows_of(number: int) -> Rows:
        batch = batches[number]
        rows = pack_sequences(
            batch,
            device=runtime.device,
            with_rationale=with_rationale,
            coefficients=None if of_loss is None else _pairs(of_loss, batch),
            temperature=options.temperature,
            top_p=options.top_p,
            tempered_answers=options.tempered_answers,
            row_multiple=_row_multiple(model.config),
            sequence_multiple=options.sequence_multiple,
            share_prompts=options.share_prompts,
            mask_loss_after_id=options.mask_loss_after_id,
            document_end_id=options.document_end_id,
        )
        if head_of is None or not runtime.groups.is_last_stage:  # the other stages' heads have no tokens to ask about
            return rows
        assert isinstance(rows.head, ScoreHead)
        return replace(rows, head=head_of(number, rows.head))

    def forward_step(iterator: Iterator[int], stage_model: torch.nn.Module):
        rows = rows_of(next(iterator))
        with runtime.native():
            output = stage_model(rows)

        def loss_function(output: HeadOutput) -> tuple[torch.Tensor, torch.Tensor, HeadOutput]:
            """(loss, Megatron-core's own divisor, which is not used, what to keep)"""
            loss = output.log_w_n.sum() if output.loss is None else output.loss  # forward alone: not read
            return loss, torch.zeros([], dtype=torch.int, device=runtime.device), replace(output, loss=None)

        return output, loss_function

    return {
        "forward_step_func": forward_step,
        "data_iterator": [iter(range(len(batches))) for _ in model.chunks],
        "model": model.chunks,
        "num_microbatches": len(batches),
        "seq_length": 1,  # not used: lengths vary and stages exchange them
        "micro_batch_size": 1,
        "forward_only": coefficients is None,
    }


def _row_multiple(config) -> int:
    """To which a row is padded: sequence parallelism splits it evenly."""
    return config.tensor_model_parallel_size if config.sequence_parallel else 1


def row_tokens(batch: list[TrainingSequence], options: BatchOptions, row_multiple: int, *, share_prompts: bool) -> int:
    """Tokens of a micro-batch's row, as pack_sequences lays it out."""
    groups = prompt_groups(batch, share_prompts=share_prompts, multiple=options.sequence_multiple)
    total = sum(Unit(tuple(batch[n] for n in group), options.sequence_multiple).tokens for group in groups)
    return padded(total, row_multiple) or row_multiple


def complete_table(
    model: TrainingModel,
    outputs: list[HeadOutput],
    batches: list[list[TrainingSequence]],
    shape: tuple[int, int],
    runtime: Runtime,
    options: BatchOptions,
) -> PassResult:
    """The whole [B, M] table on every rank: one broadcast over stages, one all-reduce over replicas."""
    row_multiple = _row_multiple(model.config)
    tokens = [row_tokens(batch, options, row_multiple, share_prompts=options.share_prompts) for batch in batches]
    unshared = [row_tokens(batch, options, row_multiple, share_prompts=False) for batch in batches]
    sequences, counts = [s for batch in batches for s in batch], (sum(tokens), sum(unshared) - sum(tokens))
    message, entry_BM3 = _empty_message(shape, runtime)
    if sequences and runtime.groups.is_last_stage:
        prompt = torch.tensor([s.prompt_slot for s in sequences], device=runtime.device)
        rationale = torch.tensor([s.rationale_slot for s in sequences], device=runtime.device)
        entry_BM3[prompt, rationale, 0] = torch.cat([output.log_z_n for output in outputs])
        entry_BM3[prompt, rationale, 1] = torch.cat([output.log_w_n for output in outputs])
        entry_BM3[prompt, rationale, 2] = 1.0
    message[-2:] = torch.tensor(counts, dtype=torch.float64)
    runtime.groups.from_last_stage(message)
    return _over_replicas(message, entry_BM3, runtime)


def _empty_message(shape: tuple[int, int], runtime: Runtime) -> tuple[torch.Tensor, torch.Tensor]:
    """What ranks exchange at once, and its view as entries [B, M, (ln p(z|x), ln p(y|x,z), 1 where one came in)].

    After the entries: tokens computed, tokens saved.
    """
    message = torch.zeros(shape[0] * shape[1] * 3 + 2, dtype=torch.float64, device=runtime.device)
    return message, message[:-2].view(*shape, 3)


def _over_replicas(message: torch.Tensor, entry_BM3: torch.Tensor, runtime: Runtime) -> PassResult:
    runtime.groups.sum_over_replicas(message)
    assert not (entry_BM3[..., 2] > 1).any(), "a slot was scored by two replicas"
    computed, saved = (int(count) for count in message[-2:].tolist())
    entry_BM3 = entry_BM3.cpu()
    valid_BM = entry_BM3[..., 2] > 0
    log_z_BM, log_w_BM, _ = entry_BM3.masked_fill(~valid_BM[..., None], float("nan")).unbind(dim=-1)
    return PassResult(StepTable(log_w_BM.contiguous(), valid_BM, log_z_BM.contiguous()), computed, saved)
