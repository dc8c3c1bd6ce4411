"""F3: the policy p_θ: Megatron-core's GPTModel over packed rows, and the J_Q head in place of its loss.

Two of GPTModel's steps are replaced. Rotary positions are those of `Rows.position_T`, not the place in the row. The
output layer meets only the positions that `Rows.head` names: prompt tokens never reach the vocabulary.
"""

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_jq.model.rows import LogitsHead, Rows, ScoreHead
from megatron_jq.parallel.logprob import linear_log_probs, mask_vocabulary_padding, weighted_log_probs


class Policy(GPTModel):
    """GPTModel with a J_Q head.

    true_vocab_size: rows of the vocabulary that are tokens; the rest pads it to an even split and has probability zero.
    chunk_tokens: head rows whose logits exist at one time; None chooses by memory.
    """

    def __init__(self, *args, true_vocab_size: int, chunk_tokens: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.true_vocab_size = true_vocab_size
        self.chunk_tokens = chunk_tokens
        self._rows: Rows | None = None

    def forward(self, rows: Rows) -> Tensor | tuple[Tensor, Tensor]:
        """Last pipeline stage: logits [N, V/tp] for LogitsHead; for ScoreHead a float64 table [n, 2] of
        log-likelihoods, behind the scalar loss where it brings coefficients (the table is then without gradient).
        Other stages: hidden states [T, 1, H] (T/tp under sequence parallelism) for the next stage.
        """
        self._rows = rows
        try:
            return super().forward(
                input_ids=rows.token_T[None],
                position_ids=rows.position_T[None],
                attention_mask=None,
                packed_seq_params=rows.attention,
            )
        finally:
            self._rows = None

    @property
    def head_weight(self) -> torch.nn.Parameter:
        """This rank's shard of the output embedding, [V/tp, H], on the last pipeline stage."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _preprocess(self, *args, **kwargs):
        decoder_input, _, *rest = super()._preprocess(*args, **kwargs)
        return (decoder_input, self.rotary_pos_emb.at(self._rows.position_T), *rest)

    def _postprocess(self, hidden_states, *args, **kwargs):
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            # The head's gradient is a share of the vocabulary on each rank: sum the shares while splitting the row
            # again.
            hidden = gather_from_sequence_parallel_region(hidden_states, group=self.pg_collection.tp)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden_states, group=self.pg_collection.tp)
        weight, head = self.head_weight, self._rows.head
        rows_NH = hidden.squeeze(1)[head.position_N]
        if isinstance(head, LogitsHead):
            logits = (rows_NH @ weight.t()).float()
            return mask_vocabulary_padding(logits, self.pg_collection.tp, self.true_vocab_size)
        return self._score(rows_NH, weight, head)

    def _score(self, rows_NH: Tensor, weight: Tensor, head: ScoreHead) -> Tensor | tuple[Tensor, Tensor]:
        options = dict(  # noqa: C408
            chunk_tokens=self.chunk_tokens,
            vocab_size=self.true_vocab_size,
            inverse_temperature_T=head.inverse_temperature_N,
        )
        tp = self.pg_collection.tp
        if head.coefficient_N is not None and head.top_p_N is None:
            loss, log_prob_N = weighted_log_probs(rows_NH, weight, head.target_N, head.coefficient_N, tp, **options)
            return loss, _table(log_prob_N, head)
        log_prob_N = linear_log_probs(rows_NH, weight, head.target_N, tp, top_p_T=head.top_p_N, **options)
        if head.coefficient_N is None:
            return _table(log_prob_N, head)
        return (head.coefficient_N * log_prob_N).sum(), _table(log_prob_N.detach(), head)


def _table(log_prob_N: Tensor, head: ScoreHead) -> Tensor:
    """Sums by sequence and column. They run over hundreds of tokens and are exponentiated next: float64."""
    table = torch.zeros(2 * head.num_sequences, dtype=torch.float64, device=log_prob_N.device)
    return table.index_add(0, head.cell_N, log_prob_N.double()).view(-1, 2)
