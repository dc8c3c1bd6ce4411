"""F3: sequences laid out as one packed row for the model, with positions, an attention plan and what the head returns.

Axes: T tokens of the row (padding included), N head rows (positions whose next token is scored), n sequences.
"""

from dataclasses import dataclass

import torch

from megatron_jq.model.attention import AttentionPlan, CausalSegments
from megatron_jq.records import Sequence

RATIONALE, ANSWER = 0, 1  # columns of the head's [n, 2] table


@dataclass(frozen=True)
class ScoreHead:
    """Ask for ln p of given next tokens, summed into a [n, 2] table: column 0 ln p(z|x), column 1 ln p(y|x,z).

    Forced tokens are absent: they were not sampled. Temperature and top-p, where given, are those of the distribution
    that a token was drawn from; a gold answer was not drawn, and w is the policy's own p(y*|x,z).
    """

    position_N: torch.Tensor  # row position that predicts the token
    target_N: torch.Tensor
    cell_N: torch.Tensor  # 2 · sequence + column
    num_sequences: int
    inverse_temperature_N: torch.Tensor | None = None
    top_p_N: torch.Tensor | None = None
    coefficient_N: torch.Tensor | None = None  # float64; asks for the loss too, as sum(coefficient · ln p)


@dataclass(frozen=True)
class LogitsHead:
    """Ask for this rank's vocabulary shard of the logits at given positions: [N, V / tp]."""

    position_N: torch.Tensor


@dataclass(frozen=True)
class Rows:
    """One micro-batch as the model reads it."""

    token_T: torch.Tensor
    position_T: torch.Tensor
    attention: AttentionPlan
    head: ScoreHead | LogitsHead
    sequence_T: torch.Tensor | None = None  # number of the sequence that a token belongs to; -1: padding

    def __post_init__(self):
        assert self.token_T.shape == self.position_T.shape


def pack_sequences(
    sequences: list[Sequence],
    *,
    device: torch.device,
    with_rationale: bool,
    coefficients: list[tuple[float, float]] | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    tempered_answers: bool = False,
    row_multiple: int = 1,
    sequence_multiple: int = 1,
) -> Rows:
    """Lay sequences behind one another in the order given. An empty list gives a row of padding that scores nothing.

    coefficients: (rationale, answer) by sequence: a training head, whose loss is -sum(coefficient · ln p).
    with_rationale: score sampled rationale tokens too (training); False scores answers alone. tempered_answers: answers
    were sampled as the rationales were, so temperature and top_p hold for them too. row_multiple: the row's
    length becomes a multiple of it (sequence parallelism splits it evenly). sequence_multiple: so does every
    sequence's.
    """
    tokens, positions, lengths, owners = [], [], [], []
    where, targets, cells = [], [], []
    for n, sequence in enumerate(sequences):
        start = len(tokens)
        ids = (*sequence.prompt_ids, *sequence.rationale_ids, *sequence.answer_ids)
        padded = -(-len(ids) // sequence_multiple) * sequence_multiple
        first_z = len(sequence.prompt_ids)
        first_y = first_z + len(sequence.rationale_ids)
        spans = [(first_y, len(ids), ANSWER)]
        if with_rationale:
            spans.insert(0, (first_z, first_z + sequence.num_sampled, RATIONALE))
        for begin, end, column in spans:
            assert begin > 0, "a scored token needs one before it: prompts are never empty"
            where.extend(range(start + begin - 1, start + end - 1))
            targets.extend(ids[begin:end])
            cells.extend([2 * n + column] * (end - begin))
        tokens.extend(ids)
        tokens.extend([0] * (padded - len(ids)))  # behind the sequence: causal attention never shows them to it
        positions.extend(range(padded))
        owners.extend([n] * len(ids) + [-1] * (padded - len(ids)))
        lengths.append(padded)
    tail = (-len(tokens) % row_multiple) if tokens else row_multiple
    if tail:
        tokens.extend([0] * tail)
        positions.extend(range(tail))
        owners.extend([-1] * tail)
        lengths.append(tail)

    def ints(values):
        return torch.tensor(values, dtype=torch.long, device=device)

    cell_N = ints(cells)
    head = ScoreHead(
        ints(where),
        ints(targets),
        cell_N,
        len(sequences),
        _where_sampled(cell_N, 1.0 / temperature, tempered_answers),
        _where_sampled(cell_N, top_p, tempered_answers),
        None if coefficients is None else -_doubles(coefficients, device).view(-1)[cell_N],
    )
    return Rows(ints(tokens), ints(positions), CausalSegments(lengths, device), head, ints(owners))


def _doubles(pairs: list[tuple[float, float]], device: torch.device) -> torch.Tensor:
    return torch.tensor(pairs, dtype=torch.float64, device=device)


def _where_sampled(cell_N: torch.Tensor, value: float, answers_too: bool) -> torch.Tensor | None:
    """`value` for tokens drawn from the tempered distribution and 1 for the others, float32; None when all are 1."""
    if value == 1.0:
        return None
    sampled_N = torch.ones_like(cell_N, dtype=torch.bool) if answers_too else cell_N % 2 == RATIONALE
    return torch.where(sampled_N, value, 1.0)
