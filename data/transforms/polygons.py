"""Filled polygons, pixel for pixel as OpenCV from 4.12 on draws them: a closed outline of one pixel, and what it encloses.

What is enclosed is decided by the even-odd rule, so where a polygon crosses itself it has holes. Older OpenCV, which the
published ReasonSeg figures were made with, differs by a few pixels at edges. Found by comparing pixels
(tests/golden/grounding/reasonseg).
"""

import math
from collections.abc import Sequence

import numpy as np

Corner = tuple[int, int]
"""x, y; may lie outside the picture."""


def fill_polygon(corners: Sequence[Corner], size: tuple[int, int]) -> np.ndarray:
    """`hh ww` bool.

    Args:
        corners: in order; the last is joined to the first. One is a pixel, none is nothing.
        size: width and height of the picture.
    """
    width, height = size
    mask = np.zeros((height, width), bool)
    edges = list(zip([*corners[-1:], *corners[:-1]], corners, strict=True))
    for start, end in edges:
        _draw_line(mask, start, end)
    rows = [y for _, y in corners]
    for y in range(max(min(rows, default=0), 0), min(max(rows, default=-1), height - 1) + 1):
        crossings = sorted(x for start, end in edges for x in _crossing(start, end, y))
        for left, right in zip(crossings[::2], crossings[1::2], strict=True):
            mask[y, max(math.ceil(left), 0) : max(math.floor(right) + 1, 0)] = True
    return mask


def _crossing(start: Corner, end: Corner, y: int) -> list[float]:
    """Where an edge crosses a row; its lower end counts to the next edge."""
    (x0, y0), (x1, y1) = sorted((start, end), key=lambda corner: corner[1])
    return [x0 + (x1 - x0) * (y - y0) / (y1 - y0)] if y0 <= y < y1 else []


def _draw_line(mask: np.ndarray, start: Corner, end: Corner) -> None:
    """Bresenham's line from its left end to its right one, both cut off at the picture's border first."""
    inside = _clipped(start, end, mask.shape[1] - 1, mask.shape[0] - 1)
    if inside is None:
        return
    (x0, y0), (x1, y1) = sorted(inside, key=lambda corner: corner[0])
    along = max(x1 - x0, abs(y1 - y0))
    steps = np.arange(along + 1)
    # Half a pixel to the side is not a step yet.
    across = -(-(2 * min(x1 - x0, abs(y1 - y0)) * steps - along) // (2 * max(along, 1)))
    down = 1 if y1 >= y0 else -1
    if abs(y1 - y0) > x1 - x0:
        mask[y0 + down * steps, x0 + across] = True
    else:
        mask[y0 + down * across, x0 + steps] = True


def _clipped(start: Corner, end: Corner, right: int, bottom: int) -> tuple[Corner, Corner] | None:
    """The part of a line inside the picture, None if there is none: cut at top and bottom, then at the sides, towards zero."""
    (x0, y0), (x1, y1) = start, end
    if max(y0, y1) < 0 or min(y0, y1) > bottom or max(x0, x1) < 0 or min(x0, x1) > right:
        return None
    if not 0 <= y0 <= bottom:
        to = 0 if y0 < 0 else bottom
        x0, y0 = x0 + int((to - y0) * (x1 - x0) / (y1 - y0)), to
    if not 0 <= y1 <= bottom:
        to = 0 if y1 < 0 else bottom
        x1, y1 = x1 + int((to - y1) * (x1 - x0) / (y1 - y0)), to
    if max(x0, x1) < 0 or min(x0, x1) > right:
        return None
    if not 0 <= x0 <= right:
        to = 0 if x0 < 0 else right
        x0, y0 = to, y0 + int((to - x0) * (y1 - y0) / (x1 - x0))
    if not 0 <= x1 <= right:
        to = 0 if x1 < 0 else right
        x1, y1 = to, y1 + int((to - x1) * (y1 - y0) / (x1 - x0))
    return (x0, y0), (x1, y1)
