"""F4: how good a policy is: samples of held-out prompts, judged; in training, and as a command of its own."""

from megatron_jq.evaluate.drawing import Evaluation, answer_matches, evaluate
from megatron_jq.evaluate.judging import Judge

__all__ = ["Evaluation", "Judge", "answer_matches", "evaluate"]
