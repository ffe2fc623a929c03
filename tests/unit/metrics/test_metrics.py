"""The metrics' values, and that merging the metrics of two halves gives the metric of the whole."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.metrics import METRICS
from train.metrics.boxes import BoxAccuracy, box_iou
from train.metrics.detection import Found
from train.metrics.image import PSNR_CAP, DrawnDigits, PictureFidelity, colours_match, digits_match, psnr
from train.metrics.masks import MaskIou, mask_iou
from train.metrics.text import ExactMatch


def _picture(rng, side=6):
    return rng.integers(0, 256, (side, side, 3), dtype=np.uint8)


def _mask(rng):
    return rng.random((5, 7)) < 0.4


def _box(rng):
    return tuple(np.sort(rng.uniform(0, 64, (2, 2)), axis=0).ravel())


def _things(rng):
    """Predicted and true things of one picture, some of them alike; masks are the boxes' own outlines."""

    def thing(label, box, score=1.0):
        x0, y0, x1, y1 = (float(v) for v in box)
        return Found(box=box, label=label, score=score, mask=[[x0, y0, x1, y0, x1, y1, x0, y1]])

    truths = [thing(f"cable/{rng.integers(2)}", _box(rng)) for _ in range(rng.integers(4))]
    near = [
        thing(
            t.label, np.sort((np.array(t.box) + rng.normal(0, 2, 4)).reshape(2, 2), 0).ravel(), rng.random()
        )
        for t in truths
    ]
    return [*near, thing("screw", _box(rng), rng.random())], truths, (64, 64)


SAMPLES = {
    "exact_match": lambda rng: (str(rng.integers(3)), str(rng.integers(3))),
    "caption": lambda rng: (f"cable/{rng.integers(3)}", f"cable/{rng.integers(3)}/long"),
    "box_f1": lambda rng: _things(rng)[:2],
    "box_ap": _things,
    "mask_ap": _things,
    "lisa": lambda rng: (_mask(rng), _mask(rng)),
    "gres": lambda rng: (_mask(rng), _mask(rng) & bool(rng.integers(2))),
    "dice": lambda rng: (_mask(rng), _mask(rng)),
    "hd95": lambda rng: (_mask(rng), _mask(rng), (0.5, 2.0)),
    "box": lambda rng: (_box(rng), _box(rng)),
    "mask": lambda rng: (_mask(rng), _mask(rng)),
    "psnr": lambda rng: (_picture(rng), _picture(rng)),
    "drawn_digits": lambda rng: ([(int(rng.integers(2)), "red")], [(int(rng.integers(2)), "red")]),
}


@pytest.mark.parametrize("name", METRICS)
def test_merging_two_halves_gives_the_whole(name):
    rng = np.random.default_rng(0)
    samples = [SAMPLES[name](rng) for _ in range(20)]
    whole, first, second = METRICS[name](), METRICS[name](), METRICS[name]()
    for i, sample in enumerate(samples):
        whole.update(*sample)
        (first if i < 7 else second).update(*sample)
    merged = first.merge(METRICS[name].from_json(json.loads(json.dumps(second.to_json()))))
    assert merged.compute() == pytest.approx(whole.compute())
    assert first.compute() != merged.compute()  # merging leaves its operands alone


@pytest.mark.parametrize("name", METRICS)
def test_nothing_counted_is_no_success(name):
    assert set(METRICS[name]().compute().values()) == {0.0}


def test_exact_match_ignores_case_and_white_space_only():
    metric = ExactMatch()
    for answer in (" Red  7\n", "red 7", "red7", ""):
        metric.update(answer, "red 7")
    assert metric.compute() == {"exact": 0.5}


def test_box_iou():
    assert box_iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1.0
    assert box_iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert box_iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0.0
    assert box_iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0.0
    assert box_iou((3, 3, 1, 1), (1, 1, 3, 3)) == 0.0  # turned inside out


def test_box_accuracy_counts_a_missing_box_and_exactly_one_half():
    metric = BoxAccuracy()
    metric.update((0, 0, 1, 1), (0, 0, 1, 2))
    metric.update(None, (0, 0, 1, 2))
    figures = metric.compute()
    assert (figures["acc_50"], figures["acc_gt_50"], figures["mean_iou"]) == (0.5, 0.0, 0.25)


def test_mask_iou_of_two_empty_masks_is_one_but_silence_is_none():
    empty = np.zeros((3, 4), dtype=bool)
    assert mask_iou(empty, empty) == 1.0
    metric = MaskIou()
    metric.update(empty, empty)
    metric.update(None, empty)
    assert metric.compute()["mean_iou"] == 0.5


def test_mask_sums_are_python_integers():
    metric = MaskIou(intersection=2**40, union=2**41)
    metric.update(np.ones((9, 9), dtype=bool), np.ones((9, 9), dtype=bool))
    assert (metric.intersection, metric.union) == (2**40 + 81, 2**41 + 81)


def test_masks_of_different_size_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        mask_iou(np.zeros((2, 3), dtype=bool), np.zeros((3, 2), dtype=bool))


def test_psnr():
    black = np.zeros((4, 4, 3), dtype=np.uint8)
    off = black.copy()
    off[0] = 10
    assert psnr(black, black) == PSNR_CAP
    assert psnr(black, off) == pytest.approx(10 * math.log10(255**2 / 25))
    assert psnr(black, off, keep=np.arange(16).reshape(4, 4) >= 4) == PSNR_CAP
    assert psnr(black, 255 - black) == pytest.approx(0)
    with pytest.raises(ValueError, match="cannot be compared"):
        psnr(black, off[:2])


def test_a_missing_picture_counts_as_zero_decibels():
    metric = PictureFidelity()
    metric.update(None, np.zeros((2, 2, 3), dtype=np.uint8))
    assert metric.compute() == {"psnr": 0.0} and metric.count == 1


RED_7, BLUE_7, RED_3, BLUE_3 = (7, "red"), (7, "blue"), (3, "red"), (3, "blue")


@pytest.mark.parametrize(
    ("found", "digits", "colours"),
    [
        ([RED_7, BLUE_3], True, True),
        ([BLUE_3, RED_7], True, True),
        ([BLUE_7, RED_3], True, False),  # swapped
        ([RED_7, (8, "blue")], False, True),  # a misread shape in the right colour
        ([RED_7], False, False),
        ([RED_7, BLUE_3, RED_3], False, False),
        ([BLUE_7, (8, "red")], False, False),
        ([], False, False),
    ],
)
def test_drawn_digits(found, digits, colours):
    wanted = [RED_7, BLUE_3]
    assert (digits_match(found, wanted), colours_match(found, wanted)) == (digits, colours)


PAIRS = st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["red", "blue"])), max_size=4)


@given(PAIRS, PAIRS)
def test_equal_scenes_match_and_both_matches_mean_equal_scenes(found, wanted):
    assert colours_match(wanted, wanted)
    both = digits_match(found, wanted) and colours_match(found, wanted)
    assert both == (sorted(found) == sorted(wanted))


def test_a_missing_picture_has_neither_digits_nor_colours():
    metric = DrawnDigits()
    metric.update(None, [])
    metric.update([RED_7], [RED_7])
    assert metric.compute() == {"digit": 0.5, "colour": 0.5}
