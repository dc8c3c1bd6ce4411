"""F4: a run from its settings to its exit code: set-up that ranks do together, the trainer, its checkpoints."""

import contextlib
import time
from datetime import timedelta

from megatron_jq.config import Config
from megatron_jq.config_validate import derive
from megatron_jq.data.tokenizer_choice import with_markers
from megatron_jq.evaluate.reward import reward_of
from megatron_jq.parallel import runtime as runtime_module
from megatron_jq.parallel.runtime import on_all_ranks
from megatron_jq.rollout.engines import engine_row
from megatron_jq.train.assemble import assemble
from megatron_jq.train.estimators import Estimator
from megatron_jq.train.failures import Phase, peers_must_answer
from megatron_jq.train.rehearsal import rehearse
from megatron_jq.train.run_directory import RunFolders
from megatron_jq.train.saving import Saving
from megatron_jq.train.setup import prepare_data
from megatron_jq.train.start_point import find_start_point
from megatron_jq.train.stopping import StopRequest
from megatron_jq.train.watch import Watch


def run_training(config: Config) -> int:
    """Train to --train-iters and evaluate. Returns the exit code. UserError before work starts on any bad input."""
    began = time.monotonic()
    derived = derive(config, runtime_module.world_size_from_environment())
    deadline, phase = timedelta(minutes=config.parallel.distributed_timeout_minutes), Phase()
    with peers_must_answer(phase, deadline):
        runtime = runtime_module.start_configured(config.parallel, config.training.seed)
    watch = Watch(phase, runtime, timedelta(minutes=config.parallel.phase_timeout_minutes))
    folders = RunFolders(config)  # rank 0's: the others leave it alone
    closing = contextlib.ExitStack()
    with watch, peers_must_answer(phase, deadline, watch.missing_peers), contextlib.closing(folders), closing:
        for note in on_all_ranks(runtime, folders.open, main_only=True) or ():
            print(note, flush=True)
        on_all_ranks(runtime, lambda: engine_row(config))
        on_all_ranks(runtime, lambda: reward_of(config))  # the user's own module: before any work
        on_all_ranks(runtime, lambda: rehearse(Estimator.of(config, derived), config.rollout.num_rationales))
        start = find_start_point(config, runtime)
        carried = None if start.checkpoint is None else start.checkpoint.tokenizer
        data = prepare_data(config, derived.architecture, runtime, folders.run_dir, carried=carried)
        if not config.objective.row.pretrains:
            config = with_markers(config, data.tokenizer)
        loop = assemble(config, derived, data, runtime, phase)
        closing.callback(loop.engine.close)  # the run closes it; what fails before the run does too
        saving = Saving(config, derived, data, runtime, loop.parts, loop.numerics, deadline, began, folders)
        saving.load(start)
        if loop.reference is not None:
            loop.reference.begin(start, loop.model.policies)
        loop.parts.schedule.step(increment=start.step)
        # Last: a folder whose run was refused for another fault stays free for the next try.
        on_all_ranks(runtime, folders.claim, main_only=True)
        if loop.reference is not None:
            loop.reference.keep(start, deadline, folders.run)
        with StopRequest(announce=runtime.is_main).listening() as stop:
            loop.run(start, saving, stop)
            runtime_module.stop()
    return 0
