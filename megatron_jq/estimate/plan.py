"""F4: one step of a run in numbers: layout, model chunks of each pipeline stage, lengths, micro-batches, waves.

Every prompt, rationale and answer has the same length, the longest there is: figures are those of the fullest step,
in which GRPO trains on every rationale. Where replicas differ, a figure of one process is the busiest replica's.
"""

import math
import os
from dataclasses import dataclass
from functools import cached_property

from megatron_jq.architecture import Architecture, padded_vocab_size
from megatron_jq.config import Config
from megatron_jq.config_validate import Derived, derive
from megatron_jq.errors import UserError
from megatron_jq.estimate.rows import Layout, Row


@dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt, of a rationale (sampled ones: its forced close token comes on top; of a given one all, its
    close token included), of the bridge that a template puts before the answer, of an answer (with its terminator).
    A row of pretraining is a prompt of one token, no rationale, and an answer.
    """

    prompt: int
    rationale: int
    answer: int
    bridge: int = 0


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers of one process. The first chunk of the model embeds tokens, the last one holds the head."""

    layers: int
    embeds: bool
    heads: bool


@dataclass(frozen=True)
class Plan:
    """Settings, lengths and what follows from them. `derived` is config_validate.derive's of a valid configuration."""

    config: Config
    derived: Derived
    lengths: Lengths
    vocab_size: int  # true size

    @property
    def architecture(self) -> Architecture:
        return self.derived.architecture

    # The layout

    @property
    def tp(self) -> int:
        return self.config.parallel.tensor_model_parallel_size

    @property
    def pp(self) -> int:
        return self.config.parallel.pipeline_model_parallel_size

    @property
    def dp(self) -> int:
        return self.derived.data_parallel_size

    @property
    def ep(self) -> int:
        return self.config.parallel.expert_model_parallel_size

    @property
    def etp(self) -> int:
        return self.config.parallel.expert_tensor_parallel_size or self.tp

    @property
    def expert_dp(self) -> int:
        """Copies of an expert: processes among which its gradient is summed."""
        return self.derived.world_size // (self.etp * self.ep * self.pp)

    @property
    def split(self) -> int:
        """Parts into which sequence parallelism cuts what lies between layers."""
        return self.tp if self.config.parallel.sequence_parallel else 1

    @cached_property
    def stages(self) -> tuple[tuple[Chunk, ...], ...]:
        """The chunks of each pipeline stage; chunk v of stage p is the model's part v·pp + p."""
        virtual = self.config.parallel.num_virtual_stages_per_pipeline_rank
        parts = self.pp * virtual
        layout = self.config.parallel.pipeline_model_parallel_layout
        if layout is None:
            layers = [self.architecture.num_layers // parts] * parts
        else:
            layers = [part.count("t") for part in layout.split("|")]
        chunks = [Chunk(n, part == 0, part == parts - 1) for part, n in enumerate(layers)]
        return tuple(tuple(chunks[stage :: self.pp]) for stage in range(self.pp))

    # Kernels and number formats

    @property
    def on_cuda(self) -> bool:
        device = self.config.parallel.device
        return device == "cuda" or (device == "auto" and os.path.exists("/dev/nvidiactl"))

    @property
    def transformer_engine(self) -> bool:
        """Assumed present on CUDA unless --transformer-impl local names others."""
        return self.on_cuda and self.config.parallel.transformer_impl != "local"

    @property
    def element(self) -> int:
        """Bytes of a parameter or an activation."""
        return 2 if self.config.model.bf16 else 4

    @property
    def vocab_rows(self) -> int:
        """Rows of the vocabulary on one process."""
        divisible = self.config.model.make_vocab_size_divisible_by
        return padded_vocab_size(self.vocab_size, divisible, self.tp) // self.tp

    # What the estimator does

    @property
    def imitates(self) -> bool:
        """Whether the data gives the rationale (sft) or there is none (pretrain): nothing is drawn or scored."""
        return self.config.objective.row.imitates

    @property
    def updates(self) -> int:
        """Training passes per step."""
        return self.config.objective.grpo_iterations

    @property
    def has_reference(self) -> bool:
        """Whether a frozen policy scores each step's micro-batches once."""
        return self.config.objective.grpo_kl_beta > 0

    @property
    def scores_in_rollout(self) -> bool:
        return self.config.rollout.score_with == "rollout"

    @property
    def has_nucleus(self) -> bool:
        """Whether trained tokens have a nucleus (--top-p): those that were drawn. Scored gold answers have none."""
        return self.config.rollout.top_p < 1 and not self.imitates

    @property
    def drawn_tokens(self) -> int:
        """Drawn tokens of a rationale, and of a sampled answer after it."""
        if self.imitates:
            return 0
        return self.lengths.rationale + (self.lengths.answer if self.derived.samples_answers else 0)

    @property
    def _context_tokens(self) -> int:
        """Between prompt and answer: rationale, a close token put there by force, bridge."""
        return self.lengths.rationale + (not self.imitates) + self.lengths.bridge

    @property
    def fed_tokens(self) -> int:
        """Generated tokens of a rationale that go through the layers one by one. The last one drawn is never fed."""
        if self.imitates:
            return 0
        if self.derived.samples_answers:
            return self._context_tokens + self.lengths.answer - 1
        return self.lengths.rationale - 1

    @property
    def tail_tokens(self) -> int:
        """Tokens of a rationale that are fed at once to score y* from the cache (rollout/megatron.py: _score_gold)."""
        if not self.scores_in_rollout:
            return 0
        unfed = self._context_tokens - min(self.fed_tokens, self._context_tokens - 1)
        return unfed + self.lengths.answer - 1

    # Rationales, micro-batches, waves

    @property
    def rationales(self) -> int:
        """Number of rationales per step, B·M."""
        return self.derived.rationales_per_step

    def replica_share(self, replica: int) -> range:
        """Slots of the step's [B, M] table that a replica draws (rollout/engine.py: share_of_replica)."""
        return range(self.rationales * replica // self.dp, self.rationales * (replica + 1) // self.dp)

    @property
    def layout(self) -> Layout:
        """The lengths and rules by which the trainer lays sequences out."""
        t, lengths = self.config.training, self.lengths
        return Layout(
            prompt=lengths.prompt,
            branch=self._context_tokens + lengths.answer,
            num_rationales=self.config.rollout.num_rationales,
            share_prompts=t.share_prompts == "auto",
            sequence_multiple=t.pad_sequences_to_multiple_of,
            row_multiple=self.split,
        )

    @cached_property
    def rows(self) -> tuple[tuple[Row, ...], ...]:
        """Micro-batches of each replica; those without a sequence are padding."""
        t, layout = self.config.training, self.layout
        if t.max_tokens_per_micro_batch is None:
            shares = [list(self.replica_share(replica)) for replica in range(self.dp)]
            rows_of_replicas = [layout.rows_by_count(share, t.micro_batch_size) for share in shares]
        else:
            shares = [list(range(self.rationales))]
            if self.dp > 1:
                shares = layout.balanced(self.rationales, self.dp, self.architecture.hidden_size)
            rows_of_replicas = [layout.rows_by_tokens(share, t.max_tokens_per_micro_batch) for share in shares]
        if self.config.parallel.num_virtual_stages_per_pipeline_rank > 1:  # rounds of as many as there are stages
            rows_of_replicas = [[*rows, *[layout.row([])] * (-len(rows) % self.pp)] for rows in rows_of_replicas]
        return tuple(map(tuple, rows_of_replicas))

    @property
    def busiest_rows(self) -> tuple[Row, ...]:
        return self.rows[self.busiest_replica]

    @cached_property
    def largest_micro_batch(self) -> int:
        """Sequences of the micro-batch that has most of them, on any replica."""
        return max(row.sequences for rows in self.rows for row in rows)

    @cached_property
    def largest_row(self) -> int:
        """Tokens of the longest row on any replica."""
        return max(row.tokens for rows in self.rows for row in rows)

    def waves(self, replica: int) -> list[tuple[int, int]]:
        """(rationales, distinct prompts) of each batch that a replica decodes (rollout/megatron.py); none where
        nothing is drawn.
        """
        if self.imitates:
            return []
        share, group = self.replica_share(replica), self.config.rollout.num_rationales
        most = self.config.rollout.rollout_batch_size or max(len(share), 1)
        parts = [share[i : i + most] for i in range(0, len(share), most)]
        return [(len(part), part[-1] // group - part[0] // group + 1) for part in parts]

    @cached_property
    def busiest_replica(self) -> int:
        """That of the most tokens to train on; among these, of the most rationales and then prompts to decode."""

        def work(replica: int) -> tuple[int, int, int]:
            trained = sum(row.tokens for row in self.rows[replica])
            return trained, len(self.replica_share(replica)), sum(prompts for _, prompts in self.waves(replica))

        return max(range(self.dp), key=work)

    @property
    def busiest_waves(self) -> list[tuple[int, int]]:
        return self.waves(self.busiest_replica)

    @cached_property
    def fullest_wave(self) -> tuple[int, int]:
        """(rationales, distinct prompts) of the largest wave on any replica."""
        return max(wave for replica in range(self.dp) for wave in self.waves(replica))


def make_plan(config: Config, world_size: int, lengths: Lengths, vocab_size: int) -> Plan:
    """Return the plan. UserError, as training raises it, where the configuration is not a valid one for this many
    processes, or where the lengths do not fit.
    """
    plan = Plan(config, derive(config, world_size), lengths, vocab_size)
    room = min(plan.architecture.max_position_embeddings, config.training.max_tokens_per_micro_batch or math.inf)
    needed = lengths.prompt + lengths.rationale + 1 + lengths.bridge + lengths.answer
    if needed > room and not config.objective.row.pretrains:  # whose rows validate has looked at
        raise UserError(
            f"a prompt of {lengths.prompt} tokens, a rationale of {lengths.rationale}, its close token, a bridge of "
            f"{lengths.bridge} and an answer of {lengths.answer} are {needed}, more than {room} (context, or "
            "--max-tokens-per-micro-batch); lower a budget, or raise --max-position-embeddings or "
            "--max-tokens-per-micro-batch"
        )
    return plan


def smallest_world_size(config: Config) -> int:
    """Return the processes of one replica, or of as many replicas as hold one copy of all experts."""
    p = config.parallel
    replica = p.tensor_model_parallel_size * p.pipeline_model_parallel_size
    etp = p.expert_tensor_parallel_size or p.tensor_model_parallel_size
    return math.lcm(replica, etp * p.expert_model_parallel_size * p.pipeline_model_parallel_size)
