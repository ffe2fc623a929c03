"""Moved to data/sources/."""

from data.sources import (
    CocoSource,
    ConcatSource,
    JsonlSource,
    Record,
    SelectedSource,
    SkipSample,
    Source,
    TarSource,
)
from data.sources.record import IMAGE_ERRORS

__all__ = [
    "IMAGE_ERRORS", "CocoSource", "ConcatSource", "JsonlSource", "Record", "SelectedSource", "SkipSample", "Source",
    "TarSource",
]  # fmt: skip
