#!/usr/bin/env python3
"""GARL and PAFT in one file: one process, one optimizer, the paper's two algorithms as they are written there.

    python examples/minimal_loop.py               # GARL, Algorithm 1
    python examples/minimal_loop.py --paft        # PAFT, Algorithm 2

The policy, the engine that samples from it and the functions of megatron_jq/objective are the product's. What differs:

- The product scores first and trains second, since the table of ln w must be complete over all processes before q
  enters. Here one forward pass serves both, and torch's autograd forms the gradient. The product forms it in its head's
  forward pass, micro-batch by micro-batch, and sums it over processes. tests/e2e/test_minimal_loop.py compares the two.
- torch's Adam stands for Megatron-core's optimizer.

What is left out: parallel layouts, micro-batches, shared prompts, rationales that fail (the mask valid_BM), schedules
of q, the experts' loss, --loss-scale, checks for what is not finite, evaluation, checkpoints and metrics. Use it to
learn or to try a loss; use `megatron-jq train` to train.
"""

import argparse
import random
import tempfile
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from megatron_jq import streams
from megatron_jq.architecture import PRESETS
from megatron_jq.config import Config
from megatron_jq.model.build import BuildOptions, build_policies
from megatron_jq.model.policy import Policy
from megatron_jq.model.rows import pack_sequences
from megatron_jq.objective.garl import garl_coefficients
from megatron_jq.objective.paft import paft_coefficients
from megatron_jq.objective.tsallis import log_mean_weight
from megatron_jq.parallel import runtime as processes
from megatron_jq.records import Coefficients, Example, TrainingSequence
from megatron_jq.rollout.engine import SamplingOptions, request_for
from megatron_jq.rollout.megatron import MegatronEngine
from megatron_jq.train.setup import DataSets, prepare_data

B, M = 8, 8  # prompts per step, rationales per prompt
STEPS, LEARNING_RATE, CLIP, SEED = 60, 3e-3, 1.0, 1234


def sample(engine: MegatronEngine, prompts: list[Example], data: DataSets, step: int) -> list[TrainingSequence]:
    """Draw z_m ~ p(.|x) for every prompt, M times, and put the gold answer y* after each."""
    tokenizer = data.tokenizer
    options = SamplingOptions(
        rationale_budget=8, answer_budget=0, temperature=1.0, top_p=1.0,
        close_id=tokenizer.think_close_id, eos_id=tokenizer.eos_id, seed=SEED, step=step,
    )  # fmt: skip
    requests = [request_for(x, b, tuple(range(M)), score=False) for b, x in enumerate(prompts)]
    return [
        TrainingSequence(z.prompt_slot, z.rationale_slot, x.prompt_ids, z.rationale_ids, z.num_sampled, x.answer_ids)
        for z in engine.generate(requests, options)
        for x in [prompts[z.prompt_slot]]
    ]


def log_likelihoods(policy: Policy, sequences: list[TrainingSequence]) -> tuple[Tensor, Tensor]:
    """Return ln p(z_m|x) and ln p(y*|x,z_m), [B, M] float64 in nats, with their gradient. A token that was put there by
    force (the close token at the end of the budget) does not count in ln p(z|x): nobody sampled it.
    """
    rows = pack_sequences(sequences, device=torch.device("cpu"), with_rationale=True)
    scores = policy(rows)
    return scores.log_z_n.view(-1, M), scores.log_w_n.view(-1, M)


def garl(log_w_BM: Tensor, q: float) -> Coefficients:
    """Algorithm 1, eq. 12: c_m = w_m / w̄^q - w̄_¬m^(1-q) before ln p(z_m|x), w_m / w̄^q before ln p(y*|x,z_m)."""
    rationale_BM, answer_BM = garl_coefficients(log_w_BM, q)
    scale = log_w_BM.numel()  # (1/B)(1/M)
    return Coefficients(rationale_BM / scale, answer_BM / scale)


def paft(log_w_BM: Tensor, q: float, generator: torch.Generator) -> Coefficients:
    """Algorithm 2, eq. 14: draw M of the rationales again in proportion to w_m, and weigh each draw by w̄^(1-q)."""
    joint_BM = paft_coefficients(log_w_BM, q, M, generator=generator)
    return Coefficients(joint_BM / log_w_BM.numel(), joint_BM / log_w_BM.numel())  # (1/B)(1/K), K = M


def surrogate_loss(coefficients: Coefficients, log_z_BM: Tensor, log_w_BM: Tensor) -> Tensor:
    """Return the loss whose gradient is the estimator's: -Σ (constant · ln p). The constants carry no gradient."""
    return -(coefficients.rationale_BM * log_z_BM + coefficients.answer_BM * log_w_BM).sum()


def train(steps: int, q: float, use_paft: bool, folder: Path) -> Iterable[float]:
    """Train a tiny policy on the built-in task; yield ln P̂ of every step, a mean over its prompts."""
    runtime = processes.start(
        tensor_model_parallel_size=1, pipeline_model_parallel_size=1, timeout=timedelta(minutes=5), seed=SEED,
        device="cpu",
    )  # fmt: skip
    data = prepare_data(Config(), PRESETS["tiny"], runtime, folder)
    options = BuildOptions(vocab_size=data.tokenizer.vocab_size, seed=SEED)
    [policy] = build_policies(PRESETS["tiny"], options, runtime)
    engine, optimizer = MegatronEngine([policy], runtime), torch.optim.Adam(policy.parameters(), lr=LEARNING_RATE)
    order, generator = random.Random(SEED), torch.Generator().manual_seed(SEED)
    with runtime.native():
        for step in range(steps):
            sequences = sample(engine, order.sample(data.train, B), data, step)  # z_m ~ p(.|x)
            log_z_BM, log_w_BM = log_likelihoods(policy, sequences)  # w_m = p(y*|x,z_m)
            coefficients = paft(log_w_BM, q, generator) if use_paft else garl(log_w_BM, q)
            optimizer.zero_grad()
            surrogate_loss(coefficients, log_z_BM, log_w_BM).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
            optimizer.step()
            yield log_mean_weight(log_w_BM.detach()).mean().item()
    processes.stop()


def main() -> None:
    """Print ln P̂ every five steps: it rises from about -37, where no sampled answer is ever right, towards 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paft", action="store_true", help="PAFT in place of GARL")
    parser.add_argument("--q", type=float, default=0.75, help="0 is RL on expected success, 1 log marginal likelihood")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for step, log_p in enumerate(train(arguments.steps, arguments.q, arguments.paft, Path(folder))):
            if step % 5 == 0 or step == arguments.steps - 1:
                print(f"step {step:3d}   ln P {log_p:7.2f}", flush=True)


if __name__ == "__main__":
    streams.protect()  # output whose reader has gone ends no training
    main()
