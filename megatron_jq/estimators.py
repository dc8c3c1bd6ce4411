"""F1: the table of estimators. Whatever depends on an estimator asks its row; no other file tests a name. No torch.

How to add one: docs/extending.md. What every row promises: tests/unit/test_estimator_conformance.py.
"""

import enum
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from megatron_jq.errors import UserError


class Needs(enum.Flag):
    """What a step must bring for an estimator, besides knowing which rationales are valid."""

    GOLD_SCORE = enum.auto()  # log_w_BM: a rationale is drawn, and ln p(y*|x,z) computed
    REWARD = enum.auto()  # reward_BM: a rationale and an answer are drawn, the answer judged, and that one trained on
    GIVEN_RATIONALE = enum.auto()  # the data's own rationale; nothing is drawn
    CORPUS_ROW = enum.auto()  # a row of --data-path; nothing is drawn, and there is no prompt


#: Need → the field of objective.table.StepTable that it fills.
FIELDS = {Needs.GOLD_SCORE: "log_w_BM", Needs.REWARD: "reward_BM"}
_WORDS = {
    Needs.GOLD_SCORE: "ln p of the gold answer",
    Needs.REWARD: "a sampled answer and its reward",
    Needs.GIVEN_RATIONALE: "a given rationale",
    Needs.CORPUS_ROW: "a row of --data-path",
}
#: What a step can bring together: drawn rationales with one or both of their figures, or one thing that is given.
_TOGETHER = (
    Needs.GOLD_SCORE,
    Needs.REWARD,
    Needs.GOLD_SCORE | Needs.REWARD,
    Needs.GIVEN_RATIONALE,
    Needs.CORPUS_ROW,
)

_UPDATES = ("grpo_iterations", "grpo_clamp_eps_lower", "grpo_clamp_eps_upper", "grpo_kl_beta")
_CORPUS = ("data_path", "split", "seq_length", "eod_mask_loss", "reset_attention_mask", "data_cache_path")
_DRAWN = ("rollout_engine", "temperature", "top_p", "score_with", "score_check_interval", "score_mismatch_alarm")
_PROMPTED = (
    "rationale_budget", "answer_budget", "max_prompt_tokens", "overlong_prompts", "prompt_field", "answer_field",
    "id_field", "data_format", "finqa_answer", "bad_records", "prompt_style", "prompt_template", "train_examples",
    "tokenizer_vocab_size", "match", "match_rule", "answer_extract", "eval_temperature", "eval_top_p", "eval_samples",
    "train_data", "eval_data", "rollout_batch_size", "share_prompts", "sample_interval", "add_bos_token", "chat_date",
    "think_open", "think_close",
)  # fmt: skip

#: What a function may read as knobs.NAME that is no setting of [objective].
GENERATOR = "generator"
#: Settings that follow from a knob. The others stand for themselves.
_OF_KNOB = {"q": ("q", "q_schedule", "q_final", "q_schedule_iters"), GENERATOR: ()}
#: Settings that make no sense with an estimator that does not read them: refused there. Others may stay in a file that
#: serves several estimators.
REFUSED_ELSEWHERE = frozenset(("num_resamples", *_UPDATES, *_CORPUS))


