"""Medical segmentation: Dice, and the distance between surfaces in millimetres. Masks of two or three dimensions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modeling.optional import require
from train.metrics.base import SummedMetric, ratio
from train.metrics.masks import Mask, Truth, inside


@dataclass(kw_only=True)
class Dice(SummedMetric):
    """`dice`: mean over samples of 2 |A and B| / (|A| + |B|), two empty masks counting 1.

    `dice_of_present`: mean over the samples whose truth is not empty. `dice_of_pixels`: pixels summed over samples first. No
    predicted mask is an empty one.
    """

    dice_sum: float = 0.0
    present_sum: float = 0.0
    present: int = 0
    intersection: int = 0
    size: int = 0
    count: int = 0

    def update(self, predicted: Mask | None, truth: Truth) -> None:
        found, true = inside(predicted, truth)
        both = int(np.count_nonzero(found & true))
        true_size = int(np.count_nonzero(true))
        size = int(np.count_nonzero(found)) + true_size
        dice = 2 * both / size if size else 1.0
        self.dice_sum += dice
        self.present_sum += dice if true_size else 0.0
        self.present += true_size > 0
        self.intersection += both
        self.size += size
        self.count += 1

    def compute(self) -> dict[str, float]:
        return {
            "dice": ratio(self.dice_sum, self.count),
            "dice_of_present": ratio(self.present_sum, self.present),
            "dice_of_pixels": ratio(2 * self.intersection, self.size),
        }


@dataclass(kw_only=True)
class SurfaceDistance(SummedMetric):
    """95th percentile of the distance between surfaces, mean over samples, in the unit of the spacing (mm).

    `hd95` is the larger of the two directions' percentiles (MONAI), `hd95_pooled` the percentile of both directions' distances
    together (medpy). Where one side is empty there is no distance: `hd95` and `hd95_pooled` then count the picture's diagonal, so
    that a model that predicts nothing does not look good, and 0 where both are. `hd95_of_both` is the mean over samples with two
    surfaces, as MONAI's mean is, and `hd95_one_empty` the share of those with one.
    """

    hd95_sum: float = 0.0
    pooled_sum: float = 0.0
    both_sum: float = 0.0
    both: int = 0
    one_empty: int = 0
    count: int = 0

    def update(self, predicted: Mask | None, truth: Truth, spacing: Sequence[float] | None = None) -> None:
        """Count one sample; `spacing`: of the mask's axes in order (rows first), 1 if not given."""
        found, true = inside(predicted, truth)
        steps = [1.0] * true.ndim if spacing is None else list(spacing)
        if len(steps) != true.ndim or not all(step > 0 for step in steps):
            raise ValueError(f"spacing {steps} of a mask with {true.ndim} axes: give each its step in mm")
        sides = bool(found.any()) + bool(true.any())
        self.count += 1
        if sides == 1:
            diagonal = float(np.linalg.norm(np.array(true.shape) * steps))
            self.hd95_sum += diagonal
            self.pooled_sum += diagonal
            self.one_empty += 1
        if sides == 2:
            there, back = surface_distances(found, true, steps)
            largest = max(float(np.percentile(d, 95)) for d in (there, back))
            self.hd95_sum += largest
            self.both_sum += largest
            self.pooled_sum += float(np.percentile(np.concatenate([there, back]), 95))
            self.both += 1

    def compute(self) -> dict[str, float]:
        return {
            "hd95": ratio(self.hd95_sum, self.count),
            "hd95_pooled": ratio(self.pooled_sum, self.count),
            "hd95_of_both": ratio(self.both_sum, self.both),
            "hd95_one_empty": ratio(self.one_empty, self.count),
        }


def surface_distances(
    a: Mask, b: Mask, spacing: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distance of every surface pixel of one mask from the other's surface, both ways.

    A surface pixel is inside and shares a face with one that is outside, or lies at the border of the picture.

    Args:
        a, b: of one shape; neither is empty.
        spacing: step of each axis.
    """
    ndimage = require("scipy.ndimage", package="scipy", extra="metrics", why="the distance between surfaces")
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (a, b)]
    # Of every pixel from the nearest pixel of a surface.
    from_a, from_b = (ndimage.distance_transform_edt(~s, sampling=spacing) for s in surfaces)
    return from_b[surfaces[0]], from_a[surfaces[1]]
