"""Rotary positions."""

import torch
from torch import Tensor


def rope_table(position: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token, computed in float32 once per forward.

    Args:
        position: `s` int64.
        head_dim: width of a head.
        theta: base of the frequencies.

    Returns:
        two of `s 1 e`, for `rotate`.
    """
    frequency = theta ** (
        -torch.arange(0, head_dim, 2, dtype=torch.float32, device=position.device) / head_dim
    )
    angle = position.float()[:, None] * frequency[None]
    angle = torch.cat([angle, angle], dim=-1)[:, None]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `s h e` by its positions: the two halves of a head are the two coordinates."""
    low, high = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-high, low], dim=-1) * sin.to(x.dtype)
