"""Sizes and pixels of the image transform against the published code's own; geometry of boxes and masks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.dataset_base import SkipSample
from data.transforms import TRANSFORMS, ImageTransform, build_transform
from data.transforms.boxes import normalised_box, read_mask, resized_mask

# A few rows of the published table, so that the rule is held where the whole table is absent:
# (max, min, stride, max_pixels, pictures), original size, transformed size.
PUBLISHED_SIZES = [
    ((1024, 512, 16, None, 1), (100, 100), (512, 512)),
    ((1024, 512, 16, None, 1), (1000, 1000), (992, 992)),
    ((1024, 512, 16, None, 1), (4000, 3000), (1024, 768)),
    ((1024, 512, 16, None, 1), (3000, 200), (1024, 64)),
    ((980, 378, 14, 2007040, 1), (1000, 1000), (980, 980)),
    ((980, 378, 14, 2007040, 8), (1000, 1000), (252, 252)),
]


def published(parameters: dict) -> ImageTransform:
    known = ("max_image_size", "min_image_size", "image_stride", "max_pixels")
    return build_transform({k: parameters[k] for k in known if parameters.get(k) is not None})


@pytest.mark.parametrize(("limits", "size", "expected"), PUBLISHED_SIZES)
def test_size_rule(limits, size, expected):
    *values, pictures = limits
    names = ("max_image_size", "min_image_size", "image_stride", "max_pixels")
    transform = published(dict(zip(names, values, strict=True)))
    assert transform.resized(*size, pictures) == expected


@settings(max_examples=200, deadline=None)
@given(
    width=st.integers(1, 3000), height=st.integers(1, 3000), stride=st.sampled_from([8, 14, 16, 32]),
    pictures=st.integers(1, 4),
)  # fmt: skip
def test_sizes_are_multiples_of_the_stride_within_the_limit(width, height, stride, pictures):
    transform = ImageTransform(max_image_size=512, min_image_size=256, stride=stride)
    new_width, new_height = transform.resized(width, height, pictures)
    assert new_width % stride == new_height % stride == 0
    assert stride <= min(new_width, new_height) and max(new_width, new_height) < 512 + stride


def test_an_image_of_the_right_size_is_not_resampled():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    out = ImageTransform(max_image_size=64, min_image_size=64, stride=8)(Image.fromarray(pixels))
    assert torch.equal(out, torch.from_numpy(pixels).permute(2, 0, 1))
    assert out.permute(1, 2, 0).is_contiguous()


def test_both_spellings_of_the_stride():
    args = {"max_image_size": 64, "min_image_size": 32}
    assert build_transform({**args, "image_stride": 8}) == build_transform(
        {**args, "stride": 8, "type": "image"}
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            {"max_image_size": 64, "min_image_size": 32, "image_strid": 8},
            "'image_strid'; did you mean 'image_stride'",
        ),
        ({"max_image_size": 64, "stride": 8}, "lacks min_image_size"),
        ({"max_image_size": 64, "min_image_size": 32, "stride": 8, "image_stride": 8}, "two spellings"),
        (
            {"max_image_size": 32, "min_image_size": 64, "stride": 8},
            "min_image_size 64 exceeds max_image_size 32",
        ),
        (
            {"max_image_size": 64, "min_image_size": 32, "stride": 0},
            "stride must be a positive whole number, not 0",
        ),
        ({"max_image_size": "64", "min_image_size": 32, "stride": 8}, "max_image_size must be"),
        ({"type": "imagee"}, "unknown transform type 'imagee'; known: " + ", ".join(TRANSFORMS)),
    ],
)
def test_bad_transform_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        build_transform(args)


def test_boxes_are_cut_at_the_border_and_independent_of_a_resize():
    box = normalised_box([-1, 10, 50, 40], (100, 40), "box")
    torch.testing.assert_close(box, torch.tensor([0.0, 0.25, 0.5, 1.0]))


@pytest.mark.parametrize(
    "xyxy",
    [
        [5, 5, 5, 9],
        [9, 9, 5, 5],
        [100, 0, 120, 10],
        [float("nan"), 0, 1, 1],
        [1, 1, float("inf"), 9],
        [1, 2, 3],
        None,
    ],
)
def test_boxes_without_area_are_refused(xyxy):
    with pytest.raises(SkipSample, match="annotation 5") as e:
        normalised_box(xyxy, (100, 40), "annotation 5")
    assert e.value.reason == "bad_box"


def run_lengths(mask: np.ndarray) -> list[int]:
    counts, value, run = [], 0, 0
    for pixel in mask.T.ravel():
        if pixel != value:
            counts.append(run)
            value, run = pixel, 0
        run += 1
    return [*counts, run]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), width=st.integers(1, 9), height=st.integers(1, 9))
def test_run_lengths_round_trip(seed, width, height):
    mask = np.random.default_rng(seed).integers(0, 2, (height, width), dtype=np.uint8)
    mask[0, 0] = 1
    rle = {"size": [height, width], "counts": run_lengths(mask)}
    assert np.array_equal(read_mask(rle, (width, height), "m"), mask)


@pytest.mark.parametrize("density", [0.01, 0.4, 0.99])
def test_compressed_masks_are_read_as_pycocotools_writes_them(density):
    coco_mask = pytest.importorskip("pycocotools.mask")
    mask = (np.random.default_rng(0).random((130, 170)) < density).astype(np.uint8)
    packed = coco_mask.encode(np.asfortranarray(mask))
    segmentation = {"size": packed["size"], "counts": packed["counts"].decode()}
    assert np.array_equal(read_mask(segmentation, (170, 130), "m"), mask)


def test_polygons_are_filled_and_joined():
    mask = read_mask([[2, 1, 6, 1, 6, 4, 2, 4], [0, 8, 1, 8, 1, 9, 0, 9]], (10, 10), "m")
    assert mask[1:5, 2:7].all() and mask[8:10, 0:2].all() and mask.sum() == 24


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ({"size": [4, 5], "counts": [0, 20]}, "mask_size"),
        ({"size": [5, 4], "counts": [0, 19]}, "bad_mask"),
        ({"size": [5, 4], "counts": [-1, 21]}, "bad_mask"),
        ({"size": [5, 4], "counts": [20]}, "empty_mask"),
        ({"size": [5, 4], "counts": None}, "bad_mask"),
        ({"size": [5, 4], "counts": ["a"]}, "bad_mask"),
        ({"size": [5, 4], "counts": "\u00e9"}, "bad_mask"),
        ({"size": [5, 4], "counts": "1234"}, "bad_mask"),
        ({}, "mask_size"),
        ([], "bad_mask"),
        ([[1, 2, 3, 4]], "bad_mask"),
        (None, "bad_mask"),
    ],
)
def test_unusable_masks_are_refused(segmentation, reason):
    with pytest.raises(SkipSample, match="annotation 5") as e:
        read_mask(segmentation, (4, 5), "annotation 5")
    assert e.value.reason == reason


def test_masks_are_resized_by_nearest_neighbour():
    mask = np.zeros((4, 4), np.uint8)
    mask[1:3, 1:3] = 1
    doubled = resized_mask(mask, (8, 8), "m")
    assert doubled.dtype == torch.uint8 and torch.equal(
        doubled, torch.from_numpy(mask.repeat(2, 0).repeat(2, 1))
    )
    with pytest.raises(SkipSample, match="nothing of the mask is left"):
        resized_mask(np.eye(64, dtype=np.uint8) * (np.arange(64) == 1), (2, 2), "m")
