"""Packages that make pixels faster change none of them: the resize and the JPEG decoder against Pillow."""

import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import compiled, png, rgb_image
from data.rgb_image import jpeg_pixels
from data.sources.record import IMAGE_ERRORS, decode_image
from data.transforms import resize as module
from data.transforms.resize import resize


@pytest.fixture
def without_packages(monkeypatch):
    """As if neither were installed."""

    def forget():
        for cached in (module._kernels, rgb_image._jpeg_decoder, png._unfilter, png._inflating):
            cached.cache_clear()

    for place in (compiled, rgb_image, png):
        monkeypatch.setattr(place, "if_installed", lambda name: None)
    forget()
    yield
    forget()


def by_pillow(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def edges(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Black and white dots: the cubic kernel overshoots at every one of them."""
    dots = np.random.default_rng(seed).integers(0, 2, (height, width, 3), dtype=np.uint8)
    return dots * np.uint8(255)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(before=st.tuples(*[st.integers(1, 150)] * 2), after=st.tuples(*[st.integers(1, 150)] * 2))
def test_the_kernels_give_pillows_pixels(before, after):
    pytest.importorskip("numba")
    assert module._kernels() is not None, "kernels and Pillow disagree"
    pixels = edges(*before)
    assert np.array_equal(resize(pixels, *after), by_pillow(pixels, *after))


@pytest.mark.parametrize("size", [(490, 518), (518, 504), (504, 518), (14, 1022), (980, 14)])
def test_sizes_near_the_original_and_far_from_it(size):
    pixels = edges(511, 512)
    assert np.array_equal(resize(pixels, *size), by_pillow(pixels, *size))


def test_without_numba_pillow_does_it(without_packages):
    assert module._kernels() is None
    assert np.array_equal(resize(edges(40, 30), 64, 20), by_pillow(edges(40, 30), 64, 20))


def test_kernels_that_differ_from_pillow_are_not_used(without_packages, monkeypatch):
    numba = pytest.importorskip("numba")
    monkeypatch.setattr(compiled, "if_installed", lambda name: numba)
    monkeypatch.setattr(module, "_weights", module._weights.__wrapped__)
    monkeypatch.setattr(module, "_cubic", lambda x: np.maximum(1 - x, 0.0))  # a linear kernel
    assert module._kernels() is None


def jpeg(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


OPTIONS = [
    {"subsampling": "4:4:4"}, {"subsampling": "4:2:2"}, {"subsampling": "4:2:0"}, {"progressive": True}, {"quality": 30},
    {"restart_marker_blocks": 2},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(37, 51, 3), (64, 48), (1, 1, 3)], ids=str)
def test_a_jpeg_has_pillows_pixels(shape, options):
    noise = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(noise).resize(shape[1::-1], Image.Resampling.BOX, reducing_gap=None))
    file = jpeg(smooth, **options)
    expected = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    assert np.array_equal(decode_image(file).rgb, expected)
    pytest.importorskip("simplejpeg")
    assert np.array_equal(jpeg_pixels(file), expected), "Pillow had to read it"


def test_other_colours_are_left_to_pillow():
    file = io.BytesIO()
    Image.fromarray(edges(20, 30)).convert("CMYK").save(file, "JPEG")
    expected = np.asarray(Image.open(file).convert("RGB"))
    assert np.array_equal(decode_image(file.getvalue()).rgb, expected)


def filtered(
    pixels: np.ndarray, kinds: list[int], pieces: int = 1, more: tuple[bytes, bytes] | None = None
) -> bytes:
    """A PNG file whose rows are written with these filters in turn, in so many chunks; encoded as the specification says."""
    height, width, _ = pixels.shape
    above = np.zeros(3 * width, np.int64)
    rows = b""
    for y, row in enumerate(pixels.reshape(height, -1).astype(np.int64)):
        left, corner = (np.concatenate([np.zeros(3, np.int64), line])[: 3 * width] for line in (row, above))
        distances = [abs(above - corner), abs(left - corner), abs(left + above - 2 * corner)]
        nearest = np.select(
            [(distances[0] <= distances[1]) & (distances[0] <= distances[2]), distances[1] <= distances[2]],
            [left, above],
            corner,
        )
        guess = [0 * row, left, above, (left + above) // 2, nearest]
        kind = kinds[y % len(kinds)]
        rows += bytes([kind]) + ((row - guess[min(kind, 4)]) % 256).astype(np.uint8).tobytes()
        above = row
    packed = zlib.compress(rows)
    step = -(-len(packed) // pieces)
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + png.PLAIN
    chunks = [(b"IHDR", header), *([more] if more else [])]
    chunks += [(b"IDAT", packed[at : at + step]) for at in range(0, len(packed), step)]
    return png.SIGNATURE + b"".join(
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        for kind, data in [*chunks, (b"IEND", b"")]
    )


@pytest.mark.parametrize("kinds", [[0], [1], [2], [3], [4], [4, 3, 2, 1, 0], [1, 4, 2]], ids=str)
@pytest.mark.parametrize("shape", [(9, 7, 3), (1, 1, 3), (40, 33, 3)], ids=str)
def test_a_plain_png_has_pillows_pixels(shape, kinds):
    pytest.importorskip("numba")
    pixels = np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)
    file = filtered(pixels, kinds, pieces=3)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(file))), pixels)
    assert np.array_equal(png.png_pixels(file), pixels) and np.array_equal(decode_image(file).rgb, pixels)


def test_other_pngs_are_left_to_pillow():
    pixels = edges(6, 5)
    for image in (
        Image.fromarray(pixels).convert("RGBA"), Image.fromarray(pixels).convert("L"), Image.fromarray(pixels).quantize(4),
    ):  # fmt: skip
        file = io.BytesIO()
        image.save(file, "PNG")
        assert png.png_pixels(file.getvalue()) is None
        assert np.array_equal(decode_image(file.getvalue()).rgb, np.asarray(image.convert("RGB")))
    black_is_transparent = filtered(pixels, [0], more=(b"tRNS", bytes(6)))
    assert png.png_pixels(black_is_transparent) is None
    assert decode_image(black_is_transparent).rgb[(pixels == 0).all(-1)].min() == 255
    for broken in (
        filtered(pixels, [7]),
        filtered(pixels[:3], [1]).replace(bytes([0, 0, 0, 3, 8, 2]), bytes([0, 0, 0, 9, 8, 2])),
    ):
        assert png.png_pixels(broken) is None


def outcome(content: bytes) -> bytes | None:
    try:
        return decode_image(content).rgb.tobytes()
    except IMAGE_ERRORS:
        return None


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_same_broken_files_are_refused_with_and_without_the_packages(kind, request):
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)
    whole = jpeg(pixels) if kind == "JPEG" else filtered(pixels, [4, 1, 3])
    files = [whole, whole[: len(whole) // 2], whole[:-2], whole + b"more", b"\xff\xd8\xff" + bytes(50)]
    for _ in range(300):
        broken = bytearray(whole)
        for place in rng.integers(0, len(whole), rng.integers(1, 4)):
            broken[place] = rng.integers(0, 256)
        files.append(bytes(broken))
    with_packages = [outcome(file) for file in files]
    request.getfixturevalue("without_packages")
    assert rgb_image._jpeg_decoder() is png._unfilter() is None
    assert with_packages == [outcome(file) for file in files]
    assert 5 < sum(made is None for made in with_packages) < len(files)
