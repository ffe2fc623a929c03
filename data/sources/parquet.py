"""Parquet files: one record per row, whose pictures are bytes in its cells.

A row can only be had with its row group, so the groups read last are kept. Reading in any order is as quick as the groups are
small: 100 rows or fewer, as Hugging Face writes them for pictures.
"""

import io
import logging
import os
import posixpath
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.sources.building import Arrays, Tick
from data.sources.indexed import IndexedSource
from data.sources.record import Record, SkipSample, SourceLost, brief, parse_json
from data.sources.storage import Files, FileStamp, expand, is_remote, open_stream
from modeling.optional import require

logger = logging.getLogger(__name__)

MAX_GROUP_BYTES = 1 << 31
"""A row group that unpacks to more is not read."""

KEPT_BYTES = 1 << 27
"""Unpacked row groups that a process keeps."""

KEPT_FILES = 16
"""Files whose footers a process keeps."""

LARGE_GROUP_BYTES = 1 << 26
"""Row groups that unpack to more make reading in any order slow; the person is told."""


def _pyarrow(module: str) -> Any:
    return require(module, package="pyarrow", extra="parquet", why="a Parquet data set")


def index_row_groups(path: str, tick: Tick) -> Arrays:
    """`end`: rows up to the end of each row group. `bytes`: how much each unpacks to."""
    parquet, arrow = _pyarrow("pyarrow.parquet"), _pyarrow("pyarrow")
    try:
        with open_stream(path) as file, parquet.ParquetFile(file) as table:
            groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
            rows, sizes = [g.num_rows for g in groups], [g.total_byte_size for g in groups]
    except (arrow.ArrowException, OSError, ValueError) as e:
        if is_remote(path) and isinstance(e, OSError):
            raise  # perhaps the store's: it is asked again
        raise ValueError(f"{path}: not a readable Parquet file ({brief(e)}); write it again") from e
    return {
        "end": np.cumsum(rows, dtype=np.int64),
        "bytes": np.array(sizes, np.int64),
        "count": np.array([sum(rows)]),
    }


