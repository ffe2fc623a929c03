"""The metrics by name. Each has `update` (one sample), `merge` (its state is sums) and `compute` (figures by name)."""

from train.metrics.base import SummedMetric
from train.metrics.boxes import BoxAccuracy
from train.metrics.image import DrawnDigits, PictureFidelity
from train.metrics.masks import MaskIou
from train.metrics.text import ExactMatch

METRICS: dict[str, type[SummedMetric]] = {
    "exact_match": ExactMatch,
    "box": BoxAccuracy,
    "mask": MaskIou,
    "psnr": PictureFidelity,
    "drawn_digits": DrawnDigits,
}
