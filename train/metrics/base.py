"""What every metric is: a few sums that add up over processes, and `compute`, which divides once."""

from collections import Counter
from dataclasses import dataclass, fields
from typing import Any, Self


@dataclass(kw_only=True)
class SummedMetric:
    """Base of the metrics: all fields are sums, so merging two metrics is adding their fields.

    A subclass declares its sums as fields with a zero default and writes `update` and `compute`. A field is a number, a `Counter`
    of them, or a list where nothing smaller than the samples will do. Whole numbers are Python's: no picture is too large.
    """

    def update(self, *outputs: Any) -> None:
        """Count one sample."""
        raise NotImplementedError

    def merge(self, other: Self) -> Self:
        """The metric over both sets of samples; neither operand changes."""
        return type(self)(
            **{f.name: _sum(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        )

    def compute(self) -> dict[str, float]:
        """The figures by name; 0 where no sample was counted."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """The sums, as `from_json` reads them: what a process writes for the others, or a row of results for its sample."""
        return {
            f.name: dict(value) if isinstance(value := getattr(self, f.name), Counter) else value
            for f in fields(self)
        }

    @classmethod
    def from_json(cls, sums: dict[str, Any]) -> Self:
        """The metric that `to_json` wrote.

        Raises:
            ValueError: if it is of another metric.
        """
        if set(sums) != {f.name for f in fields(cls)}:
            raise ValueError(f"{', '.join(sums)} are not the sums of {cls.__name__}; evaluate again")
        return cls(**{n: Counter(value) if isinstance(value, dict) else value for n, value in sums.items()})


def _sum(a: Any, b: Any) -> Any:
    # Counter's own + leaves out what is not positive.
    return Counter({key: a[key] + b[key] for key in (*a, *b)}) if isinstance(a, Counter) else a + b


def ratio(total: float, count: float) -> float:
    """`total / count`, and 0 if nothing was counted: an evaluation without samples has no success to report."""
    return float(total) / count if count else 0.0