@dataclass(frozen=True, kw_only=True)
class EstimatorRow:
    """One estimator.

    function, "MODULE:FUNCTION": f(table: StepTable, knobs: Knobs) → (rationale_BM, answer_BM), the constants of
    ln p(z|x) and ln p(y|x,z) before any denominator, float64 [B, M], without gradient, 0 where a rationale is not
    valid. The answer y is the sampled one under Needs.REWARD, else the data's y*.
    """

    name: str
    description: str  # a line, for --help and the documents
    needs: Needs
    minimum_rationales: int  # fewest valid rationales with which a prompt has anything to train on
    function: str
    reads: tuple[str, ...] = ()  # what the function reads of its knobs: settings of [objective], generator
    settings: tuple[str, ...] = ()  # what the step reads besides, for this estimator
    aliases: tuple[tuple[str, float], ...] = ()  # published names that are this estimator at one q
    binary_rewards: bool = False  # whether a reward other than 0 and 1 has no meaning
    effective_reward: str | None = None  # "MODULE:FUNCTION" of the figure, f(table, knobs) → [B]; None: from function's

    @property
    def samples_answers(self) -> bool:
        """Whether the trained answer is a sampled one with a reward, not the gold one."""
        return Needs.REWARD in self.needs

    @property
    def imitates(self) -> bool:
        """Whether the rationale is given (or there is none to give): nothing is drawn, and no ln w is asked for."""
        return not self.needs & (Needs.GOLD_SCORE | Needs.REWARD)

    @property
    def pretrains(self) -> bool:
        """Whether it predicts the tokens of --data-path's rows, which have neither prompt nor rationale."""
        return Needs.CORPUS_ROW in self.needs

    @property
    def reads_rationales(self) -> bool:
        """Whether examples must bring a rationale."""
        return Needs.GIVEN_RATIONALE in self.needs

    @property
    def uses_q(self) -> bool:
        return "q" in self.reads

    @property
    def resamples(self) -> bool:
        """Whether the function draws num_resamples of the rationales: the loss's inner mean is then over these."""
        return "num_resamples" in self.reads

    @property
    def fields(self) -> tuple[str, ...]:
        """Of the step's table, those that the function may read besides valid_BM."""
        return tuple(field for need, field in FIELDS.items() if need in self.needs)

    @property
    def all_settings(self) -> tuple[str, ...]:
        """Settings that this estimator reads and some other does not."""
        names = [setting for knob in self.reads for setting in _OF_KNOB.get(knob, (knob,))]
        names += [*self.settings, *(() if self.imitates else _DRAWN)]
        names += ["rationale_field"] * self.reads_rationales
        return tuple(dict.fromkeys([*names, *(_CORPUS if self.pretrains else _PROMPTED)]))


_AT = "megatron_jq.objective.estimators"
ROWS = (
    EstimatorRow(
        name="garl",
        description="gradient-amplified RL: all rationales, weighed by w / w̄^q against a leave-one-out baseline",
        needs=Needs.GOLD_SCORE,
        minimum_rationales=2,
        function=f"{_AT}:garl",
        reads=("q", "normalize"),
        aliases=(("rb-rloo", 0.0), ("verifree", 0.0), ("iwae", 1.0)),
        effective_reward=f"{_AT}:garl_effective_reward",
    ),
    EstimatorRow(
        name="paft",
        description="posterior-attenuated fine-tuning: rationales drawn again by w, weighed by w̄^(1-q)",
        needs=Needs.GOLD_SCORE,
        minimum_rationales=1,
        function=f"{_AT}:paft",
        reads=("q", "normalize", "num_resamples", GENERATOR),
        aliases=(("trice", 1.0),),
    ),
    EstimatorRow(
        name="grpo",
        description="reward less the group's mean, by its standard deviation; clipping and a KL by --grpo-…",
        needs=Needs.REWARD,
        minimum_rationales=2,
        function=f"{_AT}:grpo",
        settings=_UPDATES,
    ),
    EstimatorRow(
        name="rloo",
        description="reward less the mean of the others",
        needs=Needs.REWARD,
        minimum_rationales=2,
        function=f"{_AT}:rloo",
    ),
    EstimatorRow(
        name="maxrl",
        description="reward by the group's mean, less 1",
        needs=Needs.REWARD,
        minimum_rationales=2,
        function=f"{_AT}:maxrl",
        binary_rewards=True,
    ),
    EstimatorRow(
        name="star",
        description="imitates the rationales whose sampled answer is right",
        needs=Needs.REWARD,
        minimum_rationales=1,
        function=f"{_AT}:star",
        binary_rewards=True,
    ),
    EstimatorRow(
        name="sft",
        description="imitates given rationales and answers",
        needs=Needs.GIVEN_RATIONALE,
        minimum_rationales=1,
        function=f"{_AT}:imitation",
    ),
    EstimatorRow(
        name="pretrain",
        description="predicts the next tokens of --data-path",
        needs=Needs.CORPUS_ROW,
        minimum_rationales=1,
        function=f"{_AT}:imitation",
    ),
    # A new estimator's row: docs/extending.md.
)

