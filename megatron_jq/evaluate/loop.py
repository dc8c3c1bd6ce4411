"""F4: draw an evaluation's samples block by block into its file, so that it can be stopped and resumed."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch.distributed as dist
from tqdm import tqdm

from megatron_jq.data.tokenizers import Tokenizer
from megatron_jq.errors import RunFailure, UserError
from megatron_jq.evaluate.drawing import answer_of, draw, golds_of
from megatron_jq.evaluate.judging import Judge
from megatron_jq.evaluate.reward import Reward
from megatron_jq.evaluate.samples import Sample, SampleFile
from megatron_jq.parallel.runtime import Runtime, raise_on_all_ranks
from megatron_jq.records import Example, Rollout
from megatron_jq.rollout.engine import RolloutEngine, SamplingOptions

#: Rationales a replica draws between two writes, where --rollout-batch-size does not say.
ROWS_A_BLOCK = 256
#: Seconds between progress lines where no terminal shows the bar.
SECONDS_A_LINE = 30.0


def sample_into(
    file: SampleFile | None,
    engine: RolloutEngine,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    runtime: Runtime,
    options: SamplingOptions,
    *,
    num_samples: int,
    judge: Judge,
    reward: Reward | None,
    rows: int | None,
    enter: Callable[[str], None],
) -> None:
    """Draw what the file lacks and write it, whole prompts at a time. file: rank 0's, None elsewhere.

    rows: most rationales a replica decodes at once. enter: told what this process does. UserError on every rank where
    the disk refuses or ln p(y*|x,z) is not finite; what was written stays.
    """
    done = [file.done if file is not None else 0]
    dist.broadcast_object_list(done, src=0)
    block = max(1, (rows or ROWS_A_BLOCK) * runtime.groups.dp.size() // num_samples)
    progress = Progress(done[0], len(examples), num_samples) if file is not None else None
    for first in range(done[0], len(examples), block):
        block_examples = examples[first : first + block]
        enter(f"evaluation, prompts {first} to {first + len(block_examples) - 1}")
        rollouts = draw(engine, block_examples, runtime, options, num_samples=num_samples, first=first, score=True)
        fault, kind = None, UserError
        if file is not None:
            try:
                file.append(samples_of(rollouts, examples, tokenizer, judge, reward))
            except OSError as error:
                fault = (
                    f"--output: samples cannot be written: {error.strerror}; "
                    "fix this and run the same command again to continue"
                )
            except (UserError, RunFailure) as error:
                fault, kind = str(error), type(error)
        raise_on_all_ranks(runtime, fault, kind)
        if progress is not None:
            progress.advance(len(block_examples))
    if progress is not None:
        progress.close()


def samples_of(
    rollouts: Sequence[Rollout],
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    judge: Judge,
    reward: Reward | None = None,
) -> list[Sample]:
    """Rollouts as lines of the file. UserError for one that failed, or whose ln p(y*|x,z) is not finite. RunFailure
    where the user's reward fails.
    """
    samples = []
    for r in rollouts:
        if not r.valid or r.log_w is None or not math.isfinite(r.log_w):
            raise UserError(
                f"prompt {r.prompt_slot}, sample {r.rationale_slot}: ln p(y*|x,z) is {r.log_w}; the weights "
                "are damaged, or --bf16 is too coarse for them"
            )
        example = examples[r.prompt_slot]
        golds = golds_of(example, tokenizer)
        value = None if reward is None else reward.of(r, example, golds, tokenizer)
        answer = replace(answer_of(r.answer_ids, tokenizer), reward=value)
        samples.append(
            Sample(
                prompt=r.prompt_slot,
                row=example.index,
                sample=r.rationale_slot,
                rationale=tokenizer.decode(list(r.rationale_ids[: r.num_sampled])),
                rationale_ids=r.rationale_ids,
                forced=r.forced,
                answer=answer.text,
                answer_ids=r.answer_ids,
                ended=answer.ended,
                golds=golds,
                log_w=r.log_w,
                matched=judge.is_right(answer, golds),
                reward=value,
            )
        )
    return samples


class Progress:
    """A bar over samples with rate and time left on a terminal; elsewhere a line now and then."""

    def __init__(self, done: int, prompts: int, num_samples: int):
        self._done, self._prompts, self._num_samples = done, prompts, num_samples
        self._first, self._began = done, time.monotonic()
        self._said = self._began
        total = prompts * num_samples
        self._bar = tqdm(total=total, initial=done * num_samples, unit="sample", dynamic_ncols=True, disable=None)
        if done:
            tqdm.write(f"{done} of {prompts} prompts are done already")

    def advance(self, prompts: int) -> None:
        self._done += prompts
        self._bar.update(prompts * self._num_samples)
        now = time.monotonic()
        if self._bar.disable and now - self._said >= SECONDS_A_LINE:
            self._said = now
            rate = (self._done - self._first) / (now - self._began)
            left = int((self._prompts - self._done) / rate)
            print(
                f"{self._done}/{self._prompts} prompts | {rate * self._num_samples:.1f} samples/s | "
                f"ETA {left // 60}:{left % 60:02d}",
                flush=True,
            )

    def close(self) -> None:
        self._bar.close()
