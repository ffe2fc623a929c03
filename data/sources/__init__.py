"""Random access to the records of a data set: `source.read(i) -> Record`.

A source knows how many records it has and reads any one of them by number; it keeps no place and no order (`data/order.py`
does). Where the records lie is found once and kept in a file (`data/sources/index.py`). A record that cannot be used raises
`SkipSample`, a data set that cannot be opened `ValueError`, a file that vanishes during a run `SourceLost`.

A format is one file and one row in `FORMATS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from data.sources.coco import CocoSource
from data.sources.combine import ConcatSource, SelectedSource
from data.sources.jsonl import JsonlSource
from data.sources.parquet import ParquetSource
from data.sources.reasonseg import ReasonSegSource
from data.sources.record import DataStops, Record, SkipSample, Source, SourceLost, TooManyRejects
from data.sources.tar import TarSource

Location = Mapping[str, str]
"""Where a data set lies: paths and URLs by key."""


@dataclass(frozen=True, slots=True)
class Format:
    """How the data sets of a format are named and opened.

    Attributes:
        keys: the location needs one of them.
        open: makes the source of a location; indexes are kept in the directory given (None: see `open_index`).
        more: other keys that the location may have.
        counts_files: `num_used_data` counts files, as published, not records.
    """

    keys: tuple[str, ...]
    open: Callable[[Location, str | Path | None], Source]
    more: tuple[str, ...] = ()
    counts_files: bool = False


FORMATS: Mapping[str, Format] = {
    # `source_format` of a dataset class -> how it is read
    "jsonl": Format(
        ("jsonl_path",),
        lambda at, cache: JsonlSource(at["jsonl_path"], at.get("data_dir"), cache),
        ("data_dir",),
    ),
    "tar": Format(("tar_path",), lambda at, cache: TarSource(at["tar_path"], cache)),
    "parquet": Format(
        ("parquet_path", "data_dir"),
        lambda at, cache: ParquetSource(
            at.get("parquet_path") or at["data_dir"], at.get("parquet_info_path"), cache
        ),
        ("parquet_info_path",),
        counts_files=True,
    ),
    "coco": Format(
        ("coco_path",),
        lambda at, cache: CocoSource(at["coco_path"], at.get("data_dir"), cache),
        ("data_dir",),
    ),
    "reasonseg": Format(("reasonseg_path",), lambda at, cache: ReasonSegSource(at["reasonseg_path"], cache)),
}

LOCATION_KEYS = tuple(dict.fromkeys(key for f in FORMATS.values() for key in (*f.keys, *f.more)))
"""Every key that a location may have."""

__all__ = [
    "FORMATS",
    "LOCATION_KEYS",
    "CocoSource",
    "ConcatSource",
    "DataStops",
    "Format",
    "JsonlSource",
    "Location",
    "ParquetSource",
    "ReasonSegSource",
    "Record",
    "SelectedSource",
    "SkipSample",
    "Source",
    "SourceLost",
    "TarSource",
    "TooManyRejects",
]
