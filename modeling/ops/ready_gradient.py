"""A gradient that is computed beside the value it belongs to, so that nothing of the computation need be kept until backward."""

from typing import Any

import torch
from torch import Tensor


def ready_gradient(x: Tensor, gradient: Tensor, *, keep: bool) -> Tensor:
    """A zero that, added to a loss, gives the loss this gradient in `x`.

    Args:
        x: any shape.
        gradient: the loss's gradient in `x`: its shape, and its type or float32, which becomes the type of `x` once it is scaled.
        keep: leave the gradient as it is, for further backward passes; else it is scaled in place and given away, which saves
            its size in memory, and a second backward pass is an error.

    Returns:
        float32 scalar.
    """
    result: Tensor = _Ready.apply(x, gradient, keep)
    return result


class _Ready(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor, keep: bool) -> Tensor:
        ctx.gradient, ctx.keep, ctx.dtype = gradient, keep, x.dtype
        return torch.zeros((), device=x.device)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        if ctx.keep:
            return (ctx.gradient * scale.to(ctx.gradient.dtype)).to(ctx.dtype), None, None
        if ctx.gradient is None:
            raise RuntimeError("a second backward pass through a gradient that the first one gave away")
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(scale).to(ctx.dtype), None, None
