"""F4: what a run leaves and shows: metrics.jsonl, TensorBoard, the progress line, samples. Rank 0 only."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from megatron_jq.config import Config
from megatron_jq.config_estimators import schedule_notes
from megatron_jq.config_reads import unread_note
from megatron_jq.config_validate import resolve_architecture
from megatron_jq.data.reading import number_of
from megatron_jq.data.tokenizers import Tokenizer
from megatron_jq.errors import RunFailure
from megatron_jq.files import reason, sync
from megatron_jq.model.build import kernels
from megatron_jq.objective.table import StepTable
from megatron_jq.parallel.megatron import versions
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.records import Example, Rollout, StepMetrics
from megatron_jq.train.build import Parts
from megatron_jq.train.estimators import Estimator
from megatron_jq.train.run_directory import METRICS, TENSORBOARD
from megatron_jq.train.setup import DataSets
from megatron_jq.train.start_point import StartPoint


class Recorder:
    """Appends one JSON object a step, flushed and whole; draws the progress line with rate and ETA.

    first_step, metrics_bytes: where a resumed run continues; what it wrote after that is dropped, as its
    steps are done again. RunFailure where a file cannot be opened or written to.
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
        path, self._writer = run_dir / METRICS, None
        with _or_failure(f"--run-dir {run_dir}: {METRICS}"):
            warning = _cut_back(path, metrics_bytes)
            self._file = open(path, "ab")
            sync(run_dir)
        if tensorboard:
            with _or_failure(f"--run-dir {run_dir}: {TENSORBOARD}"):
                self._writer = SummaryWriter(str(run_dir / TENSORBOARD), purge_step=first_step)
        self._total, self._interval = total_steps, log_interval
        self.fault: str | None = None  # why a line is not on record; the run must end
        # silent when not a terminal
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=None)
        self._began, self._steps = time.monotonic(), 0
        if warning is not None:
            self.log(warning)

    def record(self, metrics: StepMetrics) -> None:
        """A step's line. Where it cannot be kept, `fault` says why."""
        line = finite_values(metrics)
        with self._noting_fault(METRICS):
            self._file.write((json.dumps(line) + "\n").encode())
            self._file.flush()
        if self.fault is not None:
            return
        if self._writer is not None:
            with self._noting_fault(TENSORBOARD):
                for key, value in line.items():
                    if key != "step" and value is not None:
                        self._writer.add_scalar(key, value, metrics.step)
        self._steps += 1
        with contextlib.suppress(OSError):  # a terminal that is gone
            self._bar.update(1)
        if self._steps % self._interval == 0 or metrics.step + 1 == self._total:
            self.log(self._progress(metrics))

    def written(self) -> int:
        """Bytes of metrics.jsonl, which are on disk from now on, and so are TensorBoard's events. RunFailure where they
        cannot be.
        """
        if self._writer is not None:
            with _or_failure(TENSORBOARD):
                self._writer.flush()  # a run that is killed later continues from here, without a gap
        with _or_failure(METRICS):
            os.fsync(self._file.fileno())
        return self._file.tell()

    @contextlib.contextmanager
    def _noting_fault(self, what: str) -> Iterator[None]:
        """The first one counts: others follow from it."""
        try:
            yield
        except OSError as fault:
            self.fault = self.fault or f"{what} could not be written: {reason(fault)}"

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
            f"ETA {_clock(left)}",
        ]
        if m.reward_mean is not None:
            parts.insert(3, f"reward {m.reward_mean:.3f}")
        if m.eval_exact_match is not None:
            parts.append(f"held-out exact match {m.eval_exact_match:.3f}")
        if m.eval_loss is not None:
            parts.append(f"held-out loss {m.eval_loss:.3f}")
        return " | ".join(parts)

    def log(self, text: str) -> None:
        """A line above the progress bar, at once also where standard output is a file. A run does not end because
        nobody can read it.
        """
        with contextlib.suppress(OSError):
            tqdm.write(text)
            sys.stdout.flush()

    def show_sample(
        self, step: int, prompts: Sequence[Example], rollout: Rollout, table: StepTable, tokenizer: Tokenizer
    ) -> None:
        """Show one rationale and what followed it, and keep it as TensorBoard text."""
        example = prompts[rollout.prompt_slot]
        rationale = tokenizer.decode(list(rollout.rationale_ids[: rollout.num_sampled]))
        answer = tokenizer.decode(list(rollout.answer_ids)) if rollout.answer_ids else "(none sampled)"
        assert table.log_w_BM is not None, "a scoring or training pass computes it"
        log_w = table.log_w_BM[rollout.prompt_slot, rollout.rationale_slot].item()
        close = " [closed by force]" if rollout.forced else ""
        text = (
            f"prompt: {example.prompt_text}\nrationale: {rationale}{close}\nanswer: {answer}\n"
            f"gold: {example.answer_text}  (ln w {log_w:.2f})"
        )
        self.log("  " + text.replace("\n", "\n  "))
        if self._writer is not None:
            with self._noting_fault(TENSORBOARD):
                self._writer.add_text("sample", text.replace("\n", "  \n"), step)

    def close(self) -> None:
        """The end, also of a run that stops for a reason of its own: that one is told, so a fault here is a warning."""
        before = self.fault
        with contextlib.suppress(OSError):
            self._bar.close()
        with self._noting_fault(METRICS):
            self._file.close()
        if self._writer is not None:
            with self._noting_fault(TENSORBOARD):
                self._writer.close()
        if self.fault != before:
            self.log(f"warning: at the run's end {self.fault}")


