"""F2: records that cannot be used: named by file and line, counted, and then refused or left out together."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from megatron_jq.errors import UserError
from megatron_jq.formats.record_error import RecordError

T = TypeVar("T")
U = TypeVar("U")

BAD_RECORD_POLICIES = ("error", "drop")
_NAMED_AT_MOST = 3


class BadRecords:
    """Collects the faults of one source. Under "error", `settle` refuses them; under "drop", they stay to be told."""

    def __init__(self, policy: str = "error"):
        if policy not in BAD_RECORD_POLICIES:
            raise UserError(f"--bad-records {policy} is not known; it is one of {', '.join(BAD_RECORD_POLICIES)}")
        self.policy = policy
        self.faults: list[RecordError] = []

    def sieve(self, items: Iterable[T | RecordError], convert: Callable[[T], U]) -> list[U]:
        """convert(item) for each item, without those that are faults already or that `convert` finds to be one."""
        good = []
        for item in items:
            try:
                if isinstance(item, RecordError):
                    raise item
                good.append(convert(item))
            except RecordError as fault:
                self.faults.append(fault)
        return good

    def settle(self, source: str, num_good: int) -> None:
        """UserError: faults under "error", or nothing left under "drop". source: the flag and its value."""
        if not self.faults:
            return
        if self.policy == "error":
            first, *others = self.faults
            cure = "--bad-records drop leaves such records out"
            if not others:
                raise UserError(f"{first} ({cure})")
            named = ", ".join(f"{fault.place} ({fault.kind})" for fault in others[:_NAMED_AT_MOST])
            more = ", …" if len(others) > _NAMED_AT_MOST else ""
            raise UserError(f"{first} (and {len(others)} more bad records: {named}{more}; {cure})")
        if num_good == 0:
            raise UserError(f"{source}: every record is bad; the first: {self.faults[0]}")


def summary_of(faults: Sequence[RecordError]) -> str:
    """A line like "3 bad records left out (2 ragged table, 1 duplicate id): a.json:7, …", or nothing."""
    if not faults:
        return ""
    kinds = Counter(fault.kind for fault in faults)
    counted = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
    named = ", ".join(fault.place for fault in faults[:_NAMED_AT_MOST])
    more = ", …" if len(faults) > _NAMED_AT_MOST else ""
    plural = "s" if len(faults) > 1 else ""
    return f"{len(faults)} bad record{plural} left out ({counted}): {named}{more}"
