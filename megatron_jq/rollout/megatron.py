"""F3: generation inside the training job, with the training weights, at any tensor- and pipeline-parallel layout.

Each replica decodes its share in batches. A batch prefills every prompt once, then feeds one token per row and step.
Ranks of a model-parallel group keep the same books on the same sampled ids; hidden states and three numbers per row
travel.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_jq.model.attention import AttentionPlan, CausalSegments
from megatron_jq.model.head import HeadOutput
from megatron_jq.model.policy import Policy
from megatron_jq.model.rows import ANSWER, LogitsHead, Rows, ScoreHead
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.parallel.transfers import to_device
from megatron_jq.records import Rollout
from megatron_jq.rollout.cache import DecodePlan, PrefillPlan, RolloutCache, TailPlan
from megatron_jq.rollout.engine import EngineSetup, NamedWeights, RolloutRequest, SamplingOptions
from megatron_jq.rollout.rationale_row import RationaleRow, next_tokens
from megatron_jq.rollout.sampling import UniformStream, sample_tokens


class MegatronEngine:
    """RolloutEngine over the policy itself.

    policies: this pipeline rank's model chunks, in order.
    max_rows: rationales decoded at a time (None: the replica's whole share); bounds the cache's memory.
    """

    #: Finished rows are dropped from the batch once this share of it is idle.
    IDLE_SHARE = 0.125

    def __init__(self, policies: list[Policy], runtime: Runtime, *, max_rows: int | None = None):
        self.policies, self.runtime, self.max_rows = policies, runtime, max_rows
        self.config = policies[0].config
        self.tokens_computed = 0  # token positions that went through the layers, padding included; for benchmarks
        self.cache_bytes_peak = 0  # most bytes of keys and values at a time, on this rank; for benchmarks
        self.version: int | None = None
        #: Called on every rank with each row that took a token, for whoever shows them as they come.
        self.on_token: Callable[[RationaleRow], None] | None = None

    def update_weights(self, version: int, named_weights: NamedWeights) -> None:
        """Note the version: the policies are those that train."""
        self.version = version

    @torch.no_grad()
    def generate(self, requests: list[RolloutRequest], options: SamplingOptions) -> list[Rollout]:
        with self.runtime.native():
            rollouts = [rollout for batch in self._batches(requests) for rollout in self._run_batch(batch, options)]
            while self._expert_peers_at_work(False):
                self._idle_pass()
            return rollouts

    def close(self) -> None:
        """There is nothing to close: the policies are the trainer's."""

    def _batches(self, requests: list[RolloutRequest]) -> list[list[RolloutRequest]]:
        batches: list[list[RolloutRequest]] = [[]]
        room = self.max_rows
        for request in requests:
            slots = request.rationale_slots
            while slots:
                if room == 0:
                    batches.append([])
                    room = self.max_rows
                taken, slots = slots[:room], slots[room:] if room is not None else ()
                batches[-1].append(replace(request, rationale_slots=taken))
                room = room - len(taken) if room is not None else None
        return [batch for batch in batches if batch]

    def _run_batch(self, batch: list[RolloutRequest], options: SamplingOptions) -> list[Rollout]:
        asked = [(r.prompt_slot, m) for r in batch for m in r.rationale_slots]
        batch = sorted(batch, key=lambda r: len(r.prompt_ids))  # the cache wants prompts of similar length side by side
        rows = [
            RationaleRow(
                r.prompt_slot,
                m,
                len(r.prompt_ids),
                UniformStream(options.seed, options.step, r.prompt_slot, m),
                r.gold_ids,
                r.bridge_ids,
            )
            for r in batch
            for m in r.rationale_slots
        ]
        device = self.runtime.device
        cache = RolloutCache([len(r.prompt_ids) for r in batch], [len(r.rationale_slots) for r in batch], device)
        logits = self._prefill(batch, cache)
        if logits is not None:  # the group's logits serve each of its rows
            counts = torch.tensor([len(r.rationale_slots) for r in batch], device=device)
            logits = logits.repeat_interleave(counts, dim=0, output_size=len(rows))
        self._sample(rows, list(range(len(rows))), logits, options)
        active = rows
        while not all(row.done for row in active):
            if sum(row.done for row in active) > self.IDLE_SHARE * len(active):
                self._score_gold(active, cache)
                self.cache_bytes_peak = max(self.cache_bytes_peak, cache.num_bytes)
                unfinished = [i for i, row in enumerate(active) if not row.done]
                active = [active[i] for i in unfinished]
                cache.keep(unfinished)
            tokens, positions, drawing = next_tokens(active)
            logits = self._logits(tokens, positions, DecodePlan(cache), drawing)
            cache.length += 1
            self._sample(active, drawing, logits, options)
        self._score_gold(active, cache)
        self.cache_bytes_peak = max(self.cache_bytes_peak, cache.num_bytes)
        rollout_of = {(row.prompt_slot, row.rationale_slot): row.rollout() for row in rows}
        return [rollout_of[slot] for slot in asked]

    def _score_gold(self, active: list[RationaleRow], cache: RolloutCache) -> None:
        """ln p(y*|x,z) of finished rows from the cache: feeds |y*| tokens a row, and what before it was not yet
        fed.
        """
        due = [i for i, row in enumerate(active) if row.done and row.gold is not None and row.log_w is None]
        if not due:
            return
        tokens, positions, cached, lengths = [], [], [], []
        scored, targets, cells = [], [], []
        for n, i in enumerate(due):
            row, gold = active[i], active[i].gold
            assert gold is not None
            context = [*row.rationale, *row.bridge]
            fed = min(row.fed, len(context) - 1)  # the last token before y* predicts its first: feed it here
            tail = [*context[fed:], *gold[:-1]]
            tokens.extend(tail)
            positions.extend(range(row.prompt_length + fed, row.prompt_length + fed + len(tail)))
            scored.extend(range(len(tokens) - len(gold), len(tokens)))
            targets.extend(gold)
            cells.extend([2 * n + ANSWER] * len(gold))
            cached.append(fed)
            lengths.append(len(tail))
        device = self.runtime.device
        plan = TailPlan(cache, due, cached, lengths, device)
        position_N, target_N, cell_N = (to_device(torch.tensor(x), device) for x in (scored, targets, cells))
        output = self._forward(tokens, positions, plan, ScoreHead(position_N, target_N, cell_N, len(due)))
        assert output is None or isinstance(output, HeadOutput)
        log_w_n = torch.empty(len(due), dtype=torch.float64, device=device) if output is None else output.log_w_n
        for i, log_w in zip(due, self.runtime.groups.from_last_stage(log_w_n).tolist(), strict=True):
            active[i].log_w = log_w

    def _prefill(self, batch: list[RolloutRequest], cache: RolloutCache) -> Tensor | None:
        lengths = [len(r.prompt_ids) for r in batch]
        tokens = [token for r in batch for token in r.prompt_ids]
        positions = [position for length in lengths for position in range(length)]
        last = torch.tensor(lengths).cumsum(0) - 1
        padding = -len(tokens) % self._row_multiple
        plan = PrefillPlan(lengths, padding, cache, self.runtime.device)
        return self._logits(tokens, positions, plan, last.tolist())

    def _logits(self, tokens: list[int], positions: list[int], plan: AttentionPlan, scored: list[int]) -> Tensor | None:
        """The logits of the tokens at `scored`, on the last stage."""
        output = self._forward(tokens, positions, plan, self._head_at(scored))
        assert not isinstance(output, HeadOutput)
        return output

    def _head_at(self, positions: list[int]) -> LogitsHead:
        return LogitsHead(to_device(torch.tensor(positions, dtype=torch.long), self.runtime.device))

    @property
    def _row_multiple(self) -> int:
        return self.runtime.groups.tp.size() if self.config.sequence_parallel else 1

    def _expert_peers_at_work(self, at_work: bool) -> bool:
        """Whether a replica that shares experts with this one has another pass to make. Every rank asks before each."""
        peers = self.runtime.groups.expert_peers
        if peers is None:
            return False
        flag = torch.tensor(at_work, dtype=torch.int32, device=self.runtime.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=peers)
        return bool(flag.item())

    def _idle_pass(self) -> None:
        """A pass over padding: its tokens keep this rank's experts in the exchange that other replicas wait for."""
        padding = [0] * self._row_multiple
        plan = CausalSegments([len(padding)], self.runtime.device)
        self._pass_through(padding, range(len(padding)), plan, self._head_at([]))

    def _forward(
        self, tokens: list[int], positions: list[int], plan: AttentionPlan, head: LogitsHead | ScoreHead
    ) -> Tensor | HeadOutput | None:
        """One pass through all pipeline stages. The last stage gets what `head` asks for, the others None."""
        self._expert_peers_at_work(True)
        return self._pass_through(tokens, positions, plan, head)

    def _pass_through(
        self, tokens: Sequence[int], positions: Sequence[int], plan: AttentionPlan, head: LogitsHead | ScoreHead
    ) -> Tensor | HeadOutput | None:
        padding = [0] * (-len(tokens) % self._row_multiple)
        groups, config, device = self.runtime.groups, self.config, self.runtime.device
        self.tokens_computed += len(tokens) + len(padding)
        rows = Rows(
            to_device(torch.tensor([*tokens, *padding]), device),
            to_device(torch.tensor([*positions, *padding]), device),
            plan,
            head,
        )
        length = len(rows.token_T) // self._row_multiple
        for number, policy in enumerate(self.policies):
            if number > 0 or not groups.is_first_stage:
                hidden = torch.empty(length, 1, config.hidden_size, dtype=config.pipeline_dtype, device=device)
                dist.recv(hidden, src=groups.previous_stage, group=groups.pp)
                policy.set_input_tensor(hidden)
            output = policy(rows)
            if policy.post_process:
                return output
            dist.send(output.contiguous(), dst=groups.next_stage, group=groups.pp)
        return None

    def _sample(
        self, rows: list[RationaleRow], drawing: list[int], logits: Tensor | None, options: SamplingOptions
    ) -> None:
        """Draw for the given rows on the last stage, tell the other stages, and let each row take its token."""
        if not drawing:
            return
        groups, device = self.runtime.groups, self.runtime.device
        drawn = torch.empty(2, len(drawing), dtype=torch.float64, device=device)  # ids are exact in float64
        if groups.is_last_stage:
            assert logits is not None
            uniform = to_device(torch.tensor([rows[i].draw() for i in drawing], dtype=torch.float64), device)
            ids, log_probs = sample_tokens(
                logits, uniform, temperature=options.temperature, top_p=options.top_p, group=groups.tp
            )
            drawn[0], drawn[1] = ids, log_probs
        ids, log_probs = groups.from_last_stage(drawn).tolist()
        for i, token, log_prob in zip(drawing, ids, log_probs, strict=True):
            rows[i].accept(int(token), log_prob, options)
            if self.on_token is not None:
                self.on_token(rows[i])


def megatron_engine(setup: EngineSetup) -> MegatronEngine:
    """Return the engine of a run's settings."""
    return MegatronEngine(setup.policies, setup.runtime, max_rows=setup.config.rollout.rollout_batch_size)
