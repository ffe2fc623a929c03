"""The metrics against the published systems' own code and against the reference libraries, on stored cases."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from train.metrics.boxes import BoxAccuracy
from train.metrics.detection import BoxAp, Found, MaskAp
from train.metrics.masks import GresIou, LisaIou, MaskIou, overlap_counts
from train.metrics.surfaces import Dice, SurfaceDistance

GOLDEN = Path(__file__).parents[2] / "golden" / "grounding"


def _cases(name):
    return json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")


def test_lisa():
    cases, tensors = _cases("lisa_metrics")
    for case in cases["sets"]:
        metric = LisaIou()
        for row in case["per_mask"]:
            at = f"{case['id']}.img{row['img']}"
            predicted, truth = tensors[f"{at}.pred_logits"][row["mask"]] > 0, tensors[f"{at}.gt"][row["mask"]]
            assert overlap_counts(predicted, truth) == (row["inter"], row["union"]), row
            metric.update(predicted, truth)
        figures = metric.compute()
        assert figures["giou"] == pytest.approx(case["exact_giou"], abs=1e-12)
        assert figures["ciou"] == pytest.approx(case["exact_ciou"] or 0.0, abs=1e-12)
        # Measured: 5.0e-6 where nothing is there and nothing is found, else 2.4e-6; the published constants are 1e-5.
        assert figures["giou"] == pytest.approx(case["upstream_giou"], abs=1e-5)
        assert figures["ciou"] == pytest.approx(case["upstream_ciou"], abs=1e-5)


def test_referring_segmentation():
    cases, tensors = _cases("res_metrics")
    for case in cases["res"]:
        metric = MaskIou()
        for i, counts in enumerate(case["inter_union"]):
            predicted, truth = (tensors[f"{case['id']}.{i}.{side}"] > 0 for side in ("pred", "gt"))
            assert list(overlap_counts(predicted, truth)) == counts
            metric.update(predicted, truth)
        figures = metric.compute()
        assert figures["pixel_iou"] == pytest.approx(case["cIoU_oIoU"], abs=1e-9)
        assert figures["mean_iou"] == pytest.approx(case["mIoU_gIoU"], abs=1e-9)
        for percent in (50, 60, 70, 80, 90):
            wanted = case[f"precision_gt_{percent / 100}"]
            assert figures[f"precision_gt_{percent}"] == pytest.approx(wanted, abs=1e-9)


def test_expressions_that_may_name_nothing():
    cases, tensors = _cases("res_metrics")
    for case in cases["gres"]:
        metric = GresIou()
        for i, row in enumerate(case["per"]):
            predicted, truth = (tensors[f"{case['id']}.{i}.{side}"] > 0 for side in ("pred", "gt"))
            assert overlap_counts(predicted, truth) == (row["inter"], row["union"])
            metric.update(
                None if row["pred_empty"] else predicted, truth
            )  # silence says the same as an empty mask
        wanted = {"giou": case["gIoU"], "ciou": case["cIoU"], "n_acc": case["N_acc"], "t_acc": case["T_acc"]}
        assert metric.compute() == pytest.approx(wanted, abs=1e-9)


def test_dice_and_surface_distance():
    cases, tensors = _cases("medical_metrics")
    for case in cases["cases"]:
        dice, surface = Dice(), SurfaceDistance()
        predicted, truth = (tensors[f"{case['id']}.{side}"] > 0 for side in ("pred", "gt"))
        dice.update(predicted, truth)
        surface.update(predicted, truth, case["spacing"])
        assert dice.compute()["dice"] == pytest.approx(case["monai_dice_ignore_empty_false"], abs=1e-5)
        if case["monai_dice_ignore_empty_true"] != "nan":
            assert dice.compute()["dice_of_present"] == pytest.approx(
                case["monai_dice_ignore_empty_true"], abs=1e-5
            )
        else:
            assert dice.present == 0
        found = surface.compute()
        if case["kind"] in ("pred_empty", "gt_empty"):
            assert found["hd95"] == pytest.approx(np.hypot(*truth.shape)) and found["hd95_one_empty"] == 1
            assert surface.both == 0
        elif case["kind"] == "both_empty":
            assert found["hd95"] == 0 and found["hd95_one_empty"] == 0
        else:
            assert found["hd95"] == pytest.approx(case["monai_hd95"], abs=1e-5)
            assert found["hd95"] == pytest.approx(case["edt_hd95_max_of_directed"], abs=1e-9)
            assert found["hd95_pooled"] == pytest.approx(case["edt_hd95_pooled_medpy_style"], abs=1e-9)


def test_one_box_per_expression():
    cases, tensors = _cases("box_losses")
    for case in cases["acc"]:
        pairs = zip(*(tensors[f"{case['id']}.{name}"] for name in ("pred_xyxy", "gt_xyxy")), strict=True)
        metric = BoxAccuracy()
        for predicted, truth in pairs:
            metric.update(predicted.tolist(), truth.tolist())
        figures = metric.compute()
        assert figures["acc_50"] == pytest.approx(case["acc_ge_0_5"], abs=1e-6)
        assert figures["acc_gt_50"] == pytest.approx(case["acc_gt_0_5"], abs=1e-6)
        assert figures["acc_gt_70"] == pytest.approx(case["acc_gt_0_7"], abs=1e-6)
        assert figures["mean_iou"] == pytest.approx(case["mean_iou"], abs=1e-5)


def _found(thing, categories):
    x, y, w, h = thing["bbox"]
    return Found(
        box=(x, y, x + w, y + h),
        label=categories[thing["category_id"]],
        score=thing.get("score", 1.0),
        mask=thing["segmentation"],
        crowd=bool(thing.get("iscrowd", 0)),
        area=thing.get("area"),
    )


def test_average_precision():
    for case in json.loads((GOLDEN / "coco_map.json").read_text())["sets"]:
        truth = case["ground_truth"]
        names = {c["id"]: str(c["name"]) for c in truth["categories"]}
        for kind, metric in (("bbox", BoxAp()), ("segm", MaskAp())):
            for image in truth["images"]:
                found, true = (
                    [_found(t, names) for t in things if t["image_id"] == image["id"]]
                    for things in (case["detections"], truth["annotations"])
                )
                metric.update(found, true, (image["width"], image["height"]))
            assert list(metric.compute().values()) == pytest.approx(case["stats"][kind], abs=1e-9)
