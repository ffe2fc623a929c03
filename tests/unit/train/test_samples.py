"""Samples that are looked at while training: what the model is asked, figures, sheets, the guard against collapse."""

import numpy as np
import pytest
import torch

from data.types import Sample, Segment
from modeling.bagel.continuation import before, can_be_continued, continue_sample
from modeling.bagel.decode import DrawOptions
from tests.unit.modeling.tiny import (
    drawing_sample,
    editing_sample,
    every_sample,
    perception_sample,
    picture,
    text,
    text_sample,
    tiny_decoder,
)
from train.samples import Guard, Shown, collapse, sample_figures, sheet, shown

FAST = DrawOptions(num_timesteps=3, cfg_text_scale=2.0)


def decoded(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def test_a_sample_is_continued_as_it_is_asked_alone() -> None:
    decoder, sample = tiny_decoder(), perception_sample()
    made = continue_sample(decoder, sample, FAST, seed=3, max_new_tokens=6)
    alone = decoder.read([sample.segments[:2]])
    assert made.ids == decoder.write(alone, 6)[0].ids and made.target_ids == [5, 12, 6]
    assert made.drawn is None

    drawing = drawing_sample()
    made = continue_sample(decoder, drawing, FAST, seed=3, max_new_tokens=6)
    expected = decoder.draw(
        decoder.read([drawing.segments[:1]]), [(64, 64)], [3], FAST, without_text=decoder.start(1)
    )
    assert made.drawn is not None and torch.equal(made.drawn, expected[0]) and made.target_ids == []

    made = continue_sample(decoder, editing_sample(), FAST, seed=3, max_new_tokens=6)
    assert made.drawn is not None and made.drawn.shape == (3, 32, 64)
    assert made.target_ids == [], "a text behind the picture is not asked for"


def test_what_is_before_a_target() -> None:
    trunk, other, own = text(1), text(2, branch=1, supervised=True), text(3, branch=2)
    target = text(4, branch=2, supervised=True)
    drawn = Segment(kind="gen_image", pixels=picture(1))
    found = before(Sample(segments=(trunk, other, drawn, own, target)), 4)
    assert [s.ids.tolist() for s in found] == [[1], [3]] and not any(s.branch or s.supervised for s in found)
    frames = [Segment(kind="und_image", pixels=picture(1), same_split=later) for later in (False, True)]
    assert can_be_continued(Sample(segments=(frames[0],)))
    assert not can_be_continued(Sample(segments=tuple(frames)))


def test_figures_of_samples() -> None:
    truth, flat = np.full((4, 4, 3), 100, dtype=np.uint8), np.full((4, 4, 3), 151, dtype=np.uint8)
    truth[0] = 0
    mask = np.zeros((4, 4), dtype=bool)
    mask[:2] = True
    rows = [
        Shown(where="a", prompt="", text="Red  7", target_text="red 7", seen=truth, boxes=[(0, 0, 2, 4)],
              true_boxes=[(0, 0, 4, 4), (0, 0, 1, 1)]),
        Shown(where="b", prompt="", text="2", target_text="3", seen=truth, masks=[mask], true_masks=[mask, ~mask]),
        Shown(where="c", prompt="", drawn=flat, target=truth),
    ]  # fmt: skip
    found = sample_figures(rows)
    assert found["text_exact"] == 0.5 and found["box_iou"] == 0.25
    assert found["giou"] == 0.5 and found["ciou"] == 0.5
    assert found["colour_shift"] == pytest.approx((151 - 75) / 255) and found["contrast"] == 0.0
    assert found["psnr"] == pytest.approx(10 * np.log10(255**2 / (0.75 * 51**2 + 0.25 * 151**2)))
    assert sample_figures([]) == {}


def test_collapsed_pictures_are_told() -> None:
    well = {"psnr": 20.0, "colour_shift": 0.05, "contrast": 0.9}
    assert collapse(well, None) == collapse(well, 22.0) == collapse({"text_exact": 0.0}, 30.0) == []
    assert "mean colour is 30%" in collapse({**well, "colour_shift": 0.3}, None)[0]
    assert "flat: their contrast is 0.10" in collapse({**well, "contrast": 0.1}, None)[0]
    assert "noisy: their contrast is 3.00" in collapse({**well, "contrast": 3.0}, None)[0]
    assert "PSNR is 20.0 dB, it has been 24.0 dB" in collapse(well, 24.0)[0]


def test_what_never_was_well_is_told_once_and_what_was_each_time() -> None:
    well, flat = (
        {"psnr": 20.0, "colour_shift": 0.0, "contrast": 1.0},
        {"psnr": 9.0, "colour_shift": 0.0, "contrast": 0.1},
    )
    guard = Guard()
    assert [bool(guard.judge("new", flat)) for _ in range(3)] == [True, False, False]
    assert not guard.judge("new", well)
    assert [len(guard.judge("new", flat)) for _ in range(2)] == [2, 2], "flat, and worse than it has been"
    assert not guard.judge("other", well) and not guard.judge("new", {"text_exact": 0.0})


def test_a_sheet_shows_every_sample() -> None:
    decoder = tiny_decoder()
    rows = [
        shown(sample, continue_sample(decoder, sample, FAST, seed=1, max_new_tokens=4), decoded)
        for sample in (*every_sample(), text_sample())
    ]
    _, seeing, _, drawing, editing, saying, _ = rows
    assert (
        seeing.prompt == "10 11"
        and seeing.target_text == "5 12 6"
        and len(seeing.true_boxes) == len(seeing.true_masks) == 1
    )
    assert (
        seeing.seen is not None and drawing.seen is None and editing.seen is not None and saying.drawn is None
    )
    assert np.allclose(seeing.true_boxes[0], np.array([0.1, 0.2, 0.5, 0.6]) * 64)
    page = sheet(rows)
    assert page.dtype == np.uint8 and page.shape[2] == 3 and page.shape[1] == 3 * 264
    heights = [sheet([row]).shape[0] for row in rows]
    assert page.shape[0] == sum(heights) and (page != 255).any(axis=(1, 2)).mean() > 0.3
