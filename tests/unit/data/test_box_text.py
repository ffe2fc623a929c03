"""Boxes as text: the published forms on stored cases, and that what is written is read."""

import json
from pathlib import Path

import numpy as np
import pytest

from data.box_text import FORMS, BoxText
from data.transforms.boxes import normalised_box

CASES = json.loads((Path(__file__).parents[2] / "golden" / "grounding" / "box_formatter.json").read_text())
FORM = {
    "plain3": BoxText(),
    "plain4": BoxText(digits=4),
    "plain3_round_brackets": BoxText(brackets="round"),
    "token1001": BoxText("bins"),
}


def test_writing():
    for case in CASES["encode"]:
        for name, form in FORM.items():
            text = case["sentence"]
            for boxes in case["boxes_seq"]:
                text = text.replace("<boxes>", form.write(boxes), 1)
            assert text == case[name]
    for case in CASES["token_round_half"]["values"]:
        assert BoxText("bins").write([[case["x"]] * 4]).count(f"<bin_{case['bin']}>") == 4


def test_reading():
    for case in CASES["decode"]:
        for form, wanted in (
            (BoxText(), case["boxes"]),
            (BoxText(brackets="round"), case["boxes_round_brackets"]),
        ):
            assert [[list(box) for box in boxes] for boxes in form.read(case["string"])] == wanted, case
    for case in CASES["token_decode"]:
        found = BoxText("bins").read(case["string"])
        assert [[list(box) for box in boxes] for boxes in found] == case["boxes"], case


def test_a_box_of_the_row_is_divided_and_cut_as_published():
    for case in CASES["norm_box_xyxy"]:
        box = normalised_box(case["box"], (case["w"], case["h"]), "box").tolist()
        assert BoxText().write([box]) == BoxText().write([case["out"]])


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_read(form):
    rng = np.random.default_rng(0)
    size = (640, 480)
    for _ in range(50):
        boxes = np.sort(rng.random((int(rng.integers(1, 4)), 2, 2)), axis=1).reshape(-1, 4).tolist()
        text = f"a {BoxText(form).write(boxes, size)} b [1,2]"
        (read,) = BoxText(form).read(text, size)
        assert np.allclose(read, boxes, atol=0.5 / 480 + 1e-9)
        assert BoxText(form).replace(text, lambda box: box, size) == text


@pytest.mark.parametrize("options", [("inches",), ("fraction", 0), ("fraction", 3, "curly")])
def test_other_forms_are_refused(options):
    with pytest.raises(ValueError, match="inches|digits|curly"):
        BoxText(*options)
