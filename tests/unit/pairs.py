"""The pairs of a data source, for tests that ask for nothing else of it."""

from megatron_jq.data.dataset import ReadOptions, load_source
from megatron_jq.formats.pair import Pair


def load_pairs(source: str, *, prompt_field: str = "prompt", data_format: str = "auto", **rest) -> list[Pair]:
    """load_source's; a bad record is an error."""
    return list(load_source(source, ReadOptions(data_format, prompt_field), **rest).pairs)
