"""PNG files: checksums, which Pillow does not look at, and the pixels of plain ones in half of Pillow's time.

Plain: 8 bits a channel, RGB, neither interlaced nor animated, nothing transparent. Source: the PNG specification (ISO/IEC 15948),
its chunks and filters.
"""

import zlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np

from data.compiled import compiled
from modeling.optional import if_installed

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PLAIN = bytes([8, 2, 0, 0, 0])
"""End of a plain picture's header: bits, colour type, compression, filters, interlacing."""

FEATURES = (b"tRNS", b"acTL")
"""Chunks of transparency and of animation."""

PAETH = 4


def require_checksums(content: bytes) -> None:
    """Refuse a file in which a bit was flipped: it would become other pixels.

    Raises:
        ValueError: if a chunk's checksum does not match, or the file is cut short.
    """
    for kind, data, checksum, at in _chunks(content):
        if zlib.crc32(data, zlib.crc32(kind)) != checksum:
            raise ValueError(f"checksum of PNG chunk {kind!r} at byte {at} does not match")


def png_pixels(content: bytes) -> np.ndarray | None:
    """`hh ww 3` uint8 of a plain PNG whose checksums match; None if Pillow has to read it."""
    unfilter = _unfilter()
    chunks = [(kind, data) for kind, data, _, _ in _chunks(content)]
    kind, header = chunks[0]
    if (
        unfilter is None
        or kind != b"IHDR"
        or header[8:] != PLAIN
        or any(kind in FEATURES for kind, _ in chunks)
    ):
        return None
    width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big")
    size = height * (1 + 3 * width)
    library = _inflating()
    try:
        rows = library.decompressobj().decompress(
            b"".join(data for kind, data in chunks if kind == b"IDAT"), size
        )
    except (library.error, ValueError):
        return None
    if len(rows) != size:
        return None
    pixels = np.empty((height, width, 3), np.uint8)
    known = unfilter(np.frombuffer(rows, np.uint8).reshape(height, -1), pixels.reshape(height, -1))
    return pixels if known else None


def _chunks(content: bytes) -> Iterator[tuple[bytes, memoryview, int, int]]:
    """Kind, data, checksum and place of each, to the last one."""
    view, at = memoryview(content), len(SIGNATURE)
    while at + 12 <= len(content):
        length = int.from_bytes(view[at : at + 4], "big")
        kind, end = bytes(view[at + 4 : at + 8]), at + 8 + length
        if end + 4 > len(content):
            break
        yield kind, view[at + 8 : end], int.from_bytes(view[end : end + 4], "big"), at
        if kind == b"IEND":
            return
        at = end + 4
    raise ValueError("the PNG file is cut short")


@cache
def _inflating() -> Any:
    return if_installed("isal.isal_zlib") or zlib


@cache
def _unfilter() -> Callable[..., bool] | None:
    return compiled(unfilter)


def unfilter(rows, pixels):
    """Undo the prediction that each row of a PNG was written with. For numba.

    Args:
        rows: `hh (1 + 3 ww)` uint8, each with the number of its filter in front.
        pixels: `hh (3 ww)` uint8, is filled.

    Returns:
        whether all filters are known ones.
    """
    height, n = pixels.shape
    above = np.zeros(n, np.uint8)

    def predicted(left, up, corner):
        by_left, by_up = abs(up - corner), abs(left - corner)
        by_corner = abs(left + up - 2 * corner)
        if by_left <= by_up and by_left <= by_corner:
            return left
        return up if by_up <= by_corner else corner

    for y in range(height):
        kind, row, out = rows[y, 0], rows[y, 1:], pixels[y]
        if kind > PAETH:
            return False
        if kind == PAETH:
            left0 = left1 = left2 = corner0 = corner1 = corner2 = np.int32(0)
            for j in range(0, n, 3):  # the channels side by side: each waits for its own left neighbour
                up0, up1, up2 = np.int32(above[j]), np.int32(above[j + 1]), np.int32(above[j + 2])
                left0 = (predicted(left0, up0, corner0) + np.int32(row[j])) & np.int32(255)
                left1 = (predicted(left1, up1, corner1) + np.int32(row[j + 1])) & np.int32(255)
                left2 = (predicted(left2, up2, corner2) + np.int32(row[j + 2])) & np.int32(255)
                out[j], out[j + 1], out[j + 2] = left0, left1, left2
                corner0, corner1, corner2 = up0, up1, up2
        elif kind == 0:
            out[:] = row
        elif kind == 2:
            for j in range(n):
                out[j] = row[j] + above[j]
        else:
            for j in range(n):
                left = np.int32(out[j - 3]) if j >= 3 else np.int32(0)
                guess = left if kind == 1 else (left + np.int32(above[j])) >> 1
                out[j] = np.uint8((np.int32(row[j]) + guess) & 255)
        above = out
    return True
