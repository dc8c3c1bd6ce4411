"""F4: a run's policy on its held-out examples."""

from dataclasses import replace

from megatron_jq.config import Config
from megatron_jq.evaluate import Evaluation, evaluate
from megatron_jq.evaluate.judging import judge_of
from megatron_jq.evaluate.reward import Reward
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.rollout.engine import RolloutEngine, SamplingOptions
from megatron_jq.seeds import evaluation_seed
from megatron_jq.train.setup import DataSets


def evaluate_policy(
    config: Config,
    data: DataSets,
    runtime: Runtime,
    engine: RolloutEngine,
    sampling: SamplingOptions,
    *,
    reward: Reward | None,
) -> Evaluation:
    """Accuracy on the held-out examples; every rank calls it. sampling: the step's, of which budget and step stay."""
    t = config.training
    options = replace(
        sampling,
        answer_budget=data.answer_budget,
        temperature=t.eval_temperature,
        top_p=t.eval_top_p,
        seed=evaluation_seed(t.seed),
    )
    judge = judge_of(t, data.heldout_format)
    return evaluate(
        engine,
        data.heldout,
        data.tokenizer,
        runtime,
        options,
        num_samples=t.eval_samples,
        judge=judge,
        reward=reward,
    )
