"""Ways to look at the feature grids of packed images."""

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from modeling.types import FeatureGrids


def gather_patches(grids: FeatureGrids, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Patches of one image per region, padded to the longest.

    Args:
        grids: features of all images.
        image: `r` int64.

    Returns:
        features `r n d`, valid `r n` bool, patch centres `r n 2` as x y in [0, 1] of the image.
    """
    device = grids.values.device
    hw = torch.tensor(grids.hw or [(1, 1)], device=device)
    count = hw.prod(1)
    first = count.cumsum(0) - count
    longest = int(count.max())
    place = torch.arange(longest, device=device)
    hw_r = hw[image]
    valid = place[None] < count[image][:, None]
    index = torch.where(valid, first[image][:, None] + place[None], 0)
    row = torch.div(place[None], hw_r[:, 1:], rounding_mode="floor")
    centre = torch.stack([(place[None] % hw_r[:, 1:] + 0.5) / hw_r[:, 1:], (row + 0.5) / hw_r[:, :1]], dim=-1)
    return grids.values[index], valid, centre


def regions_by_size(grids: FeatureGrids, image: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Regions grouped by the size of their image, so that a head can run convolutions.

    Args:
        grids: features of all images.
        image: `r` int64.

    Yields:
        places of the regions `k`; the group's images that are used: features `i h w d` and pixels `i 3 hh ww` uint8; and
        which of these each region is about, `k`. Without regions, one group of nothing: the head's parameters must take part
        in every step.
    """
    p = grids.patch_size
    if not len(image):
        # Sliced from the features, so that they stay in the graph too.
        yield image, grids.values[:0].reshape(0, 1, 1, grids.values.shape[1]), _no_pixels(grids), image
        return
    first = [0]
    for h, w in grids.hw:
        first.append(first[-1] + h * w)
    wanted = image.tolist()
    for h, w in sorted({grids.hw[i] for i in wanted}):
        at = [r for r, i in enumerate(wanted) if grids.hw[i] == (h, w)]
        images = sorted({wanted[r] for r in at})
        rows = torch.tensor([first[i] for i in images], device=image.device)[:, None]
        index = rows + torch.arange(h * w, device=image.device)[None]
        features = grids.values[index].unflatten(1, (h, w))
        pixels = rearrange(grids.pixels[index], "i (h w) (p q c) -> i c (h p) (w q)", h=h, p=p, q=p)
        which = torch.tensor([images.index(wanted[r]) for r in at], device=image.device)
        yield torch.tensor(at, device=image.device), features, pixels, which


def _no_pixels(grids: FeatureGrids) -> Tensor:
    return grids.pixels.new_zeros(0, 3, grids.patch_size, grids.patch_size)
