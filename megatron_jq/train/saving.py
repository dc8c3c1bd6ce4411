"""F4: what joins a run to its checkpoints: loading the one it begins from, and saving between steps."""

import time
from dataclasses import asdict
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_jq.checkpoint.folder import Manifest, package_versions
from megatron_jq.checkpoint.lineage import Branches
from megatron_jq.checkpoint.loader import (
    Checkpoint,
    check_architecture,
    load_optimizer,
    load_random_states,
    load_weights,
    take_main_weights,
)
from megatron_jq.checkpoint.writer import CheckpointWriter, Retention
from megatron_jq.config import Config, settings_of_text, to_toml
from megatron_jq.config_validate import Derived
from megatron_jq.data.reasoning_gym import package_of
from megatron_jq.errors import RunFailure, UserError
from megatron_jq.parallel.runtime import Runtime, on_all_ranks, raise_on_all_ranks
from megatron_jq.records import StepMetrics
from megatron_jq.train.build import Parts
from megatron_jq.train.numerics import Numerics
from megatron_jq.train.recorder import Recorder, finite_values
from megatron_jq.train.resume_rules import Rule, changed
from megatron_jq.train.run_directory import RunFolders
from megatron_jq.train.setup import DataSets
from megatron_jq.train.start_point import StartPoint
from megatron_jq.train.stopping import StopRequest, signal_name


