"""The metrics by name. Each has `update` (one sample), `merge` (its state is sums) and `compute` (figures by name)."""

from train.metrics.base import SummedMetric
from train.metrics.boxes import BoxAccuracy
from train.metrics.detection import BoxAp, BoxF1, MaskAp
from train.metrics.image import DrawnDigits, PictureFidelity
from train.metrics.masks import GresIou, LisaIou, MaskIou
from train.metrics.surfaces import Dice, SurfaceDistance
from train.metrics.text import CaptionMatch, ExactMatch

METRICS: dict[str, type[SummedMetric]] = {
    "exact_match": ExactMatch,
    "caption": CaptionMatch,
    "box": BoxAccuracy,
    "box_f1": BoxF1,
    "box_ap": BoxAp,
    "mask": MaskIou,
    "mask_ap": MaskAp,
    "lisa": LisaIou,
    "gres": GresIou,
    "dice": Dice,
    "hd95": SurfaceDistance,
    "psnr": PictureFidelity,
    "drawn_digits": DrawnDigits,
}
