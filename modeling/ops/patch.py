"""Latent patches and 2-D position tables."""

import itertools
from collections.abc import Iterator, Sequence

import torch
from einops import rearrange
from torch import Tensor


def patchify_latent(latent: Tensor, patch: int) -> Tensor:
    """`z (rows p) (cols p)` -> `(rows cols) (p p z)`: row-major, channel fastest."""
    return rearrange(latent, "z (r p) (c q) -> (r c) (p q z)", p=patch, q=patch)


def unpatchify_latent(tokens: Tensor, rows: int, cols: int, patch: int) -> Tensor:
    """`(rows cols) (p p z)` -> `z (rows p) (cols p)`."""
    return rearrange(tokens, "(r c) (p q z) -> z (r p) (c q)", r=rows, c=cols, p=patch, q=patch)


def images_by_size(
    patches: Tensor, hw: Sequence[tuple[int, int]], patch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Packed patches put together to pictures again, all of one size at a time, so that convolutions can run.

    Args:
        patches: `v (p p c)`, row-major patches of one image after the other.
        hw: patch rows and columns of each image.
        patch: side of a patch.

    Yields:
        places of the patches `(i h w)` and pictures `i c (h p) (w p)`. Without images one group of nothing, still of `patches`.
    """
    channels = patches.shape[1] // patch**2
    if not hw:
        yield (
            torch.zeros(0, dtype=torch.int64, device=patches.device),
            patches.reshape(0, channels, patch, patch),
        )
        return
    first = list(itertools.accumulate((h * w for h, w in hw), initial=0))
    for h, w in sorted(set(hw)):
        start = torch.tensor([f for f, size in zip(first[:-1], hw, strict=True) if size == (h, w)])
        place = (start[:, None] + torch.arange(h * w)[None]).flatten().to(patches.device)
        yield (
            place,
            rearrange(patches[place], "(i h w) (p q c) -> i c (h p) (w q)", h=h, w=w, p=patch, q=patch),
        )


def normalise_pixels(pixels: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]; floats are taken to be normalised already."""
    return pixels if pixels.is_floating_point() else pixels.float().div(255).sub(0.5).div(0.5)


def sincos_table(side: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine position table.

    Returns:
        `(side side) width` float32, row-major; first half of a row codes the column, second half the row, each as
        sines then cosines.

    Source: MAE (arXiv 2111.06377) layout, computed in float64 as upstream Bagel 056b5fd.
    """
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega[None]
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    column = axis[None].expand(side, side, -1)
    row = axis[:, None].expand(side, side, -1)
    return torch.cat([column, row], dim=-1).reshape(side * side, width).float()


def timestep_features(t: Tensor, width: int) -> Tensor:
    """Sinusoidal features of the flow's time, `l` -> `l width`: cosines, then sines; `t` is taken raw, in [0, 1]."""
    half = width // 2
    frequency = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(half, dtype=torch.float32) / half)
    angle = t.float()[:, None] * frequency.to(t.device)[None]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
