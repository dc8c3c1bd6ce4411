"""F3: sequences laid out as one packed row for the model, with positions, an attention plan and what the head returns.

Sequences of one prompt can share it: the row then holds the prompt once, and their rationales and answers as branches
after it (docs/shared-prompts.md). Every position, target and table cell is what it is for the plain sequences.

Axes: T tokens of the row (padding included), N head rows (positions whose next token is scored), n sequences.
"""

import itertools
from dataclasses import dataclass, field
from functools import partial

import torch

from megatron_jq.model.attention import AttentionPlan, CausalSegments
from megatron_jq.model.tree_attention import Tree, TreeSegments
from megatron_jq.objective.clipping import TokenRule
from megatron_jq.parallel.transfers import to_device
from megatron_jq.records import TrainingSequence

RATIONALE, ANSWER = 0, 1  # what a scored token belongs to


@dataclass(frozen=True)
class ScoreHead:
    """Ask for ln p of given next tokens, summed by sequence into ln p(z|x) and ln p(y|x,z) (head.py: HeadOutput).

    Forced tokens are absent: they were not sampled. Temperature and top-p, where given, are those of the distribution
    that a token was drawn from; a gold answer was not drawn, and w is the policy's own p(y*|x,z).
    """

    position_N: torch.Tensor  # row position that predicts the token
    target_N: torch.Tensor
    cell_N: torch.Tensor  # 2 · sequence + RATIONALE or ANSWER
    num_sequences: int
    inverse_temperature_N: torch.Tensor | None = None
    top_p_N: torch.Tensor | None = None
    coefficient_N: torch.Tensor | None = None  # float64; asks for the loss too, as sum(coefficient · ln p)
    by_token: bool = False  # asks for ln p of each token too, [N]; not of a nucleus
    rule: TokenRule | None = None  # the loss is another function of ln p and the coefficients; with by_token


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
    owners_T2: torch.Tensor | None = None  # first and last of the sequences that a token belongs to; last < first: none

    def __post_init__(self) -> None:
        assert self.token_T.shape == self.position_T.shape


