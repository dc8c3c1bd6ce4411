"""F1: frozen records that cross rooms. Token ids are never decoded and re-encoded on the way.

Shapes: B prompts a step, M rationales a prompt. `slot` numbers are positions in the step's [B, M] table, the same on
every rank and for every parallel layout.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Example:
    """One supervised pair (x, y*) as token ids.

    prompt_ids end where the rationale begins; answer_ids hold y* tokenised on its own, its terminator included,
    because a string's probability needs its end. aliases: texts that count as right beside
    answer_text when a sampled answer is judged; P is that of answer_ids alone. bridge_ids: what the prompt's template
    puts between the close token and the answer. Nobody samples them, and they carry no weight. rationale_ids: a given
    z, its close token included, for the estimators that imitate one; None where there is none.
    """

    index: int  # row in its data set, 0-based
    prompt_text: str
    answer_text: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    aliases: tuple[str, ...] = ()
    bridge_ids: tuple[int, ...] = ()
    rationale_ids: tuple[int, ...] | None = None

    def joined(self, rationale_ids: tuple[int, ...]) -> tuple[int, ...]:
        """All that stands between prompt and answer: a rationale, its close token included, and the bridge."""
        return rationale_ids + self.bridge_ids


@dataclass(frozen=True)
class Rollout:
    """One sampled rationale z of one prompt, and a sampled answer where an estimator asked for one.

    rationale_ids end with the close token; a template's bridge comes after them and is not part of z. Their first
    `num_sampled` ids were drawn from the policy; what follows (a close token put there by force) carries no
    score-function weight. A Rollout that failed is `valid=False`: it leaves M.
    """

    prompt_slot: int
    rationale_slot: int
    rationale_ids: tuple[int, ...]
    num_sampled: int
    answer_ids: tuple[int, ...] = ()  # sampled, terminator included when it was sampled; empty when none was asked for
    # ln of the sampling distribution over the num_sampled rationale tokens, in nats; None: the engine does not know it
    log_prob: float | None = None
    log_w: float | None = None  # ln p(y*|x,z) in nats, where the engine was given y* to score
    valid: bool = True

    @property
    def forced(self) -> bool:
        return self.num_sampled < len(self.rationale_ids)


@dataclass(frozen=True)
class TrainingSequence:
    """One row for the trainer: prompt, rationale, answer, and which of its tokens are scored.

    rationale_ids reach to the answer: z, its close token, and the template's bridge. Their first `num_sampled` are
    scored. The answer is y* for GARL, PAFT and scoring, the sampled answer for GRPO and RLOO.
    """

    prompt_slot: int
    rationale_slot: int
    prompt_ids: tuple[int, ...]
    rationale_ids: tuple[int, ...]
    num_sampled: int
    answer_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.rationale_ids) + len(self.answer_ids)

    @property
    def prompt(self) -> tuple[int, tuple[int, ...]]:
        """Equal for sequences that can share their prompt's pass."""
        return self.prompt_slot, self.prompt_ids


@dataclass(frozen=True)
class Coefficients:
    """Constants of the surrogate loss -(1/B) sum_b (1/M_b) sum_m [rationale ln p(z|x) + answer ln p(y|x,z)].

    All float64 [B, M], already divided by B and M_b (or K), without gradient. A masked entry is exactly zero.
    kl_weight_BM: beta of the penalty on the KL to a reference, which the loss adds; None without one.
    """

    rationale_BM: torch.Tensor
    answer_BM: torch.Tensor
    kl_weight_BM: torch.Tensor | None = None

    def of_loss(self, scale: float = 1.0) -> "Coefficients":
        """Return what ln p is multiplied by in `scale` times the loss: the one place where the sign changes."""
        kl_weight_BM = None if self.kl_weight_BM is None else self.kl_weight_BM * scale
        return Coefficients(self.rationale_BM * -scale, self.answer_BM * -scale, kl_weight_BM)

    @property
    def weighed_BM(self) -> torch.Tensor:
        """Which sequences have a gradient: those with a coefficient that is not zero. bool [B, M]."""
        weighed_BM = (self.rationale_BM != 0) | (self.answer_BM != 0)
        return weighed_BM if self.kl_weight_BM is None else weighed_BM | (self.kl_weight_BM != 0)

    @property
    def largest(self) -> float:
        """Largest magnitude of a coefficient of ln p; 0 where there is none."""
        return max((t.abs().max().item() for t in (self.rationale_BM, self.answer_BM) if t.numel()), default=0.0)


#: Metrics that two runs of the same computation may differ in: times and memory.
MEASURED = (
    *(f"seconds_{phase}{rank}" for phase in ("rollout", "score", "train") for rank in ("", "_slowest")),
    "peak_memory_bytes",
)


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl. Users read these names, so they stay; None is written as null."""

    step: int
    q: float | None  # None for estimators without one
    loss: float
    log_p_mean: float
    p_mean: float
    effective_reward_max: float
    ess_mean: float
    grad_norm: float
    lr: float
    num_rationales_valid: int
    rationale_tokens_mean: float
    forced_fraction: float
    tokens_trained: int  # of trained rows, without padding; a prompt once for all its rationales where it is shared
    seconds_rollout: float  # of the median rank
    seconds_score: float
    seconds_train: float
    peak_memory_bytes: int
    seconds_rollout_slowest: float = 0.0  # of the slowest rank
    seconds_score_slowest: float = 0.0
    seconds_train_slowest: float = 0.0
    tokens_computed: int = 0  # through the layers in scoring and training, padding included
    tokens_saved: int = 0  # that shared prompts took away from them
    log_prob_mismatch_max: float | None = None  # max |ln p(z|x) rollout - trainer|, nats per sequence
    log_w_mismatch_max: float | None = None  # max |ln w rollout - trainer| in nats, on steps that compare them
    reward_mean: float | None = None  # mean of sampled answers' rewards (exact match, or --reward), where sampled
    kl_reference_mean: float | None = None  # nats a token to the reference, with --grpo-kl-beta; at the first update
    clipped_fraction: float | None = None  # of tokens with an advantage; mean over --grpo-iterations, where several
    expert_balance: float | None = None  # mean over sequences and layers of E·Σ f·P; 1 where experts are used evenly
    eval_exact_match: float | None = None  # share of held-out samples that are the gold answer as it is
    eval_pass_at_k: float | None = None  # --match, --match-rule: held-out prompts that one of --eval-samples solved
    eval_maj_at_k: float | None = None  # and prompts whose majority vote over them is right (the paper's m@16)
    eval_loss: float | None = None  # pretraining: cross-entropy of held-out rows, nats a token
