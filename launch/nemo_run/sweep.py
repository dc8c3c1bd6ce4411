#!/usr/bin/env python3
"""Train one run a point of a grid, side by side, evaluate each, and draw their comparison: one nemo-run experiment.

    python launch/nemo_run/sweep.py --executor slurm --account me --config mine.toml --run-dir /data/sweep
    python launch/nemo_run/sweep.py … --qs 0.5 0.75 1 --estimators garl paft
    python launch/nemo_run/sweep.py … --grid grid.toml                       # megatron-jq grid --help

--run-dir is the folder of all runs; the picture is its comparison.png. Locally the runs share this machine.
"""

import sys
from dataclasses import replace

from experiment import absolute, drawing, evaluation, executor, parser, resumable, settings, start, training

from megatron_jq import streams
from megatron_jq.config import Config, parse_args
from megatron_jq.errors import UserError
from megatron_jq.grid import Point, read_grid


def points_of(args) -> list[Point]:
    if args.grid is not None:
        return read_grid(args.grid)
    return [
        Point(f"{estimator}-q{q:g}", (f"--estimator={estimator}", f"--q={q!r}"))
        for estimator in args.estimators
        for q in args.qs
    ]


def configs_of(points: list[Point], rest: list[str], remote: bool) -> list[Config]:
    """The points' settings; each has a folder of its own in the sweep's, and in a --save that is given for all."""
    configs = []
    for point in points:
        config = absolute(settings([*rest, *point.flags]), remote)
        folder = f"{config.training.run_dir}/{point.name}"
        configs.append(resumable(replace(config, training=replace(config.training, run_dir=folder))))
    saves = [config.checkpoint.save for config in configs]
    if len(set(saves) - {None}) < len(saves) - saves.count(None):
        configs = [_in_folder(config, point.name) for config, point in zip(configs, points, strict=True)]
    return configs


def _in_folder(config: Config, name: str) -> Config:
    """A folder of checkpoints belongs to one run: DIR becomes DIR/NAME."""
    save = config.checkpoint.save
    return replace(config, checkpoint=replace(config.checkpoint, save=None if save is None else f"{save}/{name}"))


def main(argv: list[str]) -> int:
    flags = parser("Train, evaluate and compare one run a point of a grid, as a nemo-run experiment.")
    flags.add_argument("--estimators", nargs="+", default=["garl"], metavar="NAME", help="(default: garl)")
    flags.add_argument(
        "--qs", nargs="+", type=float, default=[0.0, 0.25, 0.5, 0.75, 1.0], metavar="Q",
        help="(default: 0 0.25 0.5 0.75 1)",
    )  # fmt: skip
    flags.add_argument("--grid", metavar="FILE", help="a TOML file of values to try, instead of both")
    flags.add_argument("--evaluate", action="store_true", help="each run, after its training")
    flags.add_argument("--evaluate-flags", default="", metavar="FLAGS", help="such as '--eval-samples 16'")
    args, rest = flags.parse_known_args(argv)
    points = points_of(args)
    remote = args.ssh is not None
    sweep_dir = absolute(parse_args(rest), remote).training.run_dir
    configs = configs_of(points, rest, remote)

    def add_tasks(experiment) -> None:
        last = []
        for point, config in zip(points, configs, strict=True):
            ranks = args.ranks_per_node
            before = experiment.add(
                training(args, config),
                executor=executor(args, nodes=args.nodes, ranks=ranks),
                name=f"train-{point.name}",
            )
            if args.evaluate:
                before = experiment.add(
                    evaluation(args, config),
                    executor=executor(args, nodes=1, ranks=ranks),
                    name=f"evaluate-{point.name}",
                    dependencies=[before],
                )
            last.append(before)
        experiment.add(
            drawing(args, [c.training.run_dir for c in configs], f"{sweep_dir}/comparison.png"),
            executor=executor(args, nodes=1, ranks=0),
            name="plot",
            dependencies=last,
        )

    return start(args, add_tasks)


if __name__ == "__main__":
    streams.protect()
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"megatron-jq: error: {error}", file=sys.stderr)
        sys.exit(2)
