"""Several things in one picture: F1 over matched boxes, and COCO's average precision.

Boxes are xyxy in pixels of the original picture, labels any text; a label's levels are parted by `/`.
"""

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modeling.optional import if_installed, require
from train.metrics.base import SummedMetric, ratio
from train.metrics.boxes import Box, box_iou
from train.metrics.text import levels, normalise, shared_levels


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One thing in a picture, predicted or true.

    Attributes:
        box: xyxy.
        label: what it is.
        score: how sure the model is; of a true thing without meaning.
        mask: COCO's RLE or polygons, for `MaskAp`.
        crowd: a true region with many things in it: finding some of them is neither right nor wrong.
        area: of a true thing, for COCO's size classes; None: that of its box.
    """

    box: Box
    label: str = ""
    score: float = 1.0
    mask: Any = None
    crowd: bool = False
    area: float | None = None


# ------------------------------------------------------------------------------------------------------------------ F1

F1_AT = tuple(range(50, 100, 5))
"""Percent of IoU."""

MATCHES: dict[str, Callable[[str, str], bool]] = {
    "": lambda said, true: normalise(said) == normalise(true),
    "_type": lambda said, true: levels(said)[0] == levels(true)[0],
    "_hierarchy": lambda said, true: shared_levels(said, true) == min(len(levels(said)), len(levels(true))),
    "_any": lambda said, true: True,
}
"""Ending of a figure's name -> when two labels match: equal; first level equal; equal as far as the coarser one says; always."""


def assign(iou: NDArray[np.float64], least: float) -> list[tuple[int, int]]:
    """Pairs of rows and columns, one to one, with IoU of at least `least`: as many as can be, of these the largest sum of IoU.

    Args:
        iou: `p t`, 0 where two must not be paired.
        least: above 0.
    """
    if not iou.size:
        return []
    optimize = require("scipy.optimize", package="scipy", extra="metrics", why="F1 over matched boxes")
    worth = np.where(iou >= least, 1 + iou / (2 * max(iou.shape)), 0.0)  # a further pair outweighs all sums
    rows, columns = optimize.linear_sum_assignment(-worth)
    return [(int(r), int(c)) for r, c in zip(rows, columns, strict=True) if iou[r, c] >= least]


@dataclass(kw_only=True)
class BoxF1(SummedMetric):
    """F1 of boxes at an IoU of at least 0.5 and 0.75, and its mean over 0.5 to 0.95 (`f1`), pictures counted together.

    Figures without an ending need equal labels, those of `MATCHES` less. `macro_f1_50`: mean over the labels that are true
    somewhere. `matched_iou`: of the pairs of `f1_50`. `count_exact`, `count_error`: pictures with as many boxes as things, and by
    how many they are off. Crowd regions are no things.
    """

    hits: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    iou_sum: float = 0.0
    predicted: int = 0
    true: int = 0
    count_exact: int = 0
    count_error: int = 0
    count: int = 0

    def update(self, predicted: Sequence[Found], truths: Sequence[Found]) -> None:
        truths = [t for t in truths if not t.crowd]
        overlap = np.array([[box_iou(p.box, t.box) for t in truths] for p in predicted])
        for ending, same in MATCHES.items():
            iou = overlap * np.array([[same(p.label, t.label) for t in truths] for p in predicted])
            pairs = {percent: assign(iou, percent / 100) for percent in F1_AT}
            self.hits.update({f"{percent}{ending}": len(found) for percent, found in pairs.items()})
            if not ending:
                self.iou_sum += sum(float(iou[pair]) for pair in pairs[50])
                self.labels.update(f"hit {normalise(truths[t].label)}" for _, t in pairs[50])
        self.labels.update(f"said {normalise(p.label)}" for p in predicted)
        self.labels.update(f"true {normalise(t.label)}" for t in truths)
        self.predicted += len(predicted)
        self.true += len(truths)
        self.count_exact += len(predicted) == len(truths)
        self.count_error += abs(len(predicted) - len(truths))
        self.count += 1

    def compute(self) -> dict[str, float]:
        boxes = self.predicted + self.true
        figures: dict[str, float] = {}
        for ending in MATCHES:
            at = {percent: ratio(2 * self.hits[f"{percent}{ending}"], boxes) for percent in F1_AT}
            figures |= {
                f"f1_50{ending}": at[50],
                f"f1_75{ending}": at[75],
                f"f1{ending}": sum(at.values()) / len(at),
            }
        names = [name.removeprefix("true ") for name in self.labels if name.startswith("true ")]
        per_label = [
            ratio(2 * self.labels[f"hit {n}"], self.labels[f"said {n}"] + self.labels[f"true {n}"])
            for n in names
        ]
        return {
            **figures,
            "precision_50": ratio(self.hits["50"], self.predicted),
            "recall_50": ratio(self.hits["50"], self.true),
            "macro_f1_50": ratio(sum(per_label), len(per_label)),
            "matched_iou": ratio(self.iou_sum, self.hits["50"]),
            "count_exact": ratio(self.count_exact, self.count),
            "count_error": ratio(self.count_error, self.count),
        }