class ParquetSource(IndexedSource):
    """Rows of Parquet files. A cell of bytes, or a Hugging Face picture `{"bytes", "path"}`, becomes its name in `Record.data`.

    Args:
        path: a file, a folder of `.parquet` files, a `{000..009}` range or a glob pattern; or URLs.
        info_path: published JSON `{file: {"num_row_groups": n}}`: only the files that it names are read, and they are held
            against it. A file stands there by its path or its name.
        cache_dir: where the index is kept.

    Raises:
        ValueError: if there is no file, one is not Parquet, or the JSON and the files disagree.
    """

    def __init__(
        self, path: str | Path, info_path: str | Path | None = None, cache_dir: str | Path | None = None
    ):
        files = expand(path, "parquet_path", ".parquet")
        expected: Mapping[str, int] = {}
        if info_path is not None:
            expected = _listed(files, read_parquet_info(info_path), info_path)
            files = sorted(expected)
        super().__init__(index_row_groups, files, str(path), cache_dir)
        for stamp, part in zip(self.index.stamps, self.index.parts, strict=True):
            stated, there = expected.get(stamp.path), len(part["end"])
            if stated is not None and stated != there:
                raise ValueError(
                    f"{stamp.path}: {there} row groups, {info_path} says {stated}; write the JSON again"
                )
        largest = max(int(part["bytes"].max(initial=0)) for part in self.index.parts)
        if largest > LARGE_GROUP_BYTES:
            logger.warning(
                "%s: row groups of up to %.0f MiB; each row that is read in shuffled order costs a whole one: write groups of "
                "100 rows or fewer (row_group_size), or tar shards",
                path,
                largest / 2**20,
            )
        self._groups: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._opened: OrderedDict[str, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_groups": OrderedDict(), "_opened": OrderedDict()}

    def read_in(self, file: FileStamp, arrays: Arrays, row: int) -> Record:
        group = int(np.searchsorted(arrays["end"], row, side="right"))
        first = int(arrays["end"][group - 1]) if group else 0
        where = f"{file.path}#row {row}"
        unpacked = int(arrays["bytes"][group])
        if unpacked > MAX_GROUP_BYTES:
            message = f"{where}: row group {group} unpacks to {unpacked:,} bytes; write smaller ones"
            raise SkipSample("too_large", message, where)
        arrow = _pyarrow("pyarrow")
        data: dict[str, Any] = {}
        content: dict[str, bytes] = {}
        try:
            table = self._group(file, group)
            for name, column in zip(table.column_names, table.columns, strict=True):
                data[name] = _named(column[row - first].as_py(), name, content)
        except (SourceLost, SkipSample):
            raise
        except (arrow.ArrowException, OSError, ValueError, LookupError, TypeError) as e:
            message = f"{where}: row group {group} cannot be read ({brief(e)}); write the file again"
            raise SkipSample("bad_row_group", message, where) from e
        return Record(data=data, where=where, fetch=_CellFetch(content))

    def _group(self, file: FileStamp, number: int) -> Any:
        key = (file.path, number)
        if key not in self._groups:
            if file.path not in self._opened:
                while len(self._opened) >= KEPT_FILES:
                    self._opened.popitem(last=False)
                self._opened[file.path] = _pyarrow("pyarrow.parquet").ParquetFile(
                    _Opened(self.files, file), pre_buffer=False, page_checksum_verification=True
                )
            table = self._opened[file.path].read_row_group(number, use_threads=False)
            while self._groups and sum(t.nbytes for t in self._groups.values()) + table.nbytes > KEPT_BYTES:
                self._groups.popitem(last=False)
            self._groups[key] = table
        self._groups.move_to_end(key)
        return self._groups[key]


def _named(value: Any, name: str, content: dict[str, bytes]) -> Any:
    """The value with names in the place of bytes, which go to `content`."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        value = value["bytes"]
    if isinstance(value, bytes):
        content[name] = value
        return name
    if isinstance(value, list):
        return [_named(v, f"{name}/{i}", content) for i, v in enumerate(value)]
    return value


@dataclass(frozen=True, slots=True)
class _CellFetch:
    content: Mapping[str, bytes]

    def __call__(self, name: str) -> bytes:
        if name not in self.content:
            raise KeyError(f"cells with bytes are {', '.join(self.content) or 'none'}")
        return self.content[name]


class _Opened(io.RawIOBase):
    """A file as pyarrow wants it, over `Files`: checked against its stamp and tried again where it fails."""

    def __init__(self, files: Files, file: FileStamp):
        self._files, self._file, self._at = files, file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._file.size - self._at)
        size = left if size is None or size < 0 else min(size, left)
        content = self._files.read(self._file, self._at, size) if size else b""
        self._at += size
        return content


# ------------------------------------------------------------------------------------------------- published JSON


def read_parquet_info(path: str | Path) -> dict[str, int]:
    """Row groups by file, from a published `parquet_info` JSON `{file: {"num_row_groups": n}}`.

    Raises:
        ValueError: if it is missing or of another form.
    """
    try:
        with open(path, "rb") as file:
            content = parse_json(file.read())
    except (OSError, ValueError) as e:
        raise ValueError(
            f"{path}: cannot be read ({brief(e)}); check 'parquet_info_path' in dataset_info"
        ) from e
    groups: dict[str, int] = {}
    for name, entry in content.items() if isinstance(content, dict) else [("", None)]:
        count = entry.get("num_row_groups") if isinstance(entry, dict) else None
        if not isinstance(count, int) or count < 0:
            raise ValueError(f'{path}: expected {{"FILE.parquet": {{"num_row_groups": 12}}}}, found {name!r}')
        groups[name] = count
    return groups


def _listed(files: Sequence[str], info: Mapping[str, int], info_path: str | Path) -> dict[str, int]:
    """Which of the files the JSON lists, with their row groups: by whole path, else by name (copies lie elsewhere)."""
    by_path = {file: file for file in files}
    by_name = {posixpath.basename(file): file for file in files}
    found: dict[str, int] = {}
    for listed, groups in info.items():
        file = by_path.get(listed) or by_name.get(posixpath.basename(listed))
        if file is None:
            raise ValueError(
                f"{info_path}: {listed} is not among the {len(files)} Parquet files; correct the JSON or the data's place"
            )
        found[file] = groups
    if left := len(files) - len(found):
        logger.info("%s: %d Parquet files are not listed and are left out", info_path, left)
    return found
