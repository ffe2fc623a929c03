"""Muon: matrices are moved by the nearest orthogonal matrix of their momentum, everything else by AdamW."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from train.adamw import AdamW, kept_of
from train.distributed.matrices import each_whole
from train.distributed.sharding import local

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that drives singular values towards 1: after five times most are between 0.7 and 1.2, very small ones lower."""
ITERATIONS = 5
RMS = 0.2
"""Root mean square of an update, in learning rates: that of AdamW's, so that both take the same rates."""


class Muon(AdamW):
    """AdamW whose groups with `matrices` are moved by Muon.

    A matrix W `m n` with gradient G goes by  M <- beta M + (1 - beta) G;  W <- W (1 - lr decay) - lr 0.2 sqrt(max(m, n))
    orthogonal((1 - beta) G + beta M). It keeps one moment where AdamW keeps two.

    Args:
        groups: as AdamW's; `matrices` True for those of Muon.
        momentum: beta.
        adamw: AdamW's own options.

    Sources: Jordan et al. 2024 (kellerjordan.github.io/posts/muon) for the rule and its coefficients; Liu et al. 2025
    (arXiv:2502.16982) for the size of the update and the decay.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], *, momentum: float, **adamw: Any) -> None:
        super().__init__([dict(group) for group in groups], **adamw)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: None = None, *, factor: float = 1.0) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, as `AdamW.step`."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("matrices")]
        try:
            super().step(closure, factor=factor)
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("matrices"):
                self._step_matrices(group, factor)

    def _step_matrices(self, group: Mapping[str, Any], factor: float) -> None:
        moved = [p for p in group["params"] if p.grad is not None]
        gradients = [local(p.grad) for p in moved]
        moments = [local(kept_of(self, group, p)["exp_avg"]) for p in moved]
        if factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        torch._foreach_lerp_(moments, gradients, 1 - self.momentum)
        ahead = torch._foreach_lerp(gradients, moments, self.momentum)
        directions = each_whole(moved, ahead, orthogonal)
        if group["weight_decay"]:
            torch._foreach_mul_([local(p) for p in moved], 1 - group["lr"] * group["weight_decay"])
        for p, direction in zip(moved, directions, strict=True):
            local(p).add_(direction, alpha=-group["lr"] * RMS * max(p.shape) ** 0.5)


def orthogonal(matrices: Tensor) -> Tensor:
    """`k m n`: each with its singular values near 1 and its singular vectors as they are; zeros stay zeros."""
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if wide is not matrices else x
