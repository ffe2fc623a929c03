"""Boxes against the truth. Boxes are xyxy in any one unit, the same for both."""

from collections.abc import Sequence
from dataclasses import dataclass

from train.metrics.base import SummedMetric, ratio

Box = Sequence[float]


def box_area(box: Box) -> float:
    """Area of an xyxy box; 0 for a box turned inside out."""
    left, top, right, bottom = box
    return max(right - left, 0.0) * max(bottom - top, 0.0)


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, in [0, 1]; 0 if both are empty."""
    overlap = box_area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = box_area(a) + box_area(b) - overlap
    return overlap / union if union > 0 else 0.0


@dataclass(kw_only=True)
class BoxAccuracy(SummedMetric):
    """Mean IoU, and the share of boxes with IoU of at least 0.5. No predicted box counts as IoU 0."""

    iou_sum: float = 0.0
    hits: int = 0
    count: int = 0

    def update(self, predicted: Box | None, truth: Box) -> None:
        iou = 0.0 if predicted is None else box_iou(predicted, truth)
        self.iou_sum += iou
        self.hits += iou >= 0.5
        self.count += 1

    def compute(self) -> dict[str, float]:
        return {"acc_50": ratio(self.hits, self.count), "mean_iou": ratio(self.iou_sum, self.count)}
