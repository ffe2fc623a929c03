"""Boxes of several things: F1 and its matching, average precision against pycocotools, two processes against one."""

import contextlib
import io
from collections.abc import Sequence

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from train.metrics.detection import BoxAp, BoxF1, Found, assign
from train.metrics.text import CaptionMatch, edit_distance


def _scene(rng, true: int, spurious: int) -> tuple[list[Found], list[Found]]:
    """Things of a picture of 200 px, most of them found with some error and sometimes under another name."""
    corner, size = rng.uniform(0, 100, (true, 2)), rng.uniform(4, 100, (true, 2))
    truths = [
        Found(box=(*c, *(c + s)), label=str(rng.integers(3)), crowd=bool(rng.random() < 0.1))
        for c, s in zip(corner, size, strict=True)
    ]
    found = [
        Found(
            box=np.sort((np.array(t.box) + rng.normal(0, 5, 4)).reshape(2, 2), axis=0).ravel(),
            label=t.label if rng.random() < 0.9 else "2",
            score=float(rng.random()),
        )
        for t in truths
        if rng.random() < 0.8
    ]
    found += [
        Found(box=(0, 0, *rng.uniform(5, 90, 2)), label="0", score=float(rng.random()))
        for _ in range(spurious)
    ]
    return found, truths


def _pycocotools(scenes: Sequence[tuple[list[Found], list[Found]]]) -> list[float]:
    def box(found: Found) -> list[float]:
        x0, y0, x1, y1 = (float(v) for v in found.box)
        return [x0, y0, x1 - x0, y1 - y0]

    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": i} for i in range(len(scenes))],
        "categories": [{"id": k, "name": str(k)} for k in range(3)],
        "annotations": [
            {"image_id": i, "bbox": box(t), "area": box(t)[2] * box(t)[3], "category_id": int(t.label), "iscrowd": int(t.crowd)}
            for i, (_, truths) in enumerate(scenes)
            for t in truths
        ],
    }  # fmt: skip
    for number, row in enumerate(truth.dataset["annotations"], 1):
        row["id"] = number
    found = [
        {"image_id": i, "bbox": box(p), "score": p.score, "category_id": int(p.label)}
        for i, (predicted, _) in enumerate(scenes)
        for p in predicted
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(found), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return list(run.stats)


@pytest.mark.parametrize("without_faster", [False, True])
def test_average_precision_is_that_of_pycocotools_and_of_two_processes(without_faster, monkeypatch):
    if without_faster:
        monkeypatch.setattr("train.metrics.detection.if_installed", lambda name: None)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        scenes = [_scene(rng, int(rng.integers(6)), int(rng.integers(4))) for _ in range(12)]
        halves = BoxAp(), BoxAp()
        for number, scene in enumerate(scenes):
            halves[number % 2].update(*scene)
        merged = halves[0].merge(halves[1]).compute()
        wanted = _pycocotools([*scenes[::2], *scenes[1::2]])
        assert 0 < wanted[0] < 1
        assert list(merged.values()) == pytest.approx(wanted, abs=1e-6)


def test_nothing_found_has_no_precision():
    metric = BoxAp()
    metric.update([], [Found(box=(0, 0, 50, 50), label="a")])
    figures = metric.compute()
    assert (figures["ap"], figures["ar_100"], figures["ap_small"]) == (0, 0, -1)


def test_as_many_pairs_as_can_be_come_before_a_larger_overlap():
    iou = np.array([[0.95, 0.6], [0.6, 0.0]])
    assert assign(iou, 0.5) == [(0, 1), (1, 0)]
    assert assign(iou, 0.7) == [(0, 0)]
    assert assign(np.zeros((0, 3)), 0.5) == []


def test_f1_counts_labels_at_every_level_and_pictures_without_things():
    metric = BoxF1()
    box, other, near = (0, 0, 10, 10), (20, 20, 30, 30), (0, 0, 10, 8)
    metric.update(
        [Found(box=near, label="Cable/fibre"), Found(box=other, label="screw")],
        [Found(box=box, label="cable/fibre/bent"), Found(box=other, label="screw")],
    )
    metric.update([Found(box=box, label="screw")], [])  # a false alarm
    metric.update([], [Found(box=box, label="x", crowd=True)])
    figures = metric.compute()
    assert figures["f1_50"] == pytest.approx(2 / 5)
    assert figures["f1_50_type"] == figures["f1_50_hierarchy"] == figures["f1_50_any"] == pytest.approx(4 / 5)
    assert figures["f1_75_any"] == pytest.approx(4 / 5)
    assert figures["f1_any"] == pytest.approx((7 * 4 / 5 + 3 * 2 / 5) / 10)  # 0.8 is met by both up to 0.80
    assert (figures["precision_50"], figures["recall_50"]) == pytest.approx((1 / 3, 1 / 2))
    assert figures["macro_f1_50"] == pytest.approx((0 + 2 / 3) / 2)
    assert figures["matched_iou"] == 1.0
    assert (figures["count_exact"], figures["count_error"]) == pytest.approx((2 / 3, 1 / 3))


def test_f1_does_not_hang_on_the_order_of_boxes():
    rng = np.random.default_rng(3)
    found, truths = _scene(rng, 6, 3)
    first, second = BoxF1(), BoxF1()
    first.update(found, truths)
    second.update(found[::-1], truths[::-1])
    assert first.compute() == pytest.approx(second.compute())


def test_captions():
    metric = CaptionMatch()
    metric.update("cable / Fibre", "cable/fibre/bent")
    metric.update(None, "screw")
    metric.update("screw", "screw")
    figures = metric.compute()
    assert figures["caption_exact"] == pytest.approx(1 / 3)
    assert figures["caption_type"] == pytest.approx(2 / 3)
    assert figures["caption_levels"] == pytest.approx(3 / 5)
    assert (edit_distance("kitten", "sitting"), edit_distance("", "abc"), edit_distance("ab", "ab")) == (
        3,
        3,
        0,
    )
