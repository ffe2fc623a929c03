"""Paired augmentation: what moves forth moves back, and picture, boxes, masks and texts stay together."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.augment import Augment, texts_in
from data.dataset_base import Record, SkipSample
from data.interleave_datasets.edit import EditDataset
from data.motion import Motion
from data.perception_dataset import ReferRowDataset
from data.rgb_image import RgbImage
from data.text_dataset import TextDataset
from data.tokens import SPECIAL_TOKENS
from data.transforms import ImageTransform
from data.transforms.boxes import box_in, mask_in
from data.vlm_dataset import VlmDataset

FULL = ImageTransform(max_image_size=64, min_image_size=8, stride=8)
MOTIONS = st.builds(
    Motion, quarters=st.integers(0, 3), mirrored=st.booleans(), scale=st.sampled_from([1.0, 0.5, 1.7]),
    window=st.tuples(st.floats(0, 0.4), st.floats(0, 0.4), st.floats(0.6, 1), st.floats(0.6, 1)),
)  # fmt: skip
SIZES = st.tuples(st.integers(1, 90), st.integers(1, 90))


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(MOTIONS, SIZES, st.lists(st.floats(0.4, 0.6), min_size=4, max_size=4))
def test_a_box_moves_there_and_back(motion, size, numbers):
    placed = motion.place(size)
    x0, y0, x1, y1 = placed.window
    (a, c), (b, d) = sorted(numbers[:2]), sorted(numbers[2:])
    # Inside of the window, whatever its whole pixels are.
    box = [(x0 + a * (x1 - x0)) / size[0], (y0 + b * (y1 - y0)) / size[1], (x0 + c * (x1 - x0)) / size[0],
           (y0 + d * (y1 - y0)) / size[1]]  # fmt: skip
    moved, share = placed.box(box)
    assert all(0 <= v <= 1 for v in moved) and moved[0] <= moved[2] and moved[1] <= moved[3]
    assert placed.back(moved) == pytest.approx(box, abs=1e-9)
    if (c - a) * (d - b) > 1e-6:
        assert share == pytest.approx(1)


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(MOTIONS, st.integers(0, 1000))
def test_picture_mask_and_box_move_together(motion, seed):
    rng = np.random.default_rng(seed)
    width, height = (int(v) for v in rng.integers(20, 60, 2))
    x0, y0 = int(rng.integers(0, width // 2)), int(rng.integers(0, height // 2))
    x1, y1 = x0 + int(rng.integers(4, width // 2)), y0 + int(rng.integers(4, height // 2))
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[y0:y1, x0:x1] = 255
    picture = RgbImage(pixels).moved(
        Motion(window=motion.window, quarters=motion.quarters, mirrored=motion.mirrored)
    )
    try:
        box = box_in(picture, (x0, y0, x1, y1), "box")
        mask = mask_in(picture, (pixels[..., 0] > 0).astype(np.uint8), "mask")
    except SkipSample as e:
        assert e.reason == "cropped"
        return
    assert np.array_equal(mask, picture.rgb[..., 0] // 255), "the mask is where the thing shows"
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    seen = [
        columns[0] / picture.width,
        rows[0] / picture.height,
        (columns[-1] + 1) / picture.width,
        (rows[-1] + 1) / picture.height,
    ]
    torch.testing.assert_close(box, torch.tensor(seen, dtype=torch.float32), atol=1e-5, rtol=0)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def tokenizer(save_tokenizer):
    return save_tokenizer(SPECIAL_TOKENS)


def scene() -> tuple[np.ndarray, list[int]]:
    """A dark picture of 48x32 px with a bright thing, and the thing's box; a resize overshoots within 8 bits."""
    pixels = np.full((32, 48, 3), 50, np.uint8)
    pixels[4:12, 8:24] = 200
    return pixels, [8, 4, 24, 12]


def bright_box(pixels: torch.Tensor) -> torch.Tensor:
    bright = pixels[0] > 127
    rows, columns = bright.any(1).nonzero()[:, 0], bright.any(0).nonzero()[:, 0]
    height, width = bright.shape
    return torch.tensor(
        [columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height]
    )


