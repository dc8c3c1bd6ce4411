"""What train.py and sweep.py share: where an experiment runs, its tasks, and how it is started.

Every task is a `run.Script` over the flags that torchrun and srun take too (`to_argv`).
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_jq.config import SETTINGS, Config, explicit_settings, parse_args, to_argv
from megatron_jq.config_reads import refuse_unread, without_unread
from megatron_jq.config_validate import resolve_architecture
from megatron_jq.errors import UserError

try:
    import nemo_run as run
except ModuleNotFoundError as error:
    print(
        f"megatron-jq: error: nemo-run cannot be imported ({error}); pip install 'megatron-jq[nemo]', or use "
        "launch/slurm/train.sbatch",
        file=sys.stderr,
    )
    sys.exit(2)

REPOSITORY = Path(__file__).resolve().parents[2]
#: Settings that may be a path. Tasks run in a folder of nemo-run's own: relative ones would miss.
_PATHS = ("run_dir", "save", "load", "train_data", "eval_data", "tokenizer_model", "prompt_template", "model")
_MADE_BY_THE_RUN = ("run_dir", "save")
#: Seconds that torchrun gives its ranks after a signal, to end their step and to save. Its own default is 30.
_SHUTDOWN = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}


class Parser(argparse.ArgumentParser):
    """Faults as UserError, in one line."""

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")


def parser(description: str) -> Parser:
    """The flags of both specs: where and how; the rest of the command line is `megatron-jq train`'s."""
    flags = Parser(description=description, epilog="All other flags: megatron-jq train --help.", allow_abbrev=False)
    flags.add_argument("--name", default="megatron-jq", help="of the experiment (default: %(default)s)")
    flags.add_argument("--executor", choices=("local", "slurm"), default="local", help="(default: %(default)s)")
    flags.add_argument("--dryrun", action="store_true", help="print what would run, and start nothing")
    flags.add_argument("--nodes", type=int, default=1, metavar="N", help="for training (default: 1)")
    flags.add_argument("--ranks-per-node", type=int, default=8, metavar="N", help="one a GPU (default: 8)")
    slurm = flags.add_argument_group("under --executor slurm")
    slurm.add_argument("--account", help="Slurm's account; nemo-run asks for one")
    slurm.add_argument("--partition")
    slurm.add_argument("--time", default="04:00:00", help="limit of each task (default: %(default)s)")
    slurm.add_argument("--gpus-per-node", type=int, metavar="N", help="to ask for (default: ranks; 0: none)")
    slurm.add_argument(
        "--retries", type=int, default=3, metavar="N", help="of a task that failed; it resumes (default: 3)"
    )
    slurm.add_argument("--ssh", metavar="USER@HOST", help="the login node, from elsewhere (default: this is one)")
    slurm.add_argument("--ssh-identity", metavar="FILE", help="private key (default: ssh's own)")
    slurm.add_argument("--job-dir", metavar="DIR", help="on the cluster, for nemo-run's scripts and logs; with --ssh")
    slurm.add_argument("--repository", metavar="DIR", help="the checkout on the cluster (default: this one's path)")
    slurm.add_argument("--venv", metavar="DIR", help="virtual environment on the cluster (default: the active one)")
    slurm.add_argument("--container-image", metavar="IMAGE", help="instead of --venv; needs pyxis")
    slurm.add_argument("--container-mounts", default="", metavar="LIST", help="SOURCE:TARGET, by commas")
    return flags


def settings(argv: list[str]) -> Config:
    """Of a command line of training. UserError on bad input, and for flags that the run would not read."""
    config = parse_args(argv)
    refuse_unread("train", config, resolve_architecture(config), explicit_settings(argv))
    return config


def absolute(config: Config, remote: bool) -> Config:
    """The settings with absolute paths. UserError where a relative one would be looked up on another machine."""
    for name in _PATHS:
        group = SETTINGS[name][0]
        value = getattr(getattr(config, group), name)
        if value is None or value.startswith("/"):
            continue
        if remote and (name in _MADE_BY_THE_RUN or Path(value).exists()):
            raise UserError(f"--{name.replace('_', '-')} {value}: give an absolute path on the cluster")
        if name in _MADE_BY_THE_RUN or Path(value).exists():
            changed = replace(getattr(config, group), **{name: os.path.abspath(value)})
            config = replace(config, **{group: changed})
    return config


def resumable(config: Config) -> Config:
    """A task may be started several times: after a failure, and by Slurm when a node is lost."""
    return replace(config, checkpoint=replace(config.checkpoint, resume=True))


def training(args: argparse.Namespace, config: Config) -> "run.Script":
    # A file may hold what this run does not read: on a command line that would be refused.
    return _on_ranks(args, "train", *to_argv(without_unread(config, resolve_architecture(config))))


def evaluation(args: argparse.Namespace, config: Config) -> "run.Script":
    """Of the newest checkpoint that `config`'s run leaves; its report in the run's folder."""
    run_dir = config.training.run_dir
    load = config.checkpoint.save or f"{run_dir}/checkpoints"
    flags = shlex.split(args.evaluate_flags)
    # The layout and the device are the job's, not the checkpoint's.
    return _on_ranks(args, "evaluate", f"--load={load}", f"--output={run_dir}/evaluation", *flags)


