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
from megatron_jq.parallel.logprob import linear_log_probs, mask_vocabulary_padding


class Policy(GPTModel):
    """GPTModel with a J_Q head.

    true_vocab_size: rows of the vocabulary that are tokens; the rest pads it to an even split and has probability zero.
    chunk_tokens: head rows whose logits exist at one time.
    """

    def __init__(self, *args, true_vocab_size: int, chunk_tokens: int = 1024, **kwargs):
        super().__init__(*args, **kwargs)
        self.true_vocab_size = true_vocab_size
        self.chunk_tokens = chunk_tokens
        self._rows: Rows | None = None

    def forward(self, rows: Rows) -> Tensor:
        """Last pipeline stage: a float64 table [n, 2] for ScoreHead, logits [N, V/tp] for LogitsHead. Other stages:
        hidden states [T, 1, H] (T/tp under sequence parallelism) for the next stage.
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
        weight = self.output_layer.weight
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        head = self._rows.head
        rows_NH = hidden.squeeze(1)[head.position_N]
        if isinstance(head, LogitsHead):
            logits = (rows_NH @ weight.t()).float()
            return mask_vocabulary_padding(logits, self.pg_collection.tp, self.true_vocab_size)
        return self._score(rows_NH, weight, head)

    def _score(self, rows_NH: Tensor, weight: Tensor, head: ScoreHead) -> Tensor:
        log_prob_N = linear_log_probs(
            rows_NH,
            weight,
            head.target_N,
            self.pg_collection.tp,
            chunk_tokens=self.chunk_tokens,
            vocab_size=self.true_vocab_size,
            inverse_temperature_T=head.inverse_temperature_N,
            top_p_T=head.top_p_N,
        )
        # A sum over hundreds of tokens that is exponentiated next: float64.
        table = torch.zeros(2 * head.num_sequences, dtype=torch.float64, device=log_prob_N.device)
        return table.index_add(0, head.cell_N, log_prob_N.double()).view(-1, 2)
