"""Pillow's bicubic resize of RGB pixels, bit for bit, in a third of its time where numba is installed.

Each axis is a pass of its own, rounded to uint8: a new pixel is the sum of old ones under a cubic kernel (a = -0.5), which is
stretched by the scale where the picture shrinks; weights are whole numbers of 2^-22. Pillow goes pixel by pixel. The kernels
below do the same sums over a whole row of pixels at once; for the width, over 64 rows that are laid side by side for it.

Which bytes a run trains on must not depend on what is installed: the kernels are used only if they give what the installed Pillow
gives on a few pictures.
"""

from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np
from PIL import Image

from data.compiled import compiled

BITS = 22
HALF = 1 << BITS - 1
TILE = 64
"""Rows of pixels laid side by side at once."""

CASES = (
    ((37, 70), (45, 75)), ((37, 70), (33, 60)), ((37, 70), (45, 61)), ((70, 37), (61, 45)), ((5, 3), (40, 70)),
    ((60, 60), (50, 55)), ((60, 60), (49, 55)), ((60, 60), (59, 61)), ((90, 60), (90, 20)),
)  # fmt: skip
"""Heights and widths before and after, of pictures on which kernels and Pillow are compared; some in either order of passes."""

Kernels = tuple[Callable[..., None], Callable[..., None]]
"""`mix` and `transpose`, compiled."""


def resize(rgb: np.ndarray, width: int, height: int) -> np.ndarray:
    """`hh ww 3` uint8 of that size, of pixels of any size."""
    if (height, width) == rgb.shape[:2]:
        return rgb
    kernels = _kernels()
    return _by_pillow(rgb, width, height) if kernels is None else _by_kernels(rgb, width, height, kernels)


def _by_pillow(rgb: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.array(Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC))


def _by_kernels(rgb: np.ndarray, width: int, height: int, kernels: Kernels) -> np.ndarray:
    passes = [(_to_width, width), (_to_height, height)]
    # As Pillow 13 orders them, found by trying.
    if rgb.shape[0] - height > 2 * max(rgb.shape[1] - width, 0):
        passes.reverse()
    for to_side, side in passes:
        rgb = to_side(np.ascontiguousarray(rgb), side, kernels)
    return rgb


def _to_height(rgb: np.ndarray, height: int, kernels: Kernels) -> np.ndarray:
    before, width, _ = rgb.shape
    if height == before:
        return rgb
    mix, _ = kernels
    out = np.empty((height, width, 3), np.uint8)
    mix(rgb.reshape(before, -1), 1, *_weights(before, height), out.reshape(height, -1))
    return out


