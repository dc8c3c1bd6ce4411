"""F1: a record that cannot be used, by file, line and field."""

from megatron_jq.errors import UserError


class RecordError(UserError):
    """What is wrong with one record. kind: a few words to count by; str(): "path:line: " and the detail."""

    def __init__(self, place: str, kind: str, detail: str):
        super().__init__(f"{place}: {detail}")
        self.place, self.kind, self.detail = place, kind, detail
