"""Masks of any size, from where they are made to where losses read them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.types import HeadOutput


def _nothing() -> Tensor:
    return torch.zeros(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskOutput(HeadOutput):
    """Masks and what is known of them.

    Attributes:
        iou: `r`, the head's own guess of each mask's intersection over union with the truth (0 rows: it makes none).
        code, true_code: `r c`, what it made of each state and what the true mask's code is (0 rows: it works without codes, or
            the truth is not known).
    """

    iou: Tensor = field(default_factory=_nothing)
    code: Tensor = field(default_factory=_nothing)
    true_code: Tensor = field(default_factory=_nothing)


def laid_out(
    found: Sequence[tuple[int, Tensor]], nothing: Tensor
) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    """`mask_logits` and `mask_hw` of a `HeadOutput`.

    Args:
        found: a region's place and its logits `hh ww`, in any order.
        nothing: what stands there without regions: empty, and made of the head's parameters, which take part in every step.
    """
    masks = [mask for _, mask in sorted(found, key=lambda pair: pair[0])]
    flat = torch.cat([mask.flatten() for mask in masks] or [nothing.flatten()])
    return flat, tuple((mask.shape[0], mask.shape[1]) for mask in masks)


def stretched(logits: Tensor, hw: tuple[int, int]) -> Tensor:
    """`k h w` -> `k hh ww` float32, bilinear."""
    return F.interpolate(logits[:, None].float(), size=hw, mode="bilinear")[:, 0]


def unpadded(logits: Tensor, side: int, view_hw: tuple[int, int], hw: tuple[int, int]) -> Tensor:
    """SAM's way back from its square: to `side` pixels, the padding cut off, to the picture's size.

    Args:
        logits: `k h w` on the square.
        side: of the square in pixels.
        view_hw: what of it is picture.
        hw: of the picture.

    Returns:
        `k hh ww` float32.
    """
    square = stretched(logits, (side, side))
    return stretched(square[:, : view_hw[0], : view_hw[1]], hw)
