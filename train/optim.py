"""The optimizer and the learning rate of every step. The schedule is a function of the step, so it has no state to save."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from train.adamw import AdamW
from train.args import OptimArgs
from train.muon import Muon


def build_optimizer(groups: Sequence[Mapping[str, object]], args: OptimArgs) -> AdamW:
    """AdamW, or Muon for those of its groups that hold matrices.

    Args:
        groups: each with `name`, `params` and `peak_lr` (`train.param_manager.optimizer_groups`); `matrices` where Muon is meant.
        args: moments, eps, decay.

    Returns:
        the optimizer; `set_learning_rates` has to run before its first step.
    """
    # Fused: one call for all parameters. The loop over single tensors costs more than the arithmetic on small models.
    adamw: dict[str, Any] = {
        "lr": args.lr,
        "betas": (args.beta1, args.beta2),
        "eps": args.eps,
        "weight_decay": args.weight_decay,
        "fused": True,
    }
    if args.optimizer == "muon":
        return Muon(groups, momentum=args.muon_momentum, **adamw)
    return AdamW([dict(group) for group in groups], **adamw)


def lr_factor(step: int, args: OptimArgs) -> float:
    """What a group's peak learning rate is multiplied with.

    Args:
        step: updates done before this one; the first is 0.
        args: schedule.

    Returns:
        `step / warmup` while warming up; then 1 (`constant`), or half a cosine from 1 down to `min_lr / lr` at `total_steps`
        (`cosine`), or 1 and, over the last `decay_steps`, `1 - sqrt(progress)` of the way down to there (`wsd`).

    Sources: the published Bagel trainer (056b5fd), whose first update has learning rate 0 if there is a warm-up; `wsd`, Hägele et
    al. 2024 (arXiv:2405.18392), who find this form of the decay better than a linear one, and a fifth of the run enough for it.
    """
    if step < args.warmup_steps:
        return step / args.warmup_steps
    if args.lr_scheduler == "constant":
        return 1.0
    # --lr 0: every group that is trained has a rate of its own.
    floor = args.min_lr / args.lr if args.lr else 0.0
    if args.lr_scheduler == "wsd":
        done = max(0, step - args.decay_begins) / (args.total_steps - args.decay_begins)
        return floor + (1 - floor) * (1 - math.sqrt(done))
    progress = (step - args.warmup_steps) / max(1, args.total_steps - args.warmup_steps)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, args: OptimArgs) -> dict[str, float]:
    """Set every group's learning rate for update number `step` (the first is 0); returns them by group name."""
    factor = lr_factor(step, args)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of a joint norm are multiplied with so that it is at most `max_norm`; 0: they stay as they are."""
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All parameters that the optimizer changes."""
    return [p for group in optimizer.param_groups for p in group["params"]]
