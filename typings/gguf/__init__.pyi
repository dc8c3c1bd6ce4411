# An optional package, whose names are read as Any: installed or not, the same is checked.
from typing import Any

def __getattr__(name: str) -> Any: ...
