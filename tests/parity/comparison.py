"""What one golden case was compared with, number by number."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Row:
    """One output: largest absolute error, largest error relative to the largest expected value, what is allowed of the latter."""

    name: str
    absolute: float
    relative: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.relative <= self.tolerance


@dataclass
class Comparison:
    """The rows of one case."""

    rows: list[Row] = field(default_factory=list)

    def close(self, name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
        """Compare floats; a wrong shape is an infinite error."""
        if ours.shape != theirs.shape:
            self.rows.append(
                Row(f"{name} {list(ours.shape)}!={list(theirs.shape)}", *[float("inf")] * 2, tolerance)
            )
        elif theirs.numel():
            ours, theirs = ours.detach().double(), theirs.double()
            absolute = float((ours - theirs).abs().max())
            largest = float(theirs.abs().max())
            relative = absolute / largest if largest else (0.0 if absolute == 0 else float("inf"))
            self.rows.append(
                Row(name, absolute, relative if absolute == absolute else float("inf"), tolerance)
            )

    def equal(self, name: str, ours: Any, theirs: Any) -> None:
        """Compare what must be the same: integers, masks, sizes, texts."""
        same = torch.equal(ours, theirs) if isinstance(theirs, Tensor) else ours == theirs
        self.rows.append(Row(name, *([0.0] * 2 if same else [float("inf")] * 2), 0.0))

    def worst(self) -> "Row":
        """The row nearest to its tolerance, or furthest above it."""
        return max(self.rows, key=lambda r: r.relative / r.tolerance if r.tolerance else r.relative)
