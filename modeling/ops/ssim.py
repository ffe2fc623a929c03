"""Structural similarity of pictures, differentiable."""

import torch
import torch.nn.functional as F
from torch import Tensor

SIGMA = 1.5
C1, C2 = 0.01**2, 0.03**2
"""(K1 L)^2 and (K2 L)^2 for values in [0, 1]."""


def ssim(a: Tensor, b: Tensor, window: int = 11) -> Tensor:
    """Mean structural similarity over channels and all places where the window lies within the picture.

    Args:
        a, b: `i c hh ww`, values in [0, 1].
        window: side of the Gaussian window (sigma 1.5); a smaller picture has a window of its own smaller side.

    Returns:
        `i`, at most 1.

    Source: Wang et al. 2004 (doi 10.1109/TIP.2003.819861), with weighted, not sample, covariances.
    """
    side = min(window, *a.shape[2:])
    place = torch.arange(side, dtype=a.dtype, device=a.device) - (side - 1) / 2
    line = torch.exp(-(place**2) / (2 * SIGMA**2))
    line = line / line.sum()
    maps = torch.cat([a, b, a * a, b * b, a * b]).flatten(0, 1)[:, None]
    maps = F.conv2d(F.conv2d(maps, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))
    mean_a, mean_b, aa, bb, ab = maps.view(5, len(a), -1, *maps.shape[2:])
    var_a, var_b, both = aa - mean_a**2, bb - mean_b**2, ab - mean_a * mean_b
    light = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    structure = (2 * both + C2) / (var_a + var_b + C2)
    each: Tensor = (light * structure).flatten(1).mean(1)
    return each
