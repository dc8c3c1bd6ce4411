#!/usr/bin/env python3
"""Train, and then, as asked for, evaluate and draw, as one nemo-run experiment.

    python launch/nemo_run/train.py --ranks-per-node 2 --config mine.toml --run-dir runs/mine --evaluate --plot
    python launch/nemo_run/train.py --executor slurm --account me --nodes 4 --config mine.toml --run-dir /data/mine
    python launch/nemo_run/train.py --executor slurm --account me --ssh me@login --job-dir /home/me/jobs \\
        --repository /home/me/megatron-jq --venv /home/me/venv --config mine.toml --run-dir /data/mine --dryrun
"""

import sys

from experiment import absolute, drawing, evaluation, executor, parser, resumable, settings, start, training

from megatron_jq import streams
from megatron_jq.errors import UserError


def main(argv: list[str]) -> int:
    flags = parser("Train, evaluate and draw one run as a nemo-run experiment.")
    flags.add_argument("--evaluate", action="store_true", help="afterwards, on one node")
    flags.add_argument("--evaluate-flags", default="", metavar="FLAGS", help="such as '--eval-samples 16'")
    flags.add_argument("--plot", action="store_true", help="at last, draw RUN_DIR/run.png")
    args, rest = flags.parse_known_args(argv)
    config = resumable(absolute(settings(rest), remote=args.ssh is not None))

    def add_tasks(experiment) -> None:
        before = experiment.add(
            training(args, config), executor=executor(args, nodes=args.nodes, ranks=args.ranks_per_node), name="train"
        )
        if args.evaluate:
            before = experiment.add(
                evaluation(args, config),
                executor=executor(args, nodes=1, ranks=args.ranks_per_node),
                name="evaluate",
                dependencies=[before],
            )
        if args.plot:
            run_dir = config.training.run_dir
            experiment.add(
                drawing(args, [run_dir], f"{run_dir}/run.png"),
                executor=executor(args, nodes=1, ranks=0),
                name="plot",
                dependencies=[before],
            )

    return start(args, add_tasks)


if __name__ == "__main__":
    streams.protect()
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"megatron-jq: error: {error}", file=sys.stderr)
        sys.exit(2)