@dataclass
class _Row:
    """A row while it is laid out."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    owners: list[tuple[int, int]] = field(default_factory=list)

    def add(self, ids: tuple[int, ...], owners: tuple[int, int], *, multiple: int = 1, first_position: int = 0) -> int:
        """Append ids and return the tokens that were appended.

        Padding to a multiple of tokens comes last, where causal attention never shows it to the ids.
        """
        padding = -len(ids) % multiple
        self.tokens.extend(ids)
        self.tokens.extend([0] * padding)
        self.positions.extend(range(first_position, first_position + len(ids) + padding))
        self.owners.extend([owners] * len(ids) + [(0, -1)] * padding)
        return len(ids) + padding

    def add_apart(self, ids: tuple[int, ...], owners: tuple[int, int], *, multiple: int, end: int) -> list[int]:
        """As `add`, in segments that end after every token `end`, each with positions from 0. Returns their tokens."""
        ends = [i + 1 for i, token in enumerate(ids[:-1]) if token == end]
        lengths = [self.add(ids[a:b], owners) for a, b in itertools.pairwise([0, *ends, len(ids)])]
        padding = -len(ids) % multiple
        return [*lengths, self.add((0,) * padding, (0, -1))] if padding else lengths


def padded(tokens: int, multiple: int) -> int:
    """Tokens up to the next multiple."""
    return -(-tokens // multiple) * multiple


def sharing_pays(sequences: list[TrainingSequence] | tuple[TrainingSequence, ...], multiple: int) -> bool:
    """Whether sequences of one prompt take fewer tokens as a tree than each by itself.

    They do where nothing is padded; but a tree pads each branch, and the prompt then stands before that.
    """
    prompt, lengths = len(sequences[0].prompt_ids), [len(s) for s in sequences]
    tree = prompt + sum(padded(length - prompt, multiple) for length in lengths)
    return len(sequences) > 1 and tree < sum(padded(length, multiple) for length in lengths)


def prompt_groups(sequences: list[TrainingSequence], *, share_prompts: bool, multiple: int = 1) -> list[list[int]]:
    """Return indices of neighbouring sequences that share their prompt; each by itself without share_prompts, or where
    sharing does not pay.
    """
    numbers = range(len(sequences))
    if not share_prompts:
        return [[n] for n in numbers]
    groups: list[list[int]] = []
    for _, neighbours in itertools.groupby(numbers, key=lambda n: sequences[n].prompt):
        group = list(neighbours)
        pays = sharing_pays([sequences[n] for n in group], multiple)
        groups.extend([group] if pays else [[n] for n in group])
    return groups


def pack_sequences(
    sequences: list[TrainingSequence],
    *,
    device: torch.device,
    with_rationale: bool,
    coefficients: list[tuple[float, float]] | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    tempered_answers: bool = False,
    row_multiple: int = 1,
    sequence_multiple: int = 1,
    share_prompts: bool = False,
    mask_loss_after_id: int | None = None,
    document_end_id: int | None = None,
) -> Rows:
    """Lay sequences out one after another in the order given. An empty list gives a row of padding that scores nothing.

    coefficients: (rationale, answer) by sequence: a training head, whose loss is sum(coefficient · ln p).
    with_rationale: score sampled rationale tokens too (training); False scores answers alone. tempered_answers: answers
    were sampled as the rationales were, so temperature and top_p hold for them too. row_multiple: the row's
    length becomes a multiple of it (sequence parallelism splits it evenly). sequence_multiple: so does every
    sequence's, or branch's. share_prompts: neighbours with one prompt are laid out as a tree. mask_loss_after_id: a
    token that follows this one is not scored. document_end_id: what follows this one does not attend to it, nor to what
    stands before it; not with share_prompts.
    """
    row, before, start, attention = _lay_out(
        sequences, row_multiple, sequence_multiple, share_prompts, device, document_end_id
    )
    positions, targets, cells = list[int](), list[int](), list[int]()
    for n, sequence in enumerate(sequences):
        ids = (*sequence.prompt_ids, *sequence.rationale_ids, *sequence.answer_ids)
        first_z = len(sequence.prompt_ids)
        first_y = first_z + len(sequence.rationale_ids)
        scored_spans = [(first_y, len(ids), ANSWER)]
        if with_rationale:
            scored_spans.insert(0, (first_z, first_z + sequence.num_sampled, RATIONALE))
        for begin, end, column in scored_spans:
            assert begin > 0, "a scored token needs one before it: prompts are never empty"
            scored = scored_places(ids, begin, end, mask_loss_after_id)
            # The token before a branch's first one is the prompt's last, which lies elsewhere in the row.
            positions.extend(before[n] if i == first_z else start[n] + i - 1 - first_z for i in scored)
            targets.extend(ids[i] for i in scored)
            cells.extend([2 * n + column] * len(scored))

    ints = partial(_longs, device=device)
    cell_N = ints(cells)
    if not with_rationale and not tempered_answers:  # nothing that is scored was sampled
        temperature = top_p = 1.0
    head = ScoreHead(
        ints(positions),
        ints(targets),
        cell_N,
        len(sequences),
        _where_sampled(cell_N, 1.0 / temperature, tempered_answers),
        _where_sampled(cell_N, top_p, tempered_answers),
        None if coefficients is None else _doubles(coefficients, device).view(-1)[cell_N],
    )
    return Rows(ints(row.tokens), ints(row.positions), attention, head, ints(row.owners).view(-1, 2))


def scored_places(ids: tuple[int, ...], begin: int, end: int, mask_loss_after_id: int | None) -> list[int] | range:
    """Indices in [begin, end) of the tokens that are scored: those that do not follow `mask_loss_after_id`."""
    if mask_loss_after_id is None:
        return range(begin, end)
    return [i for i in range(begin, end) if ids[i - 1] != mask_loss_after_id]


def _lay_out(
    sequences: list[TrainingSequence],
    row_multiple: int,
    sequence_multiple: int,
    share_prompts: bool,
    device: torch.device,
    document_end_id: int | None,
) -> tuple[_Row, list[int], list[int], AttentionPlan]:
    """The row; where each sequence's last prompt token lies, and its first token after the prompt; the plan."""
    assert document_end_id is None or not share_prompts, "a tree's prompt is one segment"
    row, before, start = _Row(), [0] * len(sequences), [0] * len(sequences)
    groups, lengths = prompt_groups(sequences, share_prompts=share_prompts, multiple=sequence_multiple), []
    for group in groups:
        first = sequences[group[0]]
        alone = len(group) == 1
        ids = (*first.prompt_ids, *first.rationale_ids, *first.answer_ids) if alone else first.prompt_ids
        for n in group:
            before[n] = len(row.tokens) + len(first.prompt_ids) - 1
            start[n] = before[n] + 1
        owners, multiple = (group[0], group[-1]), sequence_multiple if alone else 1
        if document_end_id is None:
            lengths.append(row.add(ids, owners, multiple=multiple))
        else:
            lengths.extend(row.add_apart(ids, owners, multiple=multiple, end=document_end_id))
    branches = [
        [_branch_tokens(sequences[n], sequence_multiple) for n in group] if len(group) > 1 else [] for group in groups
    ]
    total = len(row.tokens) + sum(map(sum, branches))
    tail = (-total % row_multiple) if total else row_multiple
    if tail:
        lengths.append(row.add((0,) * tail, (0, -1)))
    if not any(branches):
        return row, before, start, CausalSegments(lengths, device)
    for group, grown in zip(groups, branches, strict=True):
        for n in group if grown else ():
            s, start[n] = sequences[n], len(row.tokens)
            ids = (*s.rationale_ids, *s.answer_ids)
            row.add(ids, (n, n), multiple=sequence_multiple, first_position=len(s.prompt_ids))
    trees = [Tree(trunk, tuple(branches[i]) if i < len(branches) else ()) for i, trunk in enumerate(lengths)]
    return row, before, start, TreeSegments(trees, device)


def _branch_tokens(sequence: TrainingSequence, multiple: int) -> int:
    return padded(len(sequence.rationale_ids) + len(sequence.answer_ids), multiple)


def _longs(values: list[int] | list[tuple[int, int]], device: torch.device) -> torch.Tensor:
    return to_device(torch.tensor(values, dtype=torch.long), device)


def _doubles(pairs: list[tuple[float, float]], device: torch.device) -> torch.Tensor:
    return to_device(torch.tensor(pairs, dtype=torch.float64), device)


def _where_sampled(cell_N: torch.Tensor, value: float, answers_too: bool) -> torch.Tensor | None:
    """`value` for tokens drawn from the tempered distribution and 1 for the others, float32; None when all are 1."""
    if value == 1.0:
        return None
    sampled_N = torch.ones_like(cell_N, dtype=torch.bool) if answers_too else cell_N % 2 == RATIONALE
    return torch.where(sampled_N, value, 1.0)
