"""What the loss is multiplied with before backward: fp16 rounds small gradients to 0 and has no large ones.

The scale is found by trying: it is halved when gradients overflow, and doubled after `growth_steps` steps without. Gradients are
divided by it, in float32, as soon as they are whole, so nothing after that knows of it. Whether they overflow is seen in their
norm, which is over all ranks: every rank decides alike, without asking.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from train.args import FsdpArgs
from train.distributed.sharding import local

LARGEST = 2.0**24


def precision_lines(args: FsdpArgs, device_type: str) -> list[str]:
    """What is to be said at the start of precision on this device: a GPU before Ampere computes bf16 by emulation, if at all."""
    if device_type != "cuda" or args.param_dtype != "bf16" or torch.cuda.is_bf16_supported(False):
        return []
    return [
        "--param_dtype bf16: this GPU has no bf16 and emulates it, slowly; --param_dtype fp16 --reduce_dtype fp32 is for such"
    ]


@dataclass(slots=True, kw_only=True)
class LossScale:
    """The scale of one run.

    Attributes:
        value: at present.
        growth_steps: steps without overflow after which it is doubled; 0: never.
        clean_steps: steps since the last overflow or doubling.
        adapts: whether an overflow is to be expected; without fp16 it is not, and the scale is 1.
    """

    value: float = 1.0
    growth_steps: int = 0
    clean_steps: int = 0
    adapts: bool = False

    @staticmethod
    def build(args: FsdpArgs) -> "LossScale":
        """The scale that a run begins with."""
        if "fp16" not in (args.param_dtype, args.reduce_dtype):
            return LossScale()
        return LossScale(value=args.loss_scale, growth_steps=args.loss_scale_growth, adapts=True)

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the scale, in place."""
        grads = [local(p.grad) for p in parameters if p.grad is not None]
        if grads and self.value != 1.0:
            torch._foreach_mul_(grads, 1.0 / self.value)

    def overflowed(self, norm: Tensor) -> bool:
        """Take in the norm of a step's gradients, equal on all ranks: whether the step has to be left out.

        Never with a scale of 1: what is not finite then, is so without scaling.
        """
        if not self.adapts:
            return False
        if norm.isfinite():
            self.clean_steps += 1
            if self.clean_steps == self.growth_steps:
                self.value, self.clean_steps = min(2 * self.value, LARGEST), 0
            return False
        self.clean_steps = 0
        if self.value == 1.0:
            return False
        self.value = max(self.value / 2, 1.0)
        return True

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"value": self.value, "clean_steps": self.clean_steps}

    def load(self, stored: Mapping[str, Any]) -> None:
        """Take over what `to_json` gave; a run without fp16 has no use for it, and a checkpoint of one nothing to give."""
        if self.adapts and stored["value"] > 1.0:
            self.value, self.clean_steps = float(stored["value"]), int(stored["clean_steps"])