DEFAULT = "garl"
ESTIMATORS: dict[str, EstimatorRow] = {row.name: row for row in ROWS}
#: Published methods that are an estimator at one q: --estimator's name → (estimator, q).
ALIASES: dict[str, tuple[str, float]] = {alias: (row.name, q) for row in ROWS for alias, q in row.aliases}
#: Everything that --estimator takes.
NAMES = (*ESTIMATORS, *ALIASES)


def row_of(name: str) -> EstimatorRow:
    """Return the row of an estimator, or of what an alias stands for."""
    return ESTIMATORS[ALIASES[name][0] if name in ALIASES else name]


def names_of(rows: Iterable[EstimatorRow]) -> str:
    """ "grpo, rloo or star"."""
    names = [row.name for row in rows]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def words_of(needs: Needs) -> str:
    """ "ln p of the gold answer, a sampled answer and its reward"."""
    return ", ".join(words for need, words in _WORDS.items() if need in needs)


def row_problems(row: EstimatorRow) -> list[str]:
    """A line for each thing that is wrong with a row of the table itself, before anything is imported."""
    at, problems = f"megatron_jq/estimators.py, row {row.name}", []
    if NAMES.count(row.name) > 1 or any(NAMES.count(alias) > 1 for alias, _ in row.aliases):
        problems.append(f"{at}: its name or an alias stands in the table twice; give it another")
    if row.needs not in _TOGETHER:
        needs = words_of(row.needs) or "nothing"
        problems.append(
            f"{at}: needs says {needs}, and no step brings that; choose one of {'; '.join(map(words_of, _TOGETHER))}"
        )
    if row.minimum_rationales < 1 or (row.imitates and row.minimum_rationales > 1):
        problems.append(f"{at}: minimum_rationales {row.minimum_rationales} is not possible; write 1")
    if row.aliases and not row.uses_q:
        problems.append(f'{at}: aliases stand for a q, which needs "q" in reads')
    if row.binary_rewards and not row.samples_answers:
        problems.append(f"{at}: binary_rewards needs Needs.REWARD")
    return problems


@functools.cache
def resolve(row: EstimatorRow, text: str) -> Callable[..., Any]:
    """Import "MODULE:FUNCTION" of a row. UserError: no such thing, or none that takes (table, knobs)."""
    at = f"megatron_jq/estimators.py, row {row.name}: {text}"
    module_name, colon, attribute = text.partition(":")
    if not (module_name and colon and attribute):
        raise UserError(f"{at}: write MODULE:FUNCTION, such as {_AT}:garl")
    try:
        function = getattr(importlib.import_module(module_name), attribute, None)
    except ImportError as error:
        raise UserError(f"{at}: the module cannot be imported ({error})") from error
    if not callable(function):
        raise UserError(f"{at}: module {module_name} has no function {attribute}")
    try:
        inspect.signature(function).bind("table", "knobs")
    except TypeError as error:
        raise UserError(f"{at}: {error}; it is called as {attribute}(table, knobs)") from error
    return function


def help_text() -> str:
    """What --help says of --estimator."""
    aliases = [f"{alias}: {name} at q = {q:g}" for alias, (name, q) in ALIASES.items()]
    return "\n".join([*(f"{row.name}: {row.description}" for row in ROWS), *aliases])


def markdown_table() -> str:
    """The table of docs/baselines.md."""
    lines = ["| `--estimator` | what it does | needs | least M | reads |", "|---|---|---|--:|---|"]
    for row in ROWS:
        names = ", ".join([f"`{row.name}`", *(f"`{alias}` (q = {q:g})" for alias, q in row.aliases)])
        reads = [f"`--{name.replace('_', '-')}`" for name in (*row.reads, *row.settings) if name != GENERATOR]
        cells = (names, row.description, words_of(row.needs), str(row.minimum_rationales), ", ".join(reads))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