@dataclass
class Log:
    """Where a run's lines for the user go: to the recorder, while rank 0 has one; elsewhere nowhere."""

    recorder: Recorder | None = None

    def __call__(self, text: str) -> None:
        if self.recorder is not None:
            self.recorder.log(text)


def open_recorder(
    start: StartPoint, config: Config, data: DataSets, estimator: Estimator, parts: Parts, runtime: Runtime
) -> Recorder:
    """Open a run's recorder and show where it starts, what is about to run, and what the user should know of it."""
    t = config.training
    recorder = Recorder(
        Path(t.run_dir),
        total_steps=t.train_iters,
        log_interval=t.log_interval,
        tensorboard=t.tensorboard,
        first_step=start.step,
        metrics_bytes=start.metrics_bytes,
    )
    recorder.log(start.described(t.seed, t.train_iters))
    recorder.log(opening_line(config, data, estimator, parts, runtime))
    unread = unread_note("train", config, resolve_architecture(config))
    for note in (unread, *schedule_notes(config), versions.deprecation_note()):
        if note is not None:
            recorder.log(note)
    return recorder


@contextlib.contextmanager
def _or_failure(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as fault:
        raise RunFailure(
            f"{what} could not be written: {reason(fault)}; fix this and start again with --resume"
        ) from fault


def _cut_back(path: Path, length: int) -> str | None:
    """Drop what stands after the first `length` bytes: steps that are done again. What to tell where some are missing.

    OSError where that cannot be done.
    """
    size = path.stat().st_size if path.exists() else 0
    if size >= length:
        if size > length:
            os.truncate(path, length)
        return None
    complete = path.read_bytes().rfind(b"\n") + 1 if size else 0
    if size > complete:
        os.truncate(path, complete)  # or the next line would be appended to a torn one
    return f"warning: {path} lacks steps that it held when the checkpoint was written; the run goes on without them"


def _clock(seconds: float) -> str:
    """1:05, or 3:00:05."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def finite_values(metrics: StepMetrics) -> dict[str, float | None]:
    """A line of metrics.jsonl. JSON has no NaN: a value without meaning is null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(metrics).items()}


def opening_line(config: Config, data: DataSets, estimator: Estimator, parts: Parts, runtime: Runtime) -> str:
    """What is about to run, on what, and where its results go."""
    o, r, g = config.objective, config.rollout, runtime.groups
    dropped = f", {data.dropped} overlong examples dropped" if data.dropped else ""
    expert = f" EP {g.collection.ep.size()}" if parts.model.config.num_moe_experts is not None else ""
    batch = f"{r.prompts_per_step} prompts x {r.num_rationales} rationales a step"
    if estimator.imitates:
        of = f"rows of {estimator.row_tokens} tokens" if estimator.row.pretrains else "given rationales"
        batch = f"{r.prompts_per_step} {of} a step"
    facts = [
        f"{o.estimator} q={o.q:g}" if estimator.uses_q else o.estimator,
        f"{len(data.train)} training and {number_of(len(data.heldout), data.heldout_total)} held-out examples{dropped}",
        batch,
        f"TP {g.tp.size()} PP {g.pp.size()} DP {g.dp.size()}{expert} on {runtime.device.type}, "
        f"{kernels(parts.options, runtime)}",
        f"tokenizer {data.tokenizer_path}",
        config.training.run_dir,
    ]
    return " | ".join(facts)
