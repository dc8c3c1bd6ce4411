"""F4: what a run leaves behind and shows: metrics.jsonl, TensorBoard, the progress line, samples. Rank 0 only."""

import json
import math
import os
import time
from dataclasses import asdict
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from megatron_jq.config import Config
from megatron_jq.errors import RunFailure
from megatron_jq.model.build import BuildOptions, kernels
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.records import StepMetrics
from megatron_jq.train.estimators import Estimator
from megatron_jq.train.setup import DataSets


class Recorder:
    """Appends one JSON object a step, flushed and whole; draws the progress line with rate and ETA.

    first_step, metrics_bytes: where a run that is taken up again goes on; what it wrote behind that is dropped, as its
    steps are done anew.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        total_steps: int,
        log_interval: int,
        tensorboard: bool,
        first_step: int = 0,
        metrics_bytes: int = 0,
    ):
        self._file = open(run_dir / "metrics.jsonl", "ab")
        if self._file.tell() > metrics_bytes:
            self._file.truncate(metrics_bytes)
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step) if tensorboard else None
        self._total, self._interval = total_steps, log_interval
        self.fault: str | None = None  # why a line is not on record; the run must end
        # silent when not a terminal
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=None)
        self._began, self._steps = time.monotonic(), 0

    def record(self, metrics: StepMetrics) -> None:
        line = finite_values(metrics)
        try:
            self._file.write((json.dumps(line) + "\n").encode())
            self._file.flush()
        except OSError as fault:
            self.fault = f"metrics.jsonl could not be written: {fault.strerror}"
            return
        if self._writer is not None:
            for key, value in line.items():
                if key != "step" and value is not None:
                    self._writer.add_scalar(key, value, metrics.step)
        self._steps += 1
        self._bar.update(1)
        if self._steps % self._interval == 0 or metrics.step + 1 == self._total:
            self.say(self._progress(metrics))

    def written(self) -> int:
        """Bytes of metrics.jsonl, which are on disk from now on. RunFailure where they cannot be."""
        try:
            os.fsync(self._file.fileno())
        except OSError as fault:
            raise RunFailure(f"metrics.jsonl could not be written: {fault.strerror}") from fault
        return self._file.tell()

    def _progress(self, m: StepMetrics) -> str:
        seconds = m.seconds_rollout + m.seconds_score + m.seconds_train
        left = (self._total - m.step - 1) * (time.monotonic() - self._began) / self._steps
        estimates = [f"ln P {m.log_p_mean:.2f}", f"P {m.p_mean:.2e}", f"reward max {m.effective_reward_max:.2e}"]
        if m.q is None and m.reward_mean is None:  # nothing was drawn: the loss is a plain cross-entropy
            estimates = [f"loss {m.loss:.3f}"]
        parts = [
            f"step {m.step + 1}/{self._total}",
            *estimates,
            f"grad norm {m.grad_norm:.2e}",
            f"{m.tokens_trained / max(seconds, 1e-9):.0f} tokens/s",
            f"ETA {int(left) // 60}:{int(left) % 60:02d}",
        ]
        if m.reward_mean is not None:
            parts.insert(3, f"exact {m.reward_mean:.3f}")
        if m.eval_exact_match is not None:
            parts.append(f"held-out exact match {m.eval_exact_match:.3f}")
        if m.eval_loss is not None:
            parts.append(f"held-out loss {m.eval_loss:.3f}")
        return " | ".join(parts)

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        tqdm.write(text)

    def sample(
        self, step: int, *, prompt: str, rationale: str, forced: bool, gold: str, answer: str, log_w: float
    ) -> None:
        """Show one rationale and what followed it, and keep it as TensorBoard text."""
        close = " [closed by force]" if forced else ""
        text = f"prompt: {prompt}\nrationale: {rationale}{close}\nanswer: {answer}\ngold: {gold}  (ln w {log_w:.2f})"
        self.say("  " + text.replace("\n", "\n  "))
        if self._writer is not None:
            self._writer.add_text("sample", text.replace("\n", "  \n"), step)

    def close(self) -> None:
        self._bar.close()
        if self.fault is None:
            self._file.close()  # which writes what is left, and would fail again
        if self._writer is not None:
            self._writer.close()


def finite_values(metrics: StepMetrics) -> dict[str, float | None]:
    """A line of metrics.jsonl. JSON has no NaN: a value without meaning is null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(metrics).items()}


def opening_line(
    config: Config,
    data: DataSets,
    estimator: Estimator,
    options: BuildOptions,
    runtime: Runtime,
    *,
    with_experts: bool,
) -> str:
    """What is about to run, on what, and where its results go."""
    o, r, g = config.objective, config.rollout, runtime.groups
    dropped = f", {data.dropped} overlong examples dropped" if data.dropped else ""
    expert = f" EP {g.collection.ep.size()}" if with_experts else ""
    batch = f"{r.prompts_per_step} prompts x {r.num_rationales} rationales a step"
    if estimator.imitates:
        of = f"rows of {estimator.row_tokens} tokens" if o.estimator == "pretrain" else "given rationales"
        batch = f"{r.prompts_per_step} {of} a step"
    parts = [
        f"{o.estimator} q={o.q:g}" if estimator.uses_q else o.estimator,
        f"{len(data.train)} training and {len(data.heldout)} held-out examples{dropped}",
        batch,
        f"TP {g.tp.size()} PP {g.pp.size()} DP {g.dp.size()}{expert} on {runtime.device.type}, "
        f"{kernels(options, runtime)}",
        config.training.run_dir,
    ]
    return " | ".join(parts)
