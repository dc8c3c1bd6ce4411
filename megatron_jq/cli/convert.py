"""F5: `megatron-jq convert …`: the flags of the four conversions."""

import argparse
import os
import re
from collections.abc import Callable

from megatron_jq.cli.parser import CommandParser, as_path
from megatron_jq.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parser() -> argparse.ArgumentParser:
    top = CommandParser(
        prog="megatron-jq convert",
        description="Checkpoints from and to Hugging Face folders, cut for another layout, or described.",
        allow_abbrev=False,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=CommandParser)
    command = _command(commands, "hf-to-megatron", "a Hugging Face folder, or a GGUF file → SAVE/iter_0000000")
    command.add_argument("--hf", required=True, type=as_path, metavar="PATH", help="the folder, or the file")
    command.add_argument("--save", required=True, type=as_path, metavar="DIR", help="where to; new, or empty")
    command.add_argument(
        "--add-tokens", nargs="+", default=[], metavar="TOKEN",
        help="add tokens that the tokenizer lacks, such as '<think>' '</think>', with rows of the vocabulary for them",
    )  # fmt: skip
    _cut(command)
    command = _command(commands, "megatron-to-hf", "the newest whole checkpoint in LOAD → a Hugging Face folder")
    _load(command)
    command.add_argument("--hf", required=True, type=as_path, metavar="DIR", help="the folder to write; new, or empty")
    command.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they are stored)")
    command.add_argument(
        "--max-shard-size", default="5GB", type=_num_bytes, metavar="SIZE", help="most bytes per file (default: 5GB)"
    )
    command.add_argument(
        "--no-tokenizer", action="store_true", help="leave the tokenizer out (default: refuse one that cannot be read)"
    )
    command = _command(commands, "reshard", "a checkpoint, optimizer included, cut for another tensor-parallel size")
    _load(command)
    command.add_argument("--save", required=True, type=as_path, metavar="DIR", help="where to; new, or empty")
    _cut(command)
    _load(_command(commands, "inspect", "what a checkpoint holds: step, architecture, tensors, sizes, settings"))
    return top


def _command(commands: "argparse._SubParsersAction[CommandParser]", name: str, help: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=help, description=help, allow_abbrev=False)


def _load(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--load",
        required=True,
        type=as_path,
        metavar="DIR",
        help="a folder of checkpoints, or one iter_NNNNNNN of it",
    )


def _cut(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--tensor-model-parallel-size", default=1, type=_positive, metavar="N",
        help="cut tensors as a job of this size reads them; every other size reads them too (default: 1)",
    )  # fmt: skip
    command.add_argument(
        "--make-vocab-size-divisible-by", default=128, type=_positive, metavar="N",
        help="pad the vocabulary to a multiple of this x the size above (default: 128)",
    )  # fmt: skip


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, not {text!r}")
    return int(text)


def _num_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B|)", text.strip().upper())
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 5GB or 500MB, not {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def run_convert(argv: list[str], before_imports: Callable[[], None]) -> int:
    """Do one conversion and return the exit code. before_imports: called before Megatron-core's slow import."""
    a = parser().parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("convert: runs in one process; start it without torchrun, and with one task under srun")
    before_imports()
    import torch

    from megatron_jq.checkpoint import convert, reshard
    from megatron_jq.checkpoint.slabs import ShardLayout

    if a.command == "inspect":
        print(reshard.inspect(a.load))
    elif a.command == "megatron-to-hf":
        dtype = None if a.dtype is None else getattr(torch, a.dtype)
        source = convert.megatron_to_hf(
            a.load, a.hf, dtype=dtype, max_shard_bytes=a.max_shard_size, with_tokenizer=not a.no_tokenizer
        )
        print(f"{source} → {a.hf}")
    else:
        layout = ShardLayout(a.tensor_model_parallel_size, a.make_vocab_size_divisible_by)
        if a.command == "hf-to-megatron":
            print(f"{a.hf} → {convert.hf_to_megatron(a.hf, a.save, layout, new_tokens=a.add_tokens)}")
        else:
            print(f"{a.load} → {reshard.reshard(a.load, a.save, layout)}")
    return 0
