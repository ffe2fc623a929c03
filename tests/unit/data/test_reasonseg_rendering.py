"""Polygons become the published masks, pixel for pixel as newer OpenCV draws them, whatever the encoding of the file."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.perception_dataset import ReasonSegDataset
from data.sources.reasonseg import ReasonSegSource
from data.tokens import SPECIAL_TOKENS
from data.transforms.polygons import fill_polygon

GOLDEN = Path(__file__).parents[2] / "golden" / "grounding" / "reasonseg"
CASES = json.loads((GOLDEN / "index.json").read_text())["cases"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory, save_tokenizer):
    """Case -> what an evaluation asks of it."""
    folder = tmp_path_factory.mktemp("reasonseg")
    for case in CASES:
        text = (GOLDEN / case["json"]).read_text(encoding="utf-8")  # kept so here, whatever it is in
        (folder / case["json"]).write_bytes(text.encode(case["encoding"]))
        Image.new("RGB", (case["width"], case["height"])).save((folder / case["json"]).with_suffix(".jpg"))
    source = ReasonSegSource(folder, folder / "cache")
    dataset = ReasonSegDataset(tokenizer=save_tokenizer(SPECIAL_TOKENS))
    records = [source.read(i) for i in range(len(source))]
    return {Path(r.where).name: (r, dataset) for r in records}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_as_opencv_draws_it(rows, case):
    record, dataset = rows[case["json"]]
    if not record.data["shapes"]:  # nothing to train on: refused by name
        record.data["shapes"] = [{"label": "flag", "points": [[0, 0], [1, 1]]}]
    _, (asked,) = dataset.asked(record)
    assert asked.name == case["texts"][0] and asked.head == "mask"
    assert asked.question == (asked.name if case["is_sentence"] else f"Segment {asked.name}.")
    mask = asked.mask((case["width"], case["height"]))
    wanted = GOLDEN / case.get("mask_png_newer_opencv", case["mask_png"])
    assert np.array_equal(mask, np.asarray(Image.open(wanted)))
    older = int((mask != np.asarray(Image.open(GOLDEN / case["mask_png"]))).sum())
    assert older == case["pixels_different_in_newer_opencv"]


def test_polygons_at_the_border_and_beyond():
    assert fill_polygon([], (4, 3)).sum() == 0
    assert fill_polygon([(1, 2)], (4, 3)).nonzero() == (2, 1)
    assert fill_polygon([(-9, -9), (99, -9), (99, 99), (-9, 99)], (4, 3)).all()
    assert not fill_polygon([(9, 9), (12, 9), (12, 12)], (4, 3)).any()
    far = fill_polygon([(-(10**12), 1), (10**12, 1), (10**12, 2)], (4, 3))
    assert far[1].all() and not far[0].any()