@pytest.mark.parametrize("crop", [1.0, 0.7])
def test_all_of_an_edit_moves_together_and_its_text_with_it(tokenizer, crop):
    pixels, box = scene()
    files = {"left/a.png": png(pixels), "b.png": png(pixels // 2 + 100)}
    row = {
        "input_img": ["left/a.png"],
        "output_img": ["b.png"],
        "message": [
            {"from": "human", "value": "Paint the thing on the Left at [0.167,0.125,0.500,0.375]."},
            {"from": "gpt", "value": "Here: <BOX><SEG> <image>"},
        ],
        "objects": {"bbox": [box, None], "mask": [None, [[8, 4, 23, 4, 23, 11, 8, 11]]]},
    }
    options = {"flip": 0.5, "crop": [crop, 1.0], "flip_words": True, "text_boxes": "fraction"}
    dataset = EditDataset(tokenizer=tokenizer, vit_transform=FULL, vae_transform=FULL, augment=options)
    seen = set()
    for seed in range(12):
        record = Record(data=row, where="rows:1", fetch=files.__getitem__)
        sample = dataset.sample(record, np.random.default_rng(seed))
        again = dataset.sample(record, np.random.default_rng(seed))
        assert all(
            torch.equal(a.pixels, b.pixels) for a, b in zip(sample.segments, again.segments, strict=True)
        )
        cond, und, question, _, target = sample.segments
        assert torch.equal(cond.pixels, und.pixels)
        torch.testing.assert_close(target.pixels.float(), cond.pixels.float() / 2 + 100, atol=1, rtol=0)
        place, outline = sample.regions
        wanted = bright_box(und.pixels)
        torch.testing.assert_close(
            place.boxes[0], wanted, atol=0.08, rtol=0
        )  # the resize to whole patches smears edges
        torch.testing.assert_close(bright_box(outline.mask[None] * 255), wanted, atol=0.08, rtol=0)
        text = tokenizer.decode(question.ids)
        side = "Left" if wanted[0] + wanted[2] < 1 or "Left" in text else "Right"
        written = [float(v) for v in text[text.index("[") + 1 : text.index("]")].split(",")]
        # What is cut out is whole pixels, which a text does not know of.
        least = 6e-4 if crop == 1 else 1 / (32 * crop)
        torch.testing.assert_close(torch.tensor(written), place.boxes[0], atol=least, rtol=0)
        assert f"on the {side} at" in text
        seen.add(side)
    assert seen == {"Left", "Right"}


def test_a_text_that_names_a_side_is_not_mirrored_silently():
    rng = np.random.default_rng(0)
    augment = Augment.of({"flip": 1.0, "rotate": True})
    draws = [augment.draw({"expression": "the LEFT lung", "img_path": "a.png"}, rng) for _ in range(8)]
    assert not any(m.mirrored or m.quarters for m in draws)
    draws = [augment.draw({"expression": "the cleft", "img_path": "left/up.png"}, rng) for _ in range(8)]
    assert all(m.mirrored for m in draws) and {m.quarters for m in draws} > {0}
    draws = [augment.draw({"message": [{"from": "gpt", "value": "the upper one"}]}, rng) for _ in range(8)]
    assert all(m.mirrored for m in draws) and not any(m.quarters for m in draws)
    for row in (
        {"labels": ["the left lung"]},
        {"objects": {"ref": ["Right"]}},
        {"json": {"caption": "rightmost"}},
    ):
        assert not augment.draw(row, rng).mirrored, row
    assert not augment.draw({"caption": "左边的螺丝"}, rng).mirrored


def test_what_is_said_is_found_wherever_it_stands():
    row = {
        "image": {"file_name": "left.png"},
        "annotations": [{"expressions": ["a"], "id": "left"}],
        "categories": {7: {"id": 7, "name": "b"}},
        "message": [{"from": "human", "value": "c"}],
        "json": {"caption": "d"},
    }
    assert sorted(texts_in(row)) == ["a", "b", "c", "d"]


def test_a_crop_that_loses_an_object_is_given_up(tokenizer):
    pixels, _ = scene()
    row = {"img_path": "a.png", "expression": "the speck", "bbox": [0, 0, 48, 32]}
    record = Record(data=row, where="rows:1", fetch=lambda name: png(pixels))
    dataset = ReferRowDataset(tokenizer=tokenizer, vit_transform=FULL, augment={"crop": [0.5, 0.6]})
    for seed in range(6):
        (region,) = dataset.sample(record, np.random.default_rng(seed)).regions
        torch.testing.assert_close(region.boxes[0], torch.tensor([0.0, 0.0, 1.0, 1.0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flips": 1}, "unknown key 'flips'"),
        ({"flip": 2}, "augment.flip"),
        ({"crop": [0.9]}, "augment.crop"),
        ({"scale": [2, 1]}, "augment.scale"),
        ({"rotate": 1}, "augment.rotate"),
        ({"text_boxes": "pixels"}, "augment.text_boxes"),
    ],
)
def test_wrong_options_are_named(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        VlmDataset(tokenizer=tokenizer, vit_transform=FULL, augment=options)


def test_classes_that_cannot_be_moved_refuse(tokenizer):
    with pytest.raises(ValueError, match="TextDataset has nothing that could be moved"):
        TextDataset(tokenizer=tokenizer, augment={"flip": 0.5})
