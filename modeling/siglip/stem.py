"""A convolutional stem beside the linear patch embedding: an option for small models that learn to see from nothing.

A linear embedding sees a shape differently at every offset to the patch grid; learning that takes more pictures than a small run
has. Published checkpoints have no stem, and none is built for them.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from modeling.ops.patch import images_by_size


class ConvStem(nn.Module):
    """Stride-2 convolutions from pixels down to one cell per patch, then two at that size: a cell sees its neighbours too.

    Args:
        channels: of the pictures.
        patch_size: a power of two.
        width: channels at patch size; half as many per level above, at least 8.
        out: width of the tower.

    Raises:
        ValueError: if the patch size is no power of two.
    """

    def __init__(self, channels: int, patch_size: int, width: int, out: int):
        super().__init__()
        levels = patch_size.bit_length() - 1
        if 1 << levels != patch_size:
            raise ValueError(
                f"stem_width {width}: a stem needs a patch_size that is a power of two, not {patch_size}"
            )
        self.patch_size = patch_size
        widths = [channels, *(max(8, width >> (levels - 1 - i)) for i in range(levels)), width, width]
        strides = [2] * levels + [1, 1]
        pairs = zip(widths[:-1], widths[1:], strides, strict=True)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=s, padding=1) for a, b, s in pairs)
        self.norms = nn.ModuleList(nn.LayerNorm(w) for w in widths[1:])
        self.out = nn.Linear(width, out)

    def forward(self, patches: Tensor, hw: tuple[tuple[int, int], ...]) -> Tensor:
        """`v (p p c)` pixels of the packed images, `hw` patch rows and columns of each -> `v d`."""
        parts: list[tuple[Tensor, Tensor]] = []
        for rows, pixels in images_by_size(patches, hw, self.patch_size):
            x = pixels
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = rearrange(conv(x), "i c h w -> i h w c")
                x = rearrange(F.gelu(norm(x)), "i h w c -> i c h w")
            parts.append((rows, rearrange(x, "i c h w -> (i h w) c")))
        order = torch.cat([rows for rows, _ in parts])
        cells = torch.cat([cells for _, cells in parts])
        return self.out(cells[torch.argsort(order)])
