"""Optimizer, schedule, average."""

from dataclasses import dataclass
from typing import Literal

from train.args.flag import flag


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimArgs:
    """Optimizer, schedule, average of the weights."""

    lr: float = flag(1e-4, "Peak learning rate.", low=0)
    min_lr: float = flag(
        1e-7, "Where the decay ends, for a group with --lr; other groups end in proportion.", low=0
    )
    lr_scheduler: Literal["constant", "cosine", "wsd"] = flag(
        "constant", "What follows the warm-up; wsd: constant, and a decay at the end (--decay_steps)."
    )
    decay_steps: int | None = flag(
        None, "Of --lr_scheduler wsd: steps of the decay; None: a fifth of --total_steps.", low=1
    )
    warmup_steps: int = flag(2000, "Steps in which the learning rate rises from 0.", low=0)
    total_steps: int = flag(500_000, "Optimizer steps of the whole run.", low=1)
    optimizer: Literal["adamw", "muon"] = flag(
        "adamw", "adamw; muon: orthogonal updates for matrices (both sides 64 or more), AdamW for all else."
    )
    muon_momentum: float = flag(0.95, "Muon: decay of the momentum.", low=0, high=1)
    beta1: float = flag(0.9, "AdamW: decay of the first moment.", low=0, high=1)
    beta2: float = flag(0.95, "AdamW: decay of the second moment.", low=0, high=1)
    eps: float = flag(1e-15, "AdamW: added to the denominator.", low=0)
    weight_decay: float = flag(0.0, "Decoupled weight decay.", low=0)
    max_grad_norm: float = flag(1.0, "Gradients are scaled down to this joint L2 norm; 0 never.", low=0)
    ema: float = flag(0.9999, "Decay of the weights' moving average.", low=0, high=1)
    ema_warmup: bool = flag(
        False, "Average faster in the beginning: after n updates the decay is at most (1+n)/(10+n)."
    )
    ema_on_cpu: bool = flag(
        False, "Keep the moving average in host memory: 4 bytes per parameter less on the GPU, 8 more there."
    )

    @property
    def decay_begins(self) -> int:
        """Of `wsd`: the first step of the decay."""
        return self.total_steps - (self.decay_steps or max(1, self.total_steps // 5))
