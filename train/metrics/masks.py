"""Masks against the truth: intersection over union, per expression and over all pixels."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train.metrics.base import SummedMetric, ratio

Mask = NDArray[np.bool_]


def overlap_counts(predicted: Mask, truth: Mask) -> tuple[int, int]:
    """Pixels in both and pixels in either; counted in int64, so that no picture is too large.

    Raises:
        ValueError: if the masks differ in size.
    """
    if predicted.shape != truth.shape:
        raise ValueError(
            f"a mask of {predicted.shape} cannot be compared with one of {truth.shape} (height, width)"
        )
    both = np.count_nonzero(predicted & truth)
    return int(both), int(np.count_nonzero(predicted | truth))


def mask_iou(predicted: Mask, truth: Mask) -> float:
    """Intersection over union of two `hh ww` masks, in [0, 1]; 1 if both are empty."""
    intersection, union = overlap_counts(predicted, truth)
    return intersection / union if union else 1.0


@dataclass(kw_only=True)
class MaskIou(SummedMetric):
    """`mean_iou` averages over expressions (gIoU), `pixel_iou` sums pixels first (cIoU). No predicted mask counts as empty."""

    iou_sum: float = 0.0
    intersection: int = 0
    union: int = 0
    count: int = 0

    def update(self, predicted: Mask | None, truth: Mask) -> None:
        missing = predicted is None
        intersection, union = overlap_counts(np.zeros_like(truth) if predicted is None else predicted, truth)
        # A model that stayed silent gets no credit for an empty truth: it did not answer.
        self.iou_sum += 0.0 if missing else (intersection / union if union else 1.0)
        self.intersection += intersection
        self.union += union
        self.count += 1

    def compute(self) -> dict[str, float]:
        return {
            "mean_iou": ratio(self.iou_sum, self.count),
            "pixel_iou": ratio(self.intersection, self.union),
        }
