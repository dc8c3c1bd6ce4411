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
    """Collect the bad records of one source. Under "error", `settle` refuses them; under "drop", it leaves them out."""

    def __init__(self, policy: str = "error"):
        if policy not in BAD_RECORD_POLICIES:
            raise UserError(f"--bad-records {policy} is not known; it is one of {', '.join(BAD_RECORD_POLICIES)}")
        self.policy = policy
        self.errors: list[RecordError] = []

    def sieve(self, items: Iterable[T | RecordError], convert: Callable[[T], U]) -> list[U]:
        """convert(item) for each item, without those that are errors already or that `convert` refuses."""
        good = []
        for item in items:
            try:
                if isinstance(item, RecordError):
                    raise item
                good.append(convert(item))
            except RecordError as error:
                self.errors.append(error)
        return good

    def settle(self, source: str, num_good: int) -> None:
        """UserError: bad records under "error", or nothing left under "drop". source: the flag and its value."""
        if not self.errors:
            return
        if self.policy == "error":
            first, *others = self.errors
            fix = "--bad-records drop leaves such records out"
            if not others:
                raise UserError(f"{first} ({fix})")
            examples = ", ".join(f"{error.place} ({error.kind})" for error in others[:_NAMED_AT_MOST])
            more = ", …" if len(others) > _NAMED_AT_MOST else ""
            raise UserError(f"{first} (and {len(others)} more bad records: {examples}{more}; {fix})")
        if num_good == 0:
            raise UserError(f"{source}: every record is bad; the first: {self.errors[0]}")


def summary_of(errors: Sequence[RecordError]) -> str:
    """A line like "3 bad records left out (2 ragged table, 1 duplicate id): a.json:7, …", or nothing."""
    if not errors:
        return ""
    kinds = Counter(error.kind for error in errors)
    counted = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
    examples = ", ".join(error.place for error in errors[:_NAMED_AT_MOST])
    more = ", …" if len(errors) > _NAMED_AT_MOST else ""
    plural = "s" if len(errors) > 1 else ""
    return f"{len(errors)} bad record{plural} left out ({counted}): {examples}{more}"
