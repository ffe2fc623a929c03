"""A decoded picture: RGB pixels, channels last, as decoders make them and the resize reads them."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from data.motion import Motion, Placement
from modeling.optional import if_installed


@dataclass(frozen=True, slots=True, eq=False)
class RgbImage:
    """Pixels of a picture of any mode, as RGB; what was transparent shows white.

    Attributes:
        rgb: `hh ww 3` uint8, contiguous; nobody writes to it.
        placed: how it was moved, if it was: annotations are of the picture before.
    """

    rgb: np.ndarray
    placed: Placement | None = None

    @staticmethod
    def of(image: Image.Image) -> "RgbImage":
        """Pillow's picture, read now if its file has not been read."""
        return RgbImage(np.array(to_rgb(image)))

    def moved(self, motion: Motion) -> "RgbImage":
        """The picture after a motion."""
        placed = motion.place(self.size)
        cut = placed.cut(self.rgb)
        if placed.scaled != (cut.shape[1], cut.shape[0]):
            cut = np.array(Image.fromarray(cut).resize(placed.scaled, Image.Resampling.BICUBIC))
        return RgbImage(placed.turned(cut), placed)

    @property
    def annotated_size(self) -> tuple[int, int]:
        """Width and height of the picture that boxes and masks were made for."""
        return self.size if self.placed is None else self.placed.original

    @property
    def width(self) -> int:
        return self.rgb.shape[1]

    @property
    def height(self) -> int:
        return self.rgb.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, in Pillow's order."""
        return self.width, self.height


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB; what is transparent shows white."""
    # The published code ignores the alpha of grey pictures (mode LA); ours must see the same pixels.
    if image.mode != "LA" and image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def jpeg_pixels(content: bytes) -> np.ndarray | None:
    """`hh ww 3` uint8 of a JPEG file in colour or grey: Pillow's pixels, without its copies; None if Pillow has to read it."""
    decode = _jpeg_decoder()
    try:
        # A file that is not wholly in order is Pillow's to judge: the same ones are refused whoever decodes the others.
        return decode(content) if decode else None
    except ValueError:
        return None


@cache
def _jpeg_decoder() -> Callable[[bytes], np.ndarray] | None:
    simplejpeg = if_installed("simplejpeg")
    if simplejpeg is None:
        return None

    def decode(content: bytes) -> np.ndarray:
        return simplejpeg.decode_jpeg(content, "RGB", fastdct=False, fastupsample=False, strict=True)

    # Both bring a libjpeg-turbo of their own; should these ever round differently, what is installed must not decide on pixels.
    pixels = np.random.default_rng(0).integers(0, 256, (24, 42, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=70, subsampling="4:2:0")
    return decode if np.array_equal(decode(file.getvalue()), np.asarray(Image.open(file))) else None