class Saving:
    """One run's checkpoints. Every method is called on all ranks alike; the constructor makes a process group."""

    def __init__(
        self,
        config: Config,
        derived: Derived,
        data: DataSets,
        runtime: Runtime,
        parts: Parts,
        numerics: Numerics,
        deadline: timedelta,
        began: float,
        folders: RunFolders,
    ):
        """began: time.monotonic() at the process's start, for --exit-duration-in-mins. folders: rank 0's are open, the
        others' are not used.
        """
        self._config, self._derived, self._runtime = config, derived, runtime
        self._model, self._optimizer, self._numerics = parts.model, parts.optimizer, numerics
        self._vocab_size = parts.options.vocab_size
        self._data, self._answer_budget = data.fingerprint, data.answer_budget
        self._tokenizer = data.tokenizer.fingerprint()
        self._began, self._saved_at = began, time.monotonic()
        c, self._folders, self._folder = config.checkpoint, folders, folders.save
        self._branches: Branches | None = None  # rank 0's
        self.writer = CheckpointWriter(
            self._folder,
            runtime,
            deadline,
            retention=Retention(c.keep_last, c.keep_best),
            asynchronous=c.async_save,
            tokenizer=data.tokenizer_path,
        )

    def load(self, start: StartPoint) -> None:
        """Take weights, and unless weights_only all else, from the checkpoint to begin from, if there is one.

        UserError on every rank where it does not fit this run.
        """
        checkpoint = start.checkpoint
        if self._runtime.is_main:
            self._branches = self._folders.branches(checkpoint.manifest if start.resumed and checkpoint else None)
        if checkpoint is None:
            return
        check_architecture(checkpoint, self._derived.architecture, self._vocab_size)
        if not start.weights_only:
            self._check_run(checkpoint)
        if start.resumed:
            self._check_resumed(checkpoint)
        load_weights(checkpoint, self._model.policies, self._runtime)
        if start.weights_only:
            take_main_weights(checkpoint, self._model.policies, self._optimizer, self._runtime)
        else:
            load_optimizer(checkpoint, self._model.policies, self._optimizer, self._runtime)
            self._numerics.load(start)
            load_random_states(checkpoint, self._runtime, self._layout())

    def _check_run(self, checkpoint: Checkpoint) -> None:
        saved, optimizer = checkpoint.manifest, self._config.optimizer.optimizer
        remedy = "or begin a new run from its weights with --load and --finetune"
        if saved.data != self._data:
            flag = "--train-data"
            if self._config.objective.row.pretrains:
                flag = "--data-path (and --train-iters, where files are read more than once)"
            before = (
                None if saved.config is None else settings_of_text(saved.config, f"{checkpoint.folder}: its settings")
            )
            changes = [] if before is None else changed(before, self._config, Rule.SAME_DATA)
            changes += changed_packages(saved, self._config.data.train_data)
            changes += self._changed_markers(before)
            because = f" ({'; '.join(changes)})" if changes else ""
            raise UserError(
                f"{checkpoint.folder} was trained on other data than {flag} gives now{because}; restore it, {remedy}"
            )
        if saved.optimizer is not None and saved.optimizer["name"] != optimizer:
            raise UserError(
                f"{checkpoint.folder} was trained with --optimizer {saved.optimizer['name']}, not {optimizer}; "
                f"keep that, {remedy}"
            )

    def _changed_markers(self, before: Config | None) -> list[str]:
        """Lines as resume_rules.changed's. A checkpoint from before the settings has no names to compare."""
        if before is None or before.data.think_close is None:
            return []
        return changed(before, self._config, Rule.SAME_TOKENS, ("think_open", "think_close"))

    def _check_resumed(self, checkpoint: Checkpoint) -> None:
        """What a resumed run may name otherwise, but not change: tokenizer, answer budget, the experts' loss."""
        saved, faults = checkpoint.manifest, []
        before = None if saved.config is None else settings_of_text(saved.config, f"{checkpoint.folder}: its settings")
        if saved.tokenizer is not None and saved.tokenizer != self._tokenizer:
            faults += self._changed_markers(before) or ["--tokenizer-model is another tokenizer"]
        elif saved.tokenizer is None and before is not None:  # older than fingerprints: by name
            faults += changed(before, self._config, Rule.SAME_TOKENS)
        budget = saved.answer_budget
        if budget is None and before is not None:
            budget = before.rollout.answer_budget
        if self._derived.samples_answers and budget not in (None, self._answer_budget):
            faults.append(
                f"sampled answers could take {budget} tokens and now {self._answer_budget} (the longest gold answer, "
                f"held-out ones included): give --answer-budget {budget}"
            )
        coefficient = saved.architecture.get("moe_aux_loss_coeff")
        if self._derived.architecture.moe_aux_loss_coeff != coefficient:
            now = self._derived.architecture.moe_aux_loss_coeff
            faults.append(f"--moe-aux-loss-coeff was {coefficient} and is {now}")
        if faults:
            raise UserError(f"--resume from {checkpoint.folder}: {'; '.join(faults)}; or begin a new run with --load")

    def between_steps(self, metrics: StepMetrics, recorder: Recorder | None, stop: StopRequest) -> bool:
        """Save where that is due; whether to stop. One all-reduce of five numbers lets all ranks do the same.

        RunFailure on every rank where a save failed, or where the step is not on record.
        """
        writer, done = self.writer, metrics.step + 1
        unrecorded = recorder is not None and recorder.fault is not None
        asked = [stop.number or 0, writer.busy and not writer.done, unrecorded, *self._times_up()]
        asked = torch.tensor(asked).to(self._runtime.device, torch.int32)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        signalled, writing, failed, save_due, exit_due = asked.tolist()
        if failed:
            fix = "fix this and start again with --resume"
            fault = f"step {metrics.step}: {recorder.fault}; {fix}" if recorder is not None and unrecorded else None
            raise_on_all_ranks(self._runtime, fault, RunFailure)
        if writer.busy and not writing:
            writer.wait()  # it has ended everywhere: a fault comes to light now, not at the next save
        stopping = bool(signalled or exit_due)
        interval, last = self._config.checkpoint.save_interval, done == self._config.training.train_iters
        if stopping or last or (interval > 0 and done % interval == 0):
            self._save(metrics, recorder)
        elif save_due and not writing:
            self._save(metrics, recorder, by_time=True)
        if stopping:
            writer.wait()
            if recorder is not None and not last:
                why = signal_name(signalled) if signalled else "--exit-duration-in-mins"
                left = f"{self._config.training.train_iters - done} steps are left; continue with --resume"
                recorder.log(f"{why}: step {done} is done and saved in {self._folder}; {left}")
        return stopping

    def _times_up(self) -> tuple[bool, bool]:
        """Whether it is time to save, and to end: by rank 0's clock, since ranks' clocks differ."""
        c, now = self._config.checkpoint, time.monotonic()
        if not self._runtime.is_main:
            return False, False
        save = c.save_interval_minutes > 0 and now - self._saved_at >= 60 * c.save_interval_minutes
        return save, c.exit_duration_in_mins is not None and now - self._began >= 60 * c.exit_duration_in_mins

    def end(self, recorder: Recorder | None) -> None:
        """Of a run that stops for a reason of its own, on all ranks alike: a checkpoint that is still being written is
        a good one, and is ended. A fault of that is a warning.
        """
        try:
            self.writer.wait()
        except RunFailure as fault:
            if recorder is not None:
                recorder.log(f"warning: {fault}")

    def _save(self, metrics: StepMetrics, recorder: Recorder | None, *, by_time: bool = False) -> None:
        written = on_all_ranks(
            self._runtime, lambda: None if recorder is None else recorder.written(), main_only=True
        )
        manifest = Manifest(
            step=metrics.step + 1,
            architecture=asdict(self._derived.architecture),
            vocab_size=self._vocab_size,
            bf16=self._config.model.bf16,
            config=to_toml(self._config),
            layout=self._layout(),
            optimizer={"name": self._config.optimizer.optimizer, **self._numerics.state()},
            metrics=finite_values(metrics),
            metrics_bytes=written,  # rank 0's: it writes the manifest
            data=self._data,
            tokenizer=self._tokenizer,
            answer_budget=self._answer_budget,
            run=None if self._folders.run is None else asdict(self._folders.run),
            branches=self._branches,
            written=time.time(),
            versions=package_versions(*package_of(self._config.data.train_data)),
            by_time=by_time,
        )
        self.writer.save(self._model.policies, self._optimizer, manifest)
        self._saved_at = time.monotonic()

    def _layout(self) -> dict[str, int]:
        p = self._config.parallel
        return {
            "tensor_model_parallel_size": p.tensor_model_parallel_size,
            "pipeline_model_parallel_size": p.pipeline_model_parallel_size,
            "num_virtual_stages_per_pipeline_rank": p.num_virtual_stages_per_pipeline_rank,
            "expert_model_parallel_size": p.expert_model_parallel_size,
            "data_parallel_size": self._derived.data_parallel_size,
        }


def changed_packages(saved: Manifest, train_data: str) -> list[str]:
    """A line per package that makes the training data's examples and had another version when `saved` was written."""
    packages = package_of(train_data)
    now, before = package_versions(*packages), saved.versions or {}
    return [
        f"{name} was {before[name]}, and {now[name]} is installed"
        for name in packages
        if name in before and before[name] != now[name]
    ]
