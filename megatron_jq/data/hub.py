"""F2: records of a data set on the Hugging Face hub, through the `datasets` library. No code of the set is run.

A source is "hub:OWNER/NAME[@REVISION][:CONFIG[:SPLIT]]", such as hub:openai/gsm8k:main:train. From version 4 on the
library has no way to run a set's loading script; an older one is refused.
"""

from collections.abc import Iterator

from megatron_jq.data.containers import INSTALL, without_nulls
from megatron_jq.errors import UserError

HUB_PREFIX = "hub:"


def is_hub(source: str) -> bool:
    return source.startswith(HUB_PREFIX)


def read_hub(source: str, default_split: str, *, flag: str = "--train-data") -> Iterator[tuple[str, dict]]:
    """("hub:…[row]", object) for every row. UserError: the library is absent or too old, or the set cannot be had."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{flag} {source} needs the datasets library: {INSTALL}") from error
    if int(datasets.__version__.split(".")[0]) < 4:
        installed = f"datasets {datasets.__version__} is installed"
        raise UserError(f"{flag} {source}: {installed}, which can run a data set's own code; {INSTALL}")
    pieces = source.removeprefix(HUB_PREFIX).split(":")
    name, config, split = (*pieces, "", "")[:3]
    name, _, revision = name.partition("@")
    if not name or len(pieces) > 3:
        raise UserError(f"{flag} {source}: write hub:OWNER/NAME[@REVISION][:CONFIG[:SPLIT]]")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or default_split, revision=revision or None)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{flag} {source} cannot be loaded: {reason}") from error
    if len(rows) == 0:
        raise UserError(f"{flag} {source} is empty; name a split with rows")
    for number, row in enumerate(rows):
        yield f"{source}[{number}]", without_nulls(dict(row))
