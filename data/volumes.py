"""Slices of volumes as pictures: DICOM files and series through pydicom, NIfTI through nibabel, and pictures of 16 bits.

A volume is read whole and gives its slices by number, from the lowest position on. A slice is shown as radiologists look at it:
the patient's right on the left of an axial or coronal picture, the front on top of an axial one, the head on top of the others.
DICOM is shown as it was scanned. Numbers are mapped to 0 to 255 by a window: its centre and width, in the volume's own units
(Hounsfield units for CT). Nothing is unpickled, and compressed DICOM needs whatever decoder pydicom asks for.
"""

import gzip
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from data.sources.record import IMAGE_ERRORS, IMAGE_FORMATS, Record, SkipSample, brief
from modeling.optional import require

PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}
"""Plane -> the axis of a volume (towards right, front, head) that numbers its slices."""

NIFTI, DICOM = (".nii", ".nii.gz"), (".dcm", ".dicom", ".ima")
QUANTILES = (0.005, 0.995)
"""What a window spans where nothing says which: nearly all values of the volume."""

SAMPLED = 200_000
"""Of a large volume so many values are looked at, spread over it."""

MAX_VALUES = 1 << 31
"""A volume of more values is no picture of a patient."""

Window = tuple[float, float]
"""Centre and width."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Volume:
    """Slices of one scan.

    Attributes:
        values: `n hh ww` float32, in the order of the slices; or int for label maps.
        spacing: in mm, of rows and columns of a slice.
        between: in mm, from slice to slice; 0 if not known.
        window: which the file recommends, if it does.
    """

    values: np.ndarray
    spacing: tuple[float, float]
    between: float = 0.0
    window: Window | None = None

    def number(self, index: int | None, what: str) -> int:
        """The number of a slice; the middle one if none is named.

        Raises:
            SkipSample: `bad_slice` if there is no such.
        """
        count = len(self.values)
        if index is None:
            return count // 2
        if not 0 <= index < count:
            raise SkipSample("bad_slice", f"{what}: slice {index} is asked for, there are {count}, from 0")
        return index

    def picture(self, index: int, window: Window | None) -> np.ndarray:
        """`hh ww 3` uint8 of a slice."""
        return shown(self.values[index], window or self.window or _spanning(self.values))


def is_volume(name: str) -> bool:
    """Whether a file is read here, and not as a picture; a name that ends with "/" is a folder with a series."""
    return name.lower().endswith((*NIFTI, *DICOM)) or name.endswith("/")


def read_volume(record: Record, name: str, plane: str = "axial") -> Volume:
    """A volume by the name that a row gives it.

    Args:
        record: whose file it is.
        name: a `.nii`, `.nii.gz` or DICOM file, or a folder ("ct/") of one DICOM series.
        plane: of NIfTI slices.

    Raises:
        SkipSample: if it is missing ("missing_image") or cannot be read ("bad_image").
        ImportError: if its package is absent.
    """
    if name.endswith("/"):
        names = [
            n
            for n in record.list_folder(name.rstrip("/"), "image")
            if not n.endswith((".txt", "DICOMDIR", ".json"))
        ]
        contents = [record.read_file(n) for n in names]
    else:
        contents = [record.read_file(name)]
    try:
        if name.lower().endswith(NIFTI):
            return _nifti(contents[0], plane)
        return _dicom(contents)
    except (*IMAGE_ERRORS, NotImplementedError) as e:  # whatever the readers raise on broken files
        if isinstance(e, ImportError):
            raise
        raise SkipSample(
            "bad_image",
            f"{record.where}: volume {name!r} cannot be read ({brief(e)}); replace it or remove the record",
        ) from e


def shown(values: np.ndarray, window: Window) -> np.ndarray:
    """`hh ww` numbers -> `hh ww 3` uint8: a window's lower end is black, its upper end white."""
    centre, width = window
    scaled = (values.astype(np.float64) - (centre - width / 2)) * (255 / width)
    grey = np.clip(np.rint(np.nan_to_num(scaled)), 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def deep_picture(content: bytes, window: Window | None) -> np.ndarray | None:
    """`hh ww 3` uint8 of a picture file with more than 8 bits a value, None if it is an ordinary one.

    Raises:
        one of `IMAGE_ERRORS`: if it is broken.
    """
    image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
    if not image.mode.startswith(("I", "F")):
        return None
    values = np.asarray(image, np.float32)
    return shown(values, window or _spanning(values))


def _spanning(values: np.ndarray) -> Window:
    values = values.ravel()[:: max(1, values.size // SAMPLED)]
    low, high = (
        np.quantile(values[np.isfinite(values)], QUANTILES) if np.isfinite(values).any() else (0.0, 1.0)
    )
    return (float(low) + float(high)) / 2, max(float(high) - float(low), 1e-6)


def _nifti(content: bytes, plane: str) -> Volume:
    nibabel = require("nibabel", package="nibabel", extra="medical", why="NIfTI volumes")
    data = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    kind = (
        nibabel.Nifti2Image
        if data[:2] in (b"\x1c\x02", b"\x02\x1c") and data[4:7] == b"n+2"
        else nibabel.Nifti1Image
    )
    image = nibabel.as_closest_canonical(kind.from_bytes(data))
    if np.prod(image.shape, dtype=np.float64) > MAX_VALUES or len(image.shape) not in (2, 3, 4):
        raise ValueError(f"a volume of {image.shape} values")
    values = np.asarray(image.dataobj)
    values = values[..., None] if values.ndim == 2 else values[..., 0] if values.ndim == 4 else values
    steps = [float(step) for step in (*image.header.get_zooms(), 1.0)[:3]]
    axis = PLANES[plane]
    across, up = (k for k in range(3) if k != axis)
    # Right, front and head have the high numbers: mirrored, the patient's right is on the left and the head on top.
    values = np.moveaxis(values, (axis, up, across), (0, 1, 2))[:, ::-1, ::-1]
    return Volume(values=_plain(values), spacing=(steps[up], steps[across]), between=steps[axis])


def _dicom(contents: Sequence[bytes]) -> Volume:
    pydicom = require("pydicom", package="pydicom", extra="medical", why="DICOM volumes")
    files = [pydicom.dcmread(io.BytesIO(content)) for content in contents]
    files = [file for file in files if "PixelData" in file]
    if not files:
        raise ValueError("no file with pixels")
    series = {str(file.get("SeriesInstanceUID", "")) for file in files}
    if len(series) > 1:
        raise ValueError(f"{len(series)} series in one folder; give each its own")
    files.sort(key=_position)
    slices = [_slices(pydicom, file) for file in files]
    if len({s.shape[1:] for s in slices}) > 1:
        raise ValueError("slices of several sizes")
    first = files[0]
    row, column = (
        float(v) for v in first.get("PixelSpacing", None) or first.get("ImagerPixelSpacing", None) or (1, 1)
    )
    between = (
        abs(_position(files[1])[0] - _position(first)[0])
        if len(files) > 1
        else float(first.get("SliceThickness") or 0)
    )
    centre, width = (_first(first.get(name)) for name in ("WindowCenter", "WindowWidth"))
    inverted = str(first.get("PhotometricInterpretation", "")) == "MONOCHROME1"
    values = np.concatenate(slices)
    if inverted:  # small numbers are white there
        values = -values
    window = None if centre is None or not width else (-centre if inverted else centre, width)
    return Volume(values=values, spacing=(row, column), between=between, window=window)


def _slices(pydicom: Any, file: Any) -> np.ndarray:
    """`n hh ww` float32, in units of the scanner."""
    if int(file.get("SamplesPerPixel", 1)) != 1:
        raise ValueError("a colour picture; save it as PNG or JPEG")
    values = pydicom.pixels.apply_modality_lut(file.pixel_array, file).astype(np.float32)
    return values[None] if values.ndim == 2 else values


def _position(file: Any) -> tuple[float, int]:
    """Where a slice lies across the series, and its number, which decides where nothing says so."""
    place, directions = file.get("ImagePositionPatient"), file.get("ImageOrientationPatient")
    number = int(file.get("InstanceNumber") or 0)
    if place is None or directions is None:
        return float(number), number
    normal = np.cross([float(v) for v in directions[:3]], [float(v) for v in directions[3:]])
    return float(np.dot(normal, [float(v) for v in place])), number


def _first(value: Any) -> float | None:
    """A number, or the first of several."""
    if value is None or value == "":
        return None
    several = isinstance(value, (list, tuple)) or hasattr(value, "append")
    return float(value[0]) if several else float(value)


def _plain(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values if values.dtype.kind in "iub" else values.astype(np.float32))