# ------------------------------------------------------------------------------------------------- average precision

STATS = ("ap", "ap_50", "ap_75", "ap_small", "ap_medium", "ap_large",
         "ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large")  # fmt: skip


@dataclass(kw_only=True)
class BoxAp(SummedMetric):
    """COCO's average precision of boxes (mAP), 12 figures; -1 where no thing has that size, as COCO reports it.

    Computed by faster-coco-eval, or by pycocotools if only that is installed. Precision needs every box's score, so all
    are kept: this metric grows with the pictures.
    """

    pictures: list[dict[str, Any]] = field(default_factory=list)

    def update(
        self, predicted: Sequence[Found], truths: Sequence[Found], size: tuple[int, int] = (0, 0)
    ) -> None:
        """Count one picture; `size`: its width and height, which polygons of masks need."""
        picture = {
            "size": list(size),
            "predicted": [{**_as_coco(p), "score": float(p.score)} for p in predicted],
            "true": [{**_as_coco(t), "area": _area(t), "iscrowd": int(t.crowd)} for t in truths],
        }
        self.pictures.append(picture)

    def compute(self) -> dict[str, float]:
        return _figures(self.pictures, "bbox", "")


@dataclass(kw_only=True)
class MaskAp(BoxAp):
    """The same of masks: `mask_ap` …."""

    def compute(self) -> dict[str, float]:
        return _figures(self.pictures, "segm", "mask_")


def _as_coco(found: Found) -> dict[str, Any]:
    x0, y0, x1, y1 = (float(v) for v in found.box)
    thing: dict[str, Any] = {"bbox": [x0, y0, x1 - x0, y1 - y0], "label": normalise(found.label)}
    return thing if found.mask is None else {**thing, "segmentation": found.mask}


def _area(found: Found) -> float:
    x0, y0, x1, y1 = (float(v) for v in found.box)
    return (x1 - x0) * (y1 - y0) if found.area is None else found.area


def _figures(pictures: Sequence[dict[str, Any]], kind: str, prefix: str) -> dict[str, float]:
    values: Sequence[float] = [0.0] * len(STATS)
    if any(picture["true"] for picture in pictures):
        values = _evaluated(pictures, kind).tolist()
    return {prefix + name: float(v) for name, v in zip(STATS, values, strict=True)}


def _evaluated(pictures: Sequence[dict[str, Any]], kind: str) -> NDArray[np.float64]:
    labels = sorted(
        {thing["label"] for picture in pictures for thing in (*picture["true"], *picture["predicted"])}
    )
    numbers = {label: number for number, label in enumerate(labels, 1)}
    truths = [
        {**t, "id": n, "image_id": i, "category_id": numbers[t["label"]]}
        for n, (i, t) in enumerate(((i, t) for i, p in enumerate(pictures, 1) for t in p["true"]), 1)
    ]
    found = [
        {**p, "image_id": i, "category_id": numbers[p["label"]]}
        for i, picture in enumerate(pictures, 1)
        for p in picture["predicted"]
    ]
    if not found:  # pycocotools cannot load an empty list; nothing found is 0 of everything that there is
        found = [{"bbox": [0.0, 0.0, 0.0, 0.0], "score": 0.0, "image_id": 1, "category_id": 1}]
        if kind == "segm":
            height, width = _hw(pictures[0])
            found[0]["segmentation"] = {"size": [height, width], "counts": [height * width]}
    images = [{"id": i, "width": p["size"][0], "height": p["size"][1]} for i, p in enumerate(pictures, 1)]
    content = {
        "info": {},
        "images": images,
        "annotations": truths,
        "categories": [{"id": number, "name": label} for label, number in numbers.items()],
    }
    table, evaluation = _library()
    with contextlib.redirect_stdout(io.StringIO()):  # both print as they go
        truth = table()
        truth.dataset = content
        truth.createIndex()
        run = evaluation(truth, truth.loadRes(found), kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return np.asarray(run.stats[: len(STATS)], np.float64)


def _hw(picture: dict[str, Any]) -> tuple[int, int]:
    return picture["size"][1], picture["size"][0]


def _library() -> tuple[Any, Any]:
    faster: ModuleType | None = if_installed("faster_coco_eval")
    if faster is not None:
        return faster.COCO, faster.COCOeval_faster
    why = "COCO's average precision"
    coco = require("pycocotools.coco", package="pycocotools", extra="metrics", why=why)
    return coco.COCO, require(
        "pycocotools.cocoeval", package="pycocotools", extra="metrics", why=why
    ).COCOeval
