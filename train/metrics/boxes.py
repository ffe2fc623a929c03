"""Boxes against the truth. Boxes are xyxy in any one unit, the same for both."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from train.metrics.base import SummedMetric, ratio

Box = Sequence[float]

ACCURACY_AT = (50, 70, 75, 90)
"""Percent of IoU."""


def box_area(box: Box) -> float:
    """Area of an xyxy box; 0 for a box turned inside out."""
    left, top, right, bottom = box
    return max(right - left, 0.0) * max(bottom - top, 0.0)


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, in [0, 1]; 0 if both are empty."""
    overlap = box_area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = box_area(a) + box_area(b) - overlap
    return float(overlap / union) if union > 0 else 0.0


@dataclass(kw_only=True)
class BoxAccuracy(SummedMetric):
    """One box per expression (REC): mean IoU, and the share of boxes above an IoU. No predicted box counts as IoU 0.

    Published systems differ in what counts at exactly the threshold, so there are both: `acc_50` is IoU of at least 0.5,
    `acc_gt_50` (Shikra, PerceptionGPT) more than 0.5.
    """

    iou_sum: float = 0.0
    hits: Counter[str] = field(default_factory=Counter)
    count: int = 0

    def update(self, predicted: Box | None, truth: Box) -> None:
        iou = 0.0 if predicted is None else box_iou(predicted, truth)
        self.iou_sum += iou
        for percent in ACCURACY_AT:
            self.hits[f"acc_{percent}"] += iou >= percent / 100
            self.hits[f"acc_gt_{percent}"] += iou > percent / 100
        self.count += 1

    def compute(self) -> dict[str, float]:
        names = [f"acc_{sign}{percent}" for percent in ACCURACY_AT for sign in ("", "gt_")]
        figures = {name: ratio(self.hits[name], self.count) for name in names}
        return {**figures, "mean_iou": ratio(self.iou_sum, self.count)}
