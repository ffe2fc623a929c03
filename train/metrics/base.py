"""What every metric is: a few sums that add up over processes, and `compute`, which divides once."""

from dataclasses import dataclass, fields
from typing import Any, Self


@dataclass(kw_only=True)
class SummedMetric:
    """Base of the metrics: all fields are sums, so merging two metrics is adding their fields.

    A subclass declares its sums as fields with a zero default and writes `update` and `compute`.
    """

    def update(self, *outputs: Any) -> None:
        """Count one sample."""
        raise NotImplementedError

    def merge(self, other: Self) -> Self:
        """The metric over both sets of samples; neither operand changes."""
        return type(self)(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def compute(self) -> dict[str, float]:
        """The figures by name; 0 where no sample was counted."""
        raise NotImplementedError


def ratio(total: float, count: int) -> float:
    """`total / count`, and 0 if nothing was counted: an evaluation without samples has no success to report."""
    return float(total) / count if count else 0.0