def drawing(args: argparse.Namespace, run_dirs: list[str], output: str) -> "run.Script":
    flags = [*run_dirs, "--output", output]
    if args.executor == "local":
        return run.Script(f"{REPOSITORY}/tools/plot_run.py", args=flags, entrypoint="python")
    # Without a launcher nemo-run writes the words into its batch script as they are.
    path, *flags = map(shlex.quote, [f"{_repository(args)}/tools/plot_run.py", *flags])
    return run.Script(path, args=flags, entrypoint="python")


def _on_ranks(args: argparse.Namespace, *words: str) -> "run.Script":
    """`megatron-jq WORDS` on every rank. Under Slurm nemo-run's own torchrun launcher starts it."""
    if args.executor == "slurm":
        return run.Script("megatron_jq", args=list(words), m=True, entrypoint="python")
    # That launcher quotes for a shell, which local tasks do not have: blanks would not survive.
    torchrun = ["--standalone", f"--nproc-per-node={args.ranks_per_node}", "-m", "megatron_jq"]
    return run.Script("torch.distributed.run", args=[*torchrun, *words], m=True, entrypoint="python")


def executor(args: argparse.Namespace, *, nodes: int, ranks: int) -> "run.Executor":
    """Where a task runs. ranks 0: one process, without torchrun and without GPUs."""
    if args.executor == "local":
        if args.nodes > 1:
            raise UserError(f"--nodes {args.nodes}: --executor local has one")
        environment = {
            "PATH": _path("PATH", str(Path(sys.executable).parent)),  # `python` is this one
            "PYTHONPATH": _path("PYTHONPATH", str(REPOSITORY)),
            "OMP_NUM_THREADS": _threads(),
            **_SHUTDOWN,
        }
        return run.LocalExecutor(env_vars=environment)
    if not args.account:
        raise UserError("--executor slurm: --account NAME must be given")
    gpus = ranks if args.gpus_per_node is None else min(ranks, args.gpus_per_node)
    mounts = [mount for mount in args.container_mounts.split(",") if mount]
    # nemo-run writes them into its script as they are
    variables = {
        "PYTHONPATH": shlex.quote(_repository(args)) + '"${PYTHONPATH:+:$PYTHONPATH}"',
        "OMP_NUM_THREADS": _threads(),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        **_SHUTDOWN,
    }
    slurm = run.SlurmExecutor(
        account=args.account,
        partition=args.partition,
        time=args.time,
        nodes=nodes,
        ntasks_per_node=1,
        gpus_per_node=gpus or None,
        torchrun_nproc_per_node=ranks or None,
        exclusive=True if ranks else None,
        mem="0" if ranks else None,
        tunnel=_tunnel(args),
        packager=run.Packager(),  # the checkout on the cluster is what runs
        launcher="torchrun" if ranks else None,
        container_image=args.container_image,
        container_mounts=[f"{_repository(args)}:{_repository(args)}", *mounts] if args.container_image else [],
        env_vars=variables,
        container_env=list(variables) if args.container_image else None,  # or the image's own values would win
        setup_lines=_setup(args),
        poll_estimated_start_time=False,
    )
    slurm.retries = args.retries
    return slurm


def start(args: argparse.Namespace, add_tasks: Callable[["run.Experiment"], None]) -> int:
    """Make the experiment; print it, or start it. Slurm's tasks run on by themselves. Returns the exit code."""
    slurm = args.executor == "slurm"
    with run.Experiment(args.name, skip_status_at_exit=slurm, enable_goodbye_message=False) as experiment:
        add_tasks(experiment)
        if args.dryrun:
            experiment.dryrun()
            return 0
        experiment.run(detach=slurm, tail_logs=not slurm)
    if slurm:
        return 0
    failed = [job.id for job in experiment.jobs if str(getattr(job.state, "name", job.state)) != "SUCCEEDED"]
    if failed:
        print(f"megatron-jq: error: tasks that failed: {', '.join(failed)}; their output is above", file=sys.stderr)
    return 3 if failed else 0


def _repository(args: argparse.Namespace) -> str:
    return args.repository or str(REPOSITORY)


def _tunnel(args: argparse.Namespace) -> "run.Tunnel":
    if args.ssh is None:
        return run.LocalTunnel(job_dir=args.job_dir or "")
    user, at, host = args.ssh.partition("@")
    if not (user and at and host):
        raise UserError(f"--ssh {args.ssh}: expected USER@HOST")
    if not args.job_dir:
        raise UserError("--ssh: --job-dir DIR must be given, a folder on the cluster that its nodes share")
    return run.SSHTunnel(user=user, host=host, job_dir=args.job_dir, identity=args.ssh_identity)


def _setup(args: argparse.Namespace) -> str | None:
    """Lines of the batch script before the command: the virtual environment."""
    if args.container_image:
        return None
    venv = args.venv or (os.environ.get("VIRTUAL_ENV") if args.ssh is None else None)
    return None if venv is None else f"source {shlex.quote(f'{venv}/bin/activate')}"


def _path(name: str, first: str) -> str:
    return os.pathsep.join(filter(None, (first, os.environ.get(name))))


def _threads() -> str:
    return os.environ.get("OMP_NUM_THREADS", "4")
