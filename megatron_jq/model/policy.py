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

from megatron_jq.model.head import score_rows
from megatron_jq.model.moe import balances_experts
from megatron_jq.model.rows import LogitsHead, Rows
from megatron_jq.parallel.logprob import mask_vocabulary_padding


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

    def forward(self, rows: Rows) -> Tensor | tuple[Tensor, ...]:
        """Last pipeline stage: logits [N, V/tp] for LogitsHead; for ScoreHead a float64 table [n, 2] of
        log-likelihoods, behind the scalar loss where it brings coefficients (the table is then without gradient), and
        before the tokens' own where it asks for them.
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
        decoder_input, _, cos, sin, offset, _, *rest = super()._preprocess(*args, **kwargs)
        angles = self.rotary_pos_emb.at(self._rows.position_T)
        return (decoder_input, angles, cos, sin, offset, self._members(), *rest)

    def _members(self) -> Tensor | None:
        """[n, T/tp]: which of this rank's tokens belong to each sequence, in Megatron-core's place for a padding mask.

        For the routers' load-balancing loss alone: None where there is none.
        """
        if not (balances_experts(self.config) and torch.is_grad_enabled()):
            return None
        number_n1 = torch.arange(self._rows.head.num_sequences, device=self._rows.token_T.device)[:, None]
        first_T, last_T = self._rows.owners_T2.unbind(dim=1)
        member_nT = (first_T <= number_n1) & (number_n1 <= last_T)
        if self.config.sequence_parallel:
            tp = self.pg_collection.tp
            member_nT = member_nT.chunk(tp.size(), dim=1)[tp.rank()]
        return member_nT

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
        return score_rows(
            rows_NH,
            weight,
            head,
            tp=self.pg_collection.tp,
            cp=self.pg_collection.cp,
            vocab_size=self.true_vocab_size,
            chunk_tokens=self.chunk_tokens,
        )
