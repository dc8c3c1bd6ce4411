"""F3: the policy p_θ: a Megatron-core language model over packed rows, and the J_Q head in place of its loss.

Of the model, its parts are used: embedding, decoder, output weights, names in checkpoints. The way through them is
written here, since two steps differ from Megatron-core's own. Rotary positions are those of `Rows.position_T`, not the
place in the row. The output weights meet only the positions that `Rows.head` names: prompt tokens never reach the
vocabulary.
"""

from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_jq.model.head import HeadOutput, score_rows
from megatron_jq.model.moe import balances_experts
from megatron_jq.model.rows import LogitsHead, Rows, ScoreHead
from megatron_jq.parallel.vocabulary import mask_vocabulary_padding


class Policy(LanguageModule):
    """The forward pass over packed rows, for a language model that has Megatron-core's parts: `embedding`, `decoder`,
    `rotary_pos_emb` (a RotaryAt), `output_layer`, `pg_collection`. GPTPolicy and HybridPolicy bring them.

    true_vocab_size: rows of the vocabulary that are tokens; the rest pads it to an even split and has probability zero.
    chunk_tokens: head rows whose logits exist at one time; None chooses by memory.
    """

    #: Entries of `decoder.layers` per layer of the architecture.
    MODULES = 1

    def __init__(self, *args: Any, true_vocab_size: int, chunk_tokens: int | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.true_vocab_size = true_vocab_size
        self.chunk_tokens = chunk_tokens

    def forward(self, rows: Rows) -> Tensor | HeadOutput:
        """Return, on the last pipeline stage, logits [N, V/tp] for LogitsHead or a HeadOutput for ScoreHead.

        Other stages: hidden states [T, 1, H] (T/tp under sequence parallelism) for the next stage.
        """
        hidden_T1H = None  # what the stage before sent: Megatron-core's schedules hand it to the decoder
        if self.pre_process:
            hidden_T1H = self.embedding(input_ids=rows.token_T[None], position_ids=rows.position_T[None])
        hidden_T1H = self.decoder(
            hidden_states=hidden_T1H,
            attention_mask=None,
            rotary_pos_emb=self.rotary_pos_emb.at(rows.position_T),
            packed_seq_params=rows.attention,
            padding_mask=self._members(rows),
        )
        if not self.post_process:
            return hidden_T1H
        head, weight, tp = rows.head, self.head_weight, self.pg_collection.tp
        hidden_NH = self._whole_row(hidden_T1H).squeeze(1)[head.position_N]
        if isinstance(head, LogitsHead):
            return mask_vocabulary_padding((hidden_NH @ weight.t()).float(), tp, self.true_vocab_size)
        return score_rows(
            hidden_NH,
            weight,
            head,
            tp=tp,
            cp=self.pg_collection.cp,
            vocab_size=self.true_vocab_size,
            chunk_tokens=self.chunk_tokens,
        )

    @property
    def head_weight(self) -> torch.nn.Parameter:
        """This rank's shard of the output embedding, [V/tp, H], on the last pipeline stage."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _members(self, rows: Rows) -> Tensor | None:
        """[n, T/tp]: which of this rank's tokens belong to each sequence, in Megatron-core's place for a padding mask.

        For the routers' load-balancing loss alone: None where there is none.
        """
        if not (balances_experts(self.config) and torch.is_grad_enabled()):
            return None
        assert isinstance(rows.head, ScoreHead) and rows.owners_T2 is not None
        number_n1 = torch.arange(rows.head.num_sequences, device=rows.token_T.device)[:, None]
        first_T, last_T = rows.owners_T2.unbind(dim=1)
        member_nT = (first_T <= number_n1) & (number_n1 <= last_T)
        if self.config.sequence_parallel:
            tp = self.pg_collection.tp
            member_nT = member_nT.chunk(tp.size(), dim=1)[tp.rank()]
        return member_nT

    def _whole_row(self, hidden_T1H: Tensor) -> Tensor:
        """The row's hidden states, alike on all ranks of tp. The head's gradient is a share of the vocabulary on each
        rank: the shares are summed here, under sequence parallelism while the row is split again.
        """
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden_T1H, group=self.pg_collection.tp)
        return copy_to_tensor_model_parallel_region(hidden_T1H, group=self.pg_collection.tp)


class GPTPolicy(Policy, GPTModel):
    """Megatron-core's GPTModel with the J_Q head. layer: the spec of its layers; norm: the class of the final norm."""

    def __init__(
        self,
        *,
        config: TransformerConfig,
        layer: ModuleSpec,
        norm: type,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
        **options: Any,
    ):
        layers = get_num_layers_to_build(config, vp_stage, pg_collection.pp.rank())
        super().__init__(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm),
            pg_collection=pg_collection,
            vp_stage=vp_stage,
            **options,
        )
