"""AdamW on this rank's pieces, and what an optimizer keeps of every weight."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from train.distributed.sharding import divided_as, local

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """Torch's, all of a group's pieces in one fused call, which clips the gradients as well (benchmarks/optimizer_ema.py).

    No piece needs another rank's, and asking DTensor about each of them takes a small model as long as the arithmetic.
    """

    @torch.no_grad()
    def step(self, closure: None = None, *, factor: float = 1.0) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: none; it is torch's.
            factor: what the gradients are multiplied with before (`clip_factor`).
        """
        for group in self.param_groups:
            if not group["params"]:
                continue
            device = local(group["params"][0]).device
            divisor = None if factor == 1.0 else torch.full((), 1 / factor, device=device)
            moved = [p for p in group["params"] if p.grad is not None]
            kept = [kept_of(self, group, p) for p in moved]
            moments = [[local(entry[moment]) for entry in kept] for moment in MOMENTS]
            beta1, beta2 = group["betas"]
            adamw(
                [local(p) for p in moved],
                [local(p.grad) for p in moved],
                moments[0],
                moments[1],
                max_exp_avg_sqs=[],
                state_steps=[entry["step"] for entry in kept],
                fused=True,
                grad_scale=divisor,
                amsgrad=False,
                maximize=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
            )


def kept_of(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], p: nn.Parameter) -> dict[str, Tensor]:
    """What the optimizer keeps of a parameter; made, with the values it would give it, where it has not stepped yet."""
    entry: dict[str, Tensor] = optimizer.state[p]
    if not entry:
        if not group.get("matrices"):
            entry["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        moments = MOMENTS[: moments_kept(group)]
        entry.update({moment: divided_as(p, torch.zeros_like(local(p.detach()))) for moment in moments})
    return entry


def moments_kept(group: Mapping[str, Any]) -> int:
    """How many moments are kept of every weight of a group."""
    return 1 if group.get("matrices") else len(MOMENTS)
