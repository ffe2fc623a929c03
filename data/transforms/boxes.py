"""Boxes and masks of annotation files: pixels of the original picture go in, what the model is trained on comes out.

Boxes become `xyxy` in [0, 1], which a resize leaves as they are; masks become 0/1 of the transformed picture's size.
Sizes are `(width, height)` where they come from a picture and `(height, width)`, written `hw`, where they come from a tensor.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from data.augment import require_left
from data.rgb_image import RgbImage
from data.sources.record import SkipSample
from data.transforms.polygons import fill_polygon

IGNORED = 255
"""In the truth of an evaluation: pixels that do not count. Training takes them as background, as published."""


def normalised_box(xyxy: Sequence[float], size: tuple[int, int], what: str) -> Tensor:
    """`4` xyxy in [0, 1], cut at the picture's border.

    Args:
        xyxy: corners in pixels of the original picture.
        size: width and height of that picture.
        what: names the box in the message.

    Raises:
        SkipSample: `bad_box` if it is not four numbers or nothing of it lies inside the picture.
    """
    width, height = size
    try:
        x0, y0, x1, y1 = (float(v) for v in xyxy)
    except (TypeError, ValueError, OverflowError):
        raise SkipSample("bad_box", f"{what}: a box is four numbers, not {xyxy!r}") from None
    if not all(map(math.isfinite, (x0, y0, x1, y1))):  # to cut infinity would be to guess
        raise SkipSample("bad_box", f"{what}: a box is four finite numbers, not {list(xyxy)}")
    box = torch.tensor([x0 / width, y0 / height, x1 / width, y1 / height]).clamp(0, 1)
    if not (box[2] > box[0] and box[3] > box[1]):
        raise SkipSample(
            "bad_box",
            f"{what}: box {list(xyxy)} has no area inside the {width}x{height} picture; correct or remove it",
        )
    return box


def read_mask(segmentation: Any, size: tuple[int, int], what: str) -> np.ndarray:
    """`hh ww` uint8 0/1 of the original picture.

    Args:
        segmentation: COCO's RLE with counts (a list, or the compressed string) or list of polygons. Polygons are filled by
            PIL, whose edge differs from pycocotools' by up to a pixel, and joined.
        size: width and height of the picture.
        what: names the mask in the message.

    Raises:
        SkipSample: `bad_mask`, `mask_size` (made for a picture of another size) or `empty_mask`.
    """
    width, height = size
    if isinstance(segmentation, dict):
        rle_hw = segmentation.get("size")
        if rle_hw != [height, width]:
            raise SkipSample(
                "mask_size",
                f"{what}: mask has [height, width] {rle_hw!s:.60}, the picture {[height, width]}; make it again",
            )
        mask = _from_rle(segmentation, (height, width), what)
    elif isinstance(segmentation, list) and segmentation:
        mask = _from_polygons(segmentation, size, what)
    else:
        raise SkipSample(
            "bad_mask", f"{what}: segmentation is neither RLE nor polygons but {segmentation!s:.60}"
        )
    if not mask.any():
        raise SkipSample("empty_mask", f"{what}: the mask has no pixel; correct or remove it")
    return mask


def box_in(picture: RgbImage, xyxy: Sequence[float], what: str) -> Tensor:
    """`4` xyxy in [0, 1] of a picture as it is shown, of a box in pixels of the picture that was annotated.

    Raises:
        SkipSample: as `normalised_box`; or `CROPPED` if the picture was cut and less than half of the box is left.
    """
    box = normalised_box(xyxy, picture.annotated_size, what)
    if picture.placed is None:
        return box
    return torch.tensor(require_left(*picture.placed.box(box.tolist()), what))


def mask_in(picture: RgbImage, mask: np.ndarray, what: str) -> np.ndarray:
    """`hh ww` uint8 of a picture as it is shown, of a mask of the picture that was annotated; any values.

    Raises:
        SkipSample: `CROPPED` if the picture was cut and less than half of what is not 0 is left.
    """
    placed = picture.placed
    if placed is None:
        return mask
    cut = placed.cut(mask)
    before, after = int(np.count_nonzero(mask)), int(np.count_nonzero(cut))
    require_left((), after / before if before else 1.0, what)
    if placed.scaled != (cut.shape[1], cut.shape[0]):
        cut = np.array(Image.fromarray(cut).resize(placed.scaled, Image.Resampling.NEAREST))
    return placed.turned(cut)


def paint_shapes(shapes: Sequence[tuple[str, Sequence[Any]]], size: tuple[int, int], what: str) -> np.ndarray:
    """`hh ww` uint8 of labelled polygons, painted from the largest to the smallest, so that small ones stay visible.

    Args:
        shapes: label and corners; "ignore" in the label paints 255, "flag" nothing, everything else 1. Corners are cut to whole
            pixels, towards zero.
        size: width and height of the picture.
        what: names the shapes in the message.

    Raises:
        SkipSample: `bad_mask`.

    Source: ReasonSeg's rendering as LISA 3cb2d43 does it; edges as OpenCV 4.12 draws them, its pinned 4.8 differs by pixels.
    """
    layers = []
    for label, points in shapes:
        if label.lower() == "flag":
            continue
        try:
            corners = [(int(x), int(y)) for x, y in points]
            if len(corners) < 2:
                raise ValueError("no polygon")
            layer = fill_polygon(corners, size)
        except (TypeError, ValueError, OverflowError):
            raise SkipSample(
                "bad_mask", f"{what}: a shape's corners are two pairs of numbers or more, not {points!s:.60}"
            ) from None
        layers.append((layer, IGNORED if "ignore" in label.lower() else 1))
    mask = np.zeros((size[1], size[0]), np.uint8)
    for layer, value in reversed(sorted(layers, key=lambda entry: entry[0].sum())):
        mask[layer] = value
    return mask


def resized_mask(mask: np.ndarray, hw: tuple[int, int], what: str) -> Tensor:
    """`hh ww` uint8 0/1 at the transformed picture's size, nearest neighbour.

    Raises:
        SkipSample: `empty_mask` if no pixel is left at that size.
    """
    if mask.shape != hw:
        mask = np.array(Image.fromarray(mask).resize((hw[1], hw[0]), Image.Resampling.NEAREST))
    if not mask.any():
        raise SkipSample(
            "empty_mask", f"{what}: nothing of the mask is left at {hw[1]}x{hw[0]} px; raise max_image_size"
        )
    return torch.from_numpy(mask)


def _from_rle(rle: dict[str, Any], hw: tuple[int, int], what: str) -> np.ndarray:
    counts = rle.get("counts")
    try:
        runs = np.asarray(counts if isinstance(counts, list) else _unpacked(counts), dtype=np.int64)
    except (TypeError, ValueError, OverflowError, AttributeError, IndexError):
        raise SkipSample("bad_mask", f"{what}: RLE counts are not whole numbers or COCO's string") from None
    if (runs < 0).any() or runs.sum() != hw[0] * hw[1]:
        message = f"{what}: RLE counts add up to {runs.sum()}, the picture has {hw[0] * hw[1]} pixels"
        raise SkipSample("bad_mask", message)
    values = (np.arange(len(runs)) % 2).astype(np.uint8)  # runs of 0 and 1 by turns, down the columns
    return np.ascontiguousarray(np.repeat(values, runs).reshape(hw, order="F"))


def _unpacked(packed: Any) -> list[int]:
    """Run lengths of COCO's compressed string.

    Low groups of 5 bits come first, one character from "0" on each; bit 6 says that another follows, bit 5 of the last is the
    sign. From the fourth run on, a number is the difference to the run two before.
    """
    runs: list[int] = []
    value = shift = 0
    for code in packed.encode("ascii"):
        group = code - 48
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        value -= (group & 16) << (shift - 4)
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return runs


def _from_polygons(polygons: list, size: tuple[int, int], what: str) -> np.ndarray:
    canvas = Image.new("L", size, 0)
    draw = ImageDraw.Draw(canvas)
    for polygon in polygons:
        try:
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                raise ValueError("no pairs")
            draw.polygon([float(v) for v in polygon], fill=1)
        except (TypeError, ValueError, OverflowError):
            raise SkipSample(
                "bad_mask", f"{what}: a polygon is a list of at least three x, y pairs, not {polygon!s:.60}"
            ) from None
    return np.array(canvas)
