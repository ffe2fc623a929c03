"""How a flag is written down."""

import math
from dataclasses import field
from typing import Any


def flag(default: Any, help: str, *, low: float = -math.inf, high: float = math.inf) -> Any:
    """A field with its help sentence and the range of its values (both ends belong to it)."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})
