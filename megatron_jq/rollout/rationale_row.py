"""F3: one rationale while it is generated: what was drawn, what is fed next, when it is over. No model, no ranks."""

from collections import deque
from dataclasses import dataclass, field

from megatron_jq.records import Rollout
from megatron_jq.rollout.engine import SamplingOptions
from megatron_jq.rollout.sampling import UniformStream


@dataclass
class RationaleRow:
    """One rationale being generated: what was drawn, and what must still be fed before the next draw."""

    prompt_slot: int
    rationale_slot: int
    prompt_length: int
    stream: UniformStream
    gold: tuple[int, ...] | None
    bridge: tuple[int, ...]
    steps: int = 0  # tokens fed after the prompt, a finished row's dummies included
    fed: int = 0  # real ones among them
    log_w: float | None = None
    rationale: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    num_sampled: int = 0
    log_prob: float = 0.0
    in_answer: bool = False
    done: bool = False
    to_feed: deque = field(default_factory=deque)

    def draw(self) -> float:
        return self.stream.at(self.num_sampled + len(self.answer))

    def accept(self, token: int, log_prob: float, options: SamplingOptions) -> None:
        """Take one sampled token: continue, close (by force where needed), or finish."""
        if self.in_answer:
            self.answer.append(token)
            self.done = token == options.eos_id or len(self.answer) >= options.answer_budget
            self.to_feed.append(token)
            return
        self.rationale.append(token)
        self.num_sampled += 1
        self.log_prob += log_prob
        self.to_feed.append(token)
        closed = token == options.close_id
        if closed or token == options.eos_id or self.num_sampled >= options.rationale_budget:
            if not closed:
                self.rationale.append(options.close_id)
                self.to_feed.append(options.close_id)
            self.to_feed.extend(self.bridge)
            self.in_answer = True
            self.done = options.answer_budget == 0

    def rollout(self) -> Rollout:
        return Rollout(
            self.prompt_slot,
            self.rationale_slot,
            tuple(self.rationale),
            self.num_sampled,
            tuple(self.answer),
            self.log_prob,
            self.log_w,
        )


def next_tokens(active: list[RationaleRow]) -> tuple[list[int], list[int], list[int]]:
    """(token, position) that each row feeds next, and the rows that draw after it. Finished rows feed a dummy."""
    tokens, positions, drawing = [], [], []
    for i, row in enumerate(active):
        row.fed += bool(row.to_feed)
        tokens.append(row.to_feed.popleft() if row.to_feed else 0)
        positions.append(row.prompt_length + row.steps)
        row.steps += 1
        if not row.to_feed and not row.done:
            drawing.append(i)
    return tokens, positions, drawing