def _to_width(rgb: np.ndarray, width: int, kernels: Kernels) -> np.ndarray:
    height, before, _ = rgb.shape
    if width == before:
        return rgb
    mix, transpose = kernels
    weights = _weights(before, width)
    out = np.empty((height, width, 3), np.uint8)
    bytes_in, bytes_out = 3 * before, 3 * width
    # What is not a multiple of 8 is filled up, for `transpose`.
    rows = np.zeros((TILE, -(-bytes_in // 8) * 8), np.uint8)
    columns = np.empty(rows.shape[::-1], np.uint8)
    mixed = np.zeros((-(-bytes_out // 8) * 8, TILE), np.uint8)
    done = np.empty(mixed.shape[::-1], np.uint8)
    for top in range(0, height, TILE):
        count = min(TILE, height - top)
        rows[:count, :bytes_in] = rgb[top : top + count].reshape(count, -1)
        transpose(rows.view(np.uint64), columns.view(np.uint64))
        mix(columns, 3, *weights, mixed)
        transpose(mixed.view(np.uint64), done.view(np.uint64))
        out[top : top + count] = done[:count, :bytes_out].reshape(count, width, 3)
    return out


@lru_cache(maxsize=1024)
def _weights(before: int, after: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each new pixel of a line: the first old one that counts, how many do, their weights (`after taps` int32)."""
    scale = before / after
    stretch = max(scale, 1.0)
    centre = (np.arange(after) + 0.5) * scale
    first = np.maximum((centre - 2 * stretch + 0.5).astype(np.int64), 0)
    count = np.minimum((centre + 2 * stretch + 0.5).astype(np.int64), before) - first
    tap = np.arange(count.max())
    weight = _cubic(np.abs((tap + first[:, None] - centre[:, None] + 0.5) * (1.0 / stretch)))
    weight[tap >= count[:, None]] = 0.0
    total = np.zeros(after)
    for column in weight.T:  # one after the other, as Pillow adds: the last bit may decide
        total += column
    weight /= total[:, None]
    whole = np.trunc(weight * (1 << BITS) + np.copysign(0.5, weight)).astype(np.int32)
    return first, count, whole


def _cubic(x: np.ndarray) -> np.ndarray:
    a = -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


@cache
def _kernels() -> Kernels | None:
    """None if Pillow has to do it."""
    compiled_mix, compiled_transpose = compiled(mix), compiled(transpose)
    if compiled_mix is None or compiled_transpose is None:
        return None
    kernels = compiled_mix, compiled_transpose
    random = np.random.default_rng(0)
    for before, (height, width) in CASES:
        pixels = random.integers(0, 2, (*before, 3), dtype=np.uint8) * np.uint8(
            255
        )  # overshoots at every edge
        if not np.array_equal(_by_kernels(pixels, width, height, kernels), _by_pillow(pixels, width, height)):
            return None
    return kernels


# ------------------------------------------------------------------------------ kernels: what numba compiles


def mix(rows, step, first, count, weights, out):
    """Rows of bytes -> weighted sums of them.

    Args:
        rows: `(before step) n` uint8.
        step: rows that belong to one pixel (its channels).
        first, count, weights: of `_weights`.
        out: `(after step) n` uint8.
    """
    n = rows.shape[1]
    sums = np.empty(n, np.int32)
    for pixel in range(first.shape[0]):
        last = count[pixel] - 1
        for channel in range(step):
            at = first[pixel] * step + channel
            for j in range(n):
                sums[j] = HALF
            tap = 0
            while tap < last:  # two at a time: half as often to memory and back
                w, row = weights[pixel, tap], rows[at + tap * step]
                w2, row2 = weights[pixel, tap + 1], rows[at + (tap + 1) * step]
                for j in range(n):
                    sums[j] += w * np.int32(row[j]) + w2 * np.int32(row2[j])
                tap += 2
            if tap == last:
                w, row = weights[pixel, tap], rows[at + tap * step]
                for j in range(n):
                    sums[j] += w * np.int32(row[j])
            to = out[pixel * step + channel]
            for j in range(n):
                to[j] = np.uint8(min(max(sums[j] >> BITS, 0), 255))


def transpose(rows, columns):
    """Bytes in rows -> the same in columns, 8 x 8 at a time as eight numbers: bytes, then pairs, then fours change places.

    Args:
        rows: `r c` uint64, 8 bytes each; r a multiple of 8.
        columns: `(8 c) (r / 8)` uint64.
    """
    one, two, four = np.uint64(8), np.uint64(16), np.uint64(32)  # bits to shift by
    ones, twos, fours = (
        np.uint64(0x00FF00FF00FF00FF),
        np.uint64(0x0000FFFF0000FFFF),
        np.uint64(0x00000000FFFFFFFF),
    )

    def swapped(a, b, shift, mask):
        return (a & mask) | ((b & mask) << shift), ((a >> shift) & mask) | (b & ~mask)

    for r in range(0, rows.shape[0], 8):
        to = r // 8
        for c in range(rows.shape[1]):
            a0, a1 = swapped(rows[r, c], rows[r + 1, c], one, ones)
            a2, a3 = swapped(rows[r + 2, c], rows[r + 3, c], one, ones)
            a4, a5 = swapped(rows[r + 4, c], rows[r + 5, c], one, ones)
            a6, a7 = swapped(rows[r + 6, c], rows[r + 7, c], one, ones)
            b0, b2 = swapped(a0, a2, two, twos)
            b1, b3 = swapped(a1, a3, two, twos)
            b4, b6 = swapped(a4, a6, two, twos)
            b5, b7 = swapped(a5, a7, two, twos)
            columns[8 * c, to], columns[8 * c + 4, to] = swapped(b0, b4, four, fours)
            columns[8 * c + 1, to], columns[8 * c + 5, to] = swapped(b1, b5, four, fours)
            columns[8 * c + 2, to], columns[8 * c + 6, to] = swapped(b2, b6, four, fours)
            columns[8 * c + 3, to], columns[8 * c + 7, to] = swapped(b3, b7, four, fours)
