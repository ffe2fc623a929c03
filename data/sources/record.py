"""What a source gives: a `Record`, or the reason why there is none."""

import io
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image, UnidentifiedImageError

from data import png
from data.motion import Motion
from data.rgb_image import RgbImage, jpeg_pixels

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What may be opened. Of Pillow's other formats one (EPS) starts a program on what it is given."""

IMAGE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    MemoryError,
    Warning,  # where warnings are errors
    zlib.error,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow's decoders raise on broken files."""


class SkipSample(Exception):
    """A record that cannot be used; it is counted and left out.

    Args:
        reason: short key to count by ("missing_image").
        message: one line for a person: file, line or member, what is wrong.
        where: file and line or member, if the record did not even get as far as having a `where` of its own.
    """

    def __init__(self, reason: str, message: str, where: str = ""):
        super().__init__(reason, message, where)
        self.reason = reason
        self.message = message
        self.where = where


class DataStops(ValueError):
    """The data end the run. Nothing is wrong with what has been trained: it is saved."""


class TooManyRejects(DataStops):
    """More records of a group are unusable than the user allows."""


class SourceLost(DataStops):
    """A file of a source vanished or changed while a run reads it: no fault of a record, so the run has to stop."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a source.

    Attributes:
        data: the row's fields (JSONL); `{"image", "annotations", "categories"}` (COCO); `{"__key__", "json", "txt", ...}`
            by member extension, text decoded (tar); the row's columns, where instead of bytes stand the names to fetch
            them by: `{"image": "image", "captions": "..."}`, `{"image_list": ["image_list/0", "image_list/1"]}` (Parquet);
            `{"image": "x.jpg", "text", "is_sentence", "shapes"}` as the file has them (ReasonSeg).
        where: file and line or member, for people.
        fetch: reads the bytes that a name stands for: a path below the data directory, a member's extension, a cell.
        motion: of its pictures, if they are moved (`data/augment.py`).
    """

    data: dict[str, Any]
    where: str
    fetch: Callable[[str], bytes]
    motion: Motion | None = None

    def open_image(self, name: str) -> RgbImage:
        """The decoded picture of a name that `fetch` knows.

        Raises:
            SkipSample: if it is missing ("missing_image"), lies outside the data directory ("unsafe_path"), is larger than may
                be read ("too_large") or does not decode ("bad_image").
            SourceLost: if the file that holds it vanished.
        """
        content = self.read_file(name)
        try:
            image = decode_image(content)
            return image if self.motion is None else image.moved(self.motion)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
            what = f"{self.where}: image {name!r} is larger than may be decoded"
            message = f"{what} ({brief(e)}); make it smaller or remove the record"
            raise SkipSample("too_large", message) from e
        except IMAGE_ERRORS as e:
            message = (
                f"{self.where}: image {name!r} is broken or not an image ({brief(e)}); "
                "replace it or remove the record"
            )
            raise SkipSample("bad_image", message) from e

    def read_file(self, name: str, what: str = "image") -> bytes:
        """The bytes of a name that `fetch` knows; `what` it should be names the error ("missing_image").

        Raises:
            SkipSample, SourceLost: as `open_image`.
        """
        return self._reached(name, what, self.fetch)

    def list_folder(self, name: str, what: str = "video") -> list[str]:
        """The names of the files in a folder below the data directory, sorted; `fetch` knows them.

        Raises:
            SkipSample, SourceLost: as `open_image`.
        """
        return self._reached(name, what, getattr(self.fetch, "list_folder", _no_folders))

    def _reached(self, name: str, what: str, reach: Callable[[str], Any]) -> Any:
        try:
            return reach(name)
        except SourceLost:
            raise
        except SkipSample as e:
            raise SkipSample(e.reason, f"{self.where}: {e.message}", self.where) from e
        except (OSError, KeyError, TypeError, ValueError) as e:
            message = (
                f"{self.where}: {what} {name!r} cannot be read ({brief(e)}); restore it or remove the record"
            )
            raise SkipSample(f"missing_{what}", message) from e


def _no_folders(name: str) -> list[str]:
    raise ValueError("there are no folders in this format")


class Source(Protocol):
    """Records by number."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Record: ...


def decode_image(content: bytes) -> RgbImage:
    """A whole picture from the bytes of its file.

    JPEG could be decoded to a half, a quarter or an eighth of its size straight away (Pillow's draft mode). It is not: of seven
    photographs of 1,500 px, resized to 70 to 518 px, the worst pixel was then up to 92 levels of 255 away from what the whole
    picture gives, and still up to 19 with four times the wanted size left for the resize.

    Raises:
        one of `IMAGE_ERRORS`: if it is broken, of a format that is not opened, or larger than `Image.MAX_IMAGE_PIXELS` (a
            small file may claim any size).
    """
    if content.startswith(png.SIGNATURE):
        png.require_checksums(content)
    try:
        image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        raise ValueError("of no picture format that is read") from None
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise Image.DecompressionBombError(f"{image.width}x{image.height} px, the limit is {limit:,} pixels")
    pixels = None
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        pixels = jpeg_pixels(content)
    elif image.format == "PNG":
        pixels = png.png_pixels(content)
    if pixels is None:
        image.load()
        return RgbImage.of(image)
    return RgbImage(pixels)


def parse_json(content: bytes | str) -> Any:
    """JSON from outside; bytes are UTF-8, with or without a mark at the start.

    Raises:
        ValueError: whatever is wrong with it.
    """
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def printable(text: str) -> str:
    """A text from outside, so that it can be written as UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def brief(error: BaseException) -> str:
    """An error's kind and text in one line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"  # its own text says "line 1", whatever line of the file it is
    text = " ".join(str(error).split())
    if type(error) is ValueError:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
