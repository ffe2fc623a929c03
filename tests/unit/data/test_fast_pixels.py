"""Packages that make pixels faster change none of them: the resize and the JPEG decoder against Pillow."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import rgb_image
from data.rgb_image import jpeg_pixels
from data.sources.record import IMAGE_ERRORS, decode_image
from data.transforms import resize as module
from data.transforms.resize import resize


@pytest.fixture
def without_packages(monkeypatch):
    """As if neither were installed."""

    def forget():
        for cached in (module._kernels, rgb_image._jpeg_decoder):
            cached.cache_clear()

    for place in (module, rgb_image):
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
    monkeypatch.setattr(module, "if_installed", lambda name: numba)
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


def outcome(content: bytes) -> bytes | None:
    try:
        return decode_image(content).rgb.tobytes()
    except IMAGE_ERRORS:
        return None


def test_the_same_broken_files_are_refused_with_and_without_the_decoder(request):
    rng = np.random.default_rng(2)
    whole = jpeg(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8))
    files = [whole, whole[: len(whole) // 2], whole[:-2], whole + b"more", b"\xff\xd8\xff" + bytes(50)]
    for _ in range(300):
        broken = bytearray(whole)
        for place in rng.integers(0, len(whole), rng.integers(1, 4)):
            broken[place] = rng.integers(0, 256)
        files.append(bytes(broken))
    with_packages = [outcome(file) for file in files]
    request.getfixturevalue("without_packages")
    assert rgb_image._jpeg_decoder() is None
    assert with_packages == [outcome(file) for file in files]
    assert 5 < sum(made is None for made in with_packages) < 300
