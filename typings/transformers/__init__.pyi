# Types of the few names that are used are not worth the time to read all of transformers.
from typing import Any

def __getattr__(name: str) -> Any: ...
