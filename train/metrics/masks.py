"""Masks against the truth: intersection over union, per expression and over all pixels, as the published systems report it.

A truth is bool, or uint8 with 1 inside, 0 outside and 255 (`IGNORED`) where nothing counts. Pixels are counted in whole numbers
and divided once; LISA's and GRES's own code adds constants of 1e-5 and less to divisors, which is all that ours differ by.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from train.metrics.base import SummedMetric, ratio

Mask = NDArray[np.bool_]
Truth = NDArray[np.bool_] | NDArray[np.uint8]

IGNORED = 255
PRECISION_AT = (50, 60, 70, 80, 90)
"""Percent of IoU."""


def inside(predicted: Mask | None, truth: Truth) -> tuple[Mask, Mask]:
    """Prediction and truth as masks, both empty where the truth is `IGNORED`; no prediction is an empty one.

    Raises:
        ValueError: if they differ in size.
    """
    if predicted is None:
        predicted = np.zeros(truth.shape, dtype=bool)
    if predicted.shape != truth.shape:
        raise ValueError(
            f"a mask of {predicted.shape} cannot be compared with one of {truth.shape} (height, width)"
        )
    if truth.dtype == bool:
        return predicted, truth.astype(bool, copy=False)
    return predicted & (truth != IGNORED), truth == 1


def overlap_counts(predicted: Mask | None, truth: Truth) -> tuple[int, int]:
    """Pixels in both and pixels in either.

    Raises:
        ValueError: if the masks differ in size.
    """
    predicted, true = inside(predicted, truth)
    both = np.count_nonzero(predicted & true)
    return int(both), int(np.count_nonzero(predicted | true))


def mask_iou(predicted: Mask, truth: Truth) -> float:
    """Intersection over union of two `hh ww` masks, in [0, 1]; 1 if both are empty."""
    intersection, union = overlap_counts(predicted, truth)
    return intersection / union if union else 1.0


@dataclass(kw_only=True)
class MaskIou(SummedMetric):
    """Referring segmentation (RES): `mean_iou` (mIoU) averages over expressions, `pixel_iou` (cIoU, oIoU) sums pixels first.

    `precision_gt_50` … `precision_gt_90`: share of expressions with more IoU than that. No predicted mask counts as IoU 0.
    """

    silence_is_empty: ClassVar[bool] = False
    """Whether no predicted mask says the same as an empty one."""

    iou_sum: float = 0.0
    intersection: int = 0
    union: int = 0
    hits: Counter[str] = field(default_factory=Counter)
    count: int = 0

    def update(self, predicted: Mask | None, truth: Truth) -> None:
        intersection, union = overlap_counts(predicted, truth)
        iou = intersection / union if union else 1.0
        if predicted is None and not self.silence_is_empty:
            iou = 0.0  # no credit for an empty truth: the model did not answer
        self.iou_sum += iou
        self.intersection += intersection
        self.union += union
        for percent in PRECISION_AT:
            self.hits[str(percent)] += iou > percent / 100
        self.count += 1

    def compute(self) -> dict[str, float]:
        precision = {f"precision_gt_{p}": ratio(self.hits[str(p)], self.count) for p in PRECISION_AT}
        mean = ratio(self.iou_sum, self.count)
        return {"mean_iou": mean, "pixel_iou": ratio(self.intersection, self.union), **precision}


@dataclass(kw_only=True)
class LisaIou(MaskIou):
    """Reasoning segmentation as LISA reports it.

    `giou` averages over expressions, an empty mask of nothing being right (1); `ciou` sums pixels first. Ignored pixels (255)
    leave both counts. With nothing but empty masks `ciou` is 0, as published.

    Source: LISA 3cb2d43. Its published figures are teacher-forced: the answer with its `<SEG>` is given.
    """

    def compute(self) -> dict[str, float]:
        figures = super().compute()
        return {"giou": figures["mean_iou"], "ciou": figures["pixel_iou"]}


@dataclass(kw_only=True)
class GresIou(LisaIou):
    """Referring segmentation where an expression may name nothing (GRES).

    `giou` gives 1 for an empty mask of nothing and 0 for any other; in `ciou` false masks of nothing add to the union. `n_acc`
    and `t_acc`: share of expressions without (with) a target that are given an empty (another) mask. No predicted mask is an
    empty one here.

    Source: GRES, arXiv 2306.00968.
    """

    silence_is_empty = True

    without_target: int = 0
    without_right: int = 0
    with_target: int = 0
    with_right: int = 0

    def update(self, predicted: Mask | None, truth: Truth) -> None:
        super().update(predicted, truth)
        found, true = (bool(mask.any()) for mask in inside(predicted, truth))
        self.with_target += true
        self.with_right += true and found
        self.without_target += not true
        self.without_right += not true and not found

    def compute(self) -> dict[str, float]:
        n_acc = ratio(self.without_right, self.without_target)
        return {**super().compute(), "n_acc": n_acc, "t_acc": ratio(self.with_right, self.with_target)}
