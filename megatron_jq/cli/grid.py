"""F5: `megatron-jq grid`: the points of a sweep's TOML file, for people and for sweep.sbatch."""

from megatron_jq.cli.parser import CommandParser
from megatron_jq.errors import UserError
from megatron_jq.grid import read_grid


def run_grid(argv: list[str]) -> int:
    """Print all points, one per line, or one of them: its name, then its flags, one per line. Return the exit code."""
    flags = CommandParser(
        prog="megatron-jq grid",
        description="A TOML file whose keys are settings and whose lists are values to try, each with each: "
        'estimator = ["garl", "paft"], q = [0, 0.5, 1] are six runs. Prints a line per run.',
        allow_abbrev=False,
    )
    flags.add_argument("file", metavar="FILE", help="the TOML file")
    flags.add_argument("--point", type=int, metavar="I", help="one run, from 0: its name, then its flags, one per line")
    args = flags.parse_args(argv)
    points = read_grid(args.file)
    if args.point is None:
        for i, point in enumerate(points):
            print(i, point.name, *point.flags)
        return 0
    if not 0 <= args.point < len(points):
        raise UserError(f"{args.file} has {len(points)} points, 0 to {len(points) - 1}; none is {args.point}")
    print(points[args.point].name, *points[args.point].flags, sep="\n")
    return 0
