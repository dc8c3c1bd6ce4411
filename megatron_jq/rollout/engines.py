"""F3: the table of rollout engines. Each is one class and one row here; docs/extending.md shows how to add one."""

import importlib
from dataclasses import dataclass

from megatron_jq.config import Config
from megatron_jq.errors import UserError
from megatron_jq.estimators import row_of
from megatron_jq.rollout.engine import Capabilities, EngineSetup, RolloutEngine


@dataclass(frozen=True, kw_only=True)
class EngineRow:
    """One engine. name: what --rollout-engine takes.

    build, "MODULE:NAME": a class or function that takes an EngineSetup and returns a RolloutEngine. It raises
    UserError, which names the flag, where the settings ask for what the engine cannot do.
    """

    name: str
    description: str
    build: str
    capabilities: Capabilities

    def __post_init__(self) -> None:
        c = self.capabilities
        assert c.every_rank or not c.shares_weights, f"{self.name}: one rank alone does not hold the shared weights"

    def load(self, setup: EngineSetup) -> RolloutEngine:
        """Build the engine. UserError where it lacks a part of the protocol, before it is asked for anything."""
        module, _, name = self.build.partition(":")
        engine = getattr(importlib.import_module(module), name)(setup)
        lacking = [part for part in ("version", "update_weights", "generate", "close") if not hasattr(engine, part)]
        if lacking:
            raise UserError(
                f"--rollout-engine {self.name}: {self.build} lacks {', '.join(lacking)}, which every engine has "
                "(docs/extending.md)"
            )
        return engine


ENGINES = {
    row.name: row
    for row in (
        EngineRow(
            name="megatron",
            description="draws inside the training processes, with the weights that train",
            build="megatron_jq.rollout.megatron:megatron_engine",
            capabilities=Capabilities(
                draws=True,
                scores_gold=True,
                samples_answers=True,
                gives_log_prob=True,
                shares_weights=True,
                every_rank=True,
            ),
        ),
        EngineRow(
            name="given",
            description="hands out the data's own rationales, for the estimators that imitate them",
            build="megatron_jq.rollout.given:GivenRationales",
            capabilities=Capabilities(
                draws=False,
                scores_gold=False,
                samples_answers=False,
                gives_log_prob=False,
                shares_weights=True,
                every_rank=True,
            ),
        ),
    )
}


def engine_row(config: Config) -> EngineRow:
    """Return the row that this run draws with: --rollout-engine's, or the data's own rationales under an estimator that
    imitates. UserError where there is no such engine, or it lacks what the run needs of it.
    """
    estimator = row_of(config.objective.estimator)
    if estimator.imitates:
        return ENGINES["given"]
    r = config.rollout
    drawing = [name for name, row in ENGINES.items() if row.capabilities.draws]
    if r.rollout_engine not in drawing:
        raise UserError(f"--rollout-engine {r.rollout_engine}: there is no such engine; choose {' or '.join(drawing)}")
    row = ENGINES[r.rollout_engine]
    if estimator.samples_answers and not row.capabilities.samples_answers:
        raise UserError(
            f"--rollout-engine {row.name} samples no answers, which --estimator {estimator.name} trains on; "
            "take another engine, or an estimator that scores the gold answer"
        )
    if r.score_with == "rollout" and not row.capabilities.scores_gold:
        raise UserError(
            f"--score-with rollout: --rollout-engine {row.name} does not score the gold answer; "
            "use --score-with trainer"
        )
    return row
