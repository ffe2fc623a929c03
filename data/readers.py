"""Random access to the records of a data set: `(file, i) -> Record`.

A `Source` knows how many records it has and reads any one of them by number; it keeps no place and no order
(`data/order.py` does). Indexes of byte offsets are built once and kept beside the data as `FILE.index.npz`;
where that cannot be written, they are built again in every process that opens the file. A record that cannot
be read raises `SkipSample`, a data set that cannot be opened `ValueError`.
"""

import glob
import io
import json
import logging
import os
import re
import struct
import tarfile
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from data.order import permute, stable_hash

logger = logging.getLogger(__name__)

IMAGE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
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


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a source.

    Attributes:
        data: the row's fields (JSONL); `{"image", "annotations", "categories"}` (COCO); `{"__key__", "json", "txt",
            ...}` by member extension, text decoded (tar).
        where: file and line or member, for people.
        fetch: reads the bytes that a row names: a path below the data directory, or a member's extension.
    """

    data: dict[str, Any]
    where: str
    fetch: Callable[[str], bytes]

    def open_image(self, name: str) -> Image.Image:
        """The decoded picture `name`: a path below the data directory, or a tar member's extension ("png").

        Raises:
            SkipSample: if it is missing ("missing_image") or does not decode ("bad_image").
        """
        try:
            content = self.fetch(name)
        except (OSError, KeyError, ValueError) as e:
            raise SkipSample(
                "missing_image",
                f"{self.where}: image {name!r} cannot be read ({_brief(e)}); restore it or remove the record",
            ) from e
        try:
            image = Image.open(io.BytesIO(content))
            image.load()
        except IMAGE_ERRORS as e:
            message = (
                f"{self.where}: image {name!r} is broken or not an image ({_brief(e)}); "
                "replace it or remove the record"
            )
            raise SkipSample("bad_image", message) from e
        return image


class Source(Protocol):
    """Records by number."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Record: ...


# ------------------------------------------------------------------------------------------------------ JSONL


class JsonlSource:
    """One record per line; blank lines are no records.

    Args:
        path: the file.
        data_dir: what image paths in the rows are relative to (default: the file's directory).

    Raises:
        ValueError: if the file is missing or has no line.
    """

    def __init__(self, path: str | Path, data_dir: str | Path | None = None):
        self.path = _existing(path, "jsonl_path")
        index = cached_index(self.path, _index_lines)
        self._start, self._length, self._line = index["start"], index["length"], index["line"]
        _require_records(len(self), self.path)
        self._files = _Files()
        self._fetch = _FileFetch(Path(data_dir) if data_dir is not None else self.path.parent)

    def __len__(self) -> int:
        return len(self._start)

    def read(self, index: int) -> Record:
        where = f"{self.path}:{self._line[index]}"
        content = self._files.read(self.path, int(self._start[index]), int(self._length[index]))
        try:
            row = json.loads(content.strip())
        except ValueError as e:  # also UnicodeDecodeError
            raise SkipSample(
                "bad_json", f"{where}: not valid JSON ({_brief(e)}); correct or remove the line", where
            ) from e
        if not isinstance(row, dict):
            raise SkipSample(
                "bad_json", f"{where}: expected a JSON object, found {type(row).__name__}", where
            )
        return Record(data=row, where=where, fetch=self._fetch)


def _index_lines(path: Path) -> dict[str, np.ndarray]:
    start, length, line = [], [], []
    offset = 0
    with path.open("rb") as file:
        for number, content in enumerate(file, start=1):
            if content.strip():
                start.append(offset)
                length.append(len(content))
                line.append(number)
            offset += len(content)
    return {name: np.array(v, np.int64) for name, v in (("start", start), ("length", length), ("line", line))}


# -------------------------------------------------------------------------------------------------------- tar


class TarSource:
    """WebDataset shards: consecutive members `KEY.EXT` of an uncompressed tar make one record.

    JSON members are parsed, text members decoded; others are read when `open_image` or `fetch` asks for them.

    Args:
        path: one shard, a `{000000..000009}` range, or a glob pattern.

    Raises:
        ValueError: if no shard is found, or a shard is not a plain tar.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        self.shards = _shards(self.path)
        self._index = [cached_index(shard, _index_members) for shard in self.shards]
        self._ends = list(accumulate(len(index["key"]) for index in self._index))
        _require_records(len(self), self.path)
        self._files = _Files()

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> Record:
        shard = bisect_right(self._ends, index)
        table, row = self._index[shard], index - (self._ends[shard - 1] if shard else 0)
        members = {
            str(table["ext"][m]): (int(table["offset"][m]), int(table["size"][m]))
            for m in range(table["first"][row], table["first"][row + 1])
        }
        key = str(table["key"][row])
        where = f"{self.shards[shard]}#{key}"
        fetch = _TarFetch(self._files, self.shards[shard], members)
        data: dict[str, Any] = {"__key__": key}
        for ext in members:
            if ext in _DECODERS:
                try:
                    data[ext] = _DECODERS[ext](fetch(ext))
                except ValueError as e:
                    raise SkipSample(
                        "bad_json",
                        f"{where}.{ext}: not valid {ext} ({_brief(e)}); write the shard again",
                        where,
                    ) from e
        return Record(data=data, where=where, fetch=fetch)


_DECODERS: Mapping[str, Callable[[bytes], Any]] = {
    "json": json.loads,
    "txt": bytes.decode,
    "caption": bytes.decode,
    "cls": int,
}


@dataclass(frozen=True, slots=True)
class _TarFetch:
    files: "_Files"
    shard: Path
    members: Mapping[str, tuple[int, int]]

    def __call__(self, name: str) -> bytes:
        if name not in self.members:
            raise KeyError(f"members are {', '.join(sorted(self.members))}")
        return self.files.read(self.shard, *self.members[name])


def _index_members(path: Path) -> dict[str, np.ndarray]:
    keys: list[str] = []
    first: list[int] = []
    ext: list[str] = []
    offset: list[int] = []
    size: list[int] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not keys or keys[-1] != key:
                    keys.append(key)
                    first.append(len(ext))
                ext.append(extension.lower())
                offset.append(member.offset_data)
                size.append(member.size)
    except (tarfile.TarError, OSError) as e:
        raise ValueError(
            f"{path}: not a readable, uncompressed tar ({_brief(e)}); write the shard again"
        ) from e
    first.append(len(ext))
    return {
        "key": np.array(keys, dtype=np.str_),
        "first": np.array(first, np.int64),
        "ext": np.array(ext, dtype=np.str_),
        "offset": np.array(offset, np.int64),
        "size": np.array(size, np.int64),
    }


def _shards(pattern: str) -> list[Path]:
    brace = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if brace:
        low, high = brace.groups()
        names = [
            f"{pattern[: brace.start()]}{n:0{len(low)}d}{pattern[brace.end() :]}"
            for n in range(int(low), int(high) + 1)
        ]
        return [_existing(name, "tar_path") for name in names]
    if glob.has_magic(pattern):
        found = sorted(Path(name) for name in glob.glob(pattern))
        if not found:
            raise ValueError(f"{pattern}: no such shard; check 'tar_path' in dataset_info")
        return found
    return [_existing(pattern, "tar_path")]


# ------------------------------------------------------------------------------------------------------- COCO


class CocoSource:
    """A COCO JSON: one record per image that has annotations, `{"image", "annotations", "categories"}`.

    `categories` maps the id to the category. Images without annotations are left out: they teach nothing.

    Args:
        path: the JSON file.
        data_dir: what `file_name`s are relative to (default: the file's directory).

    Raises:
        ValueError: if the file is missing, is not COCO JSON, or has no annotated image.
    """

    def __init__(self, path: str | Path, data_dir: str | Path | None = None):
        self.path = _existing(path, "coco_path")
        content = _coco_tables(self.path)
        self._categories = {c["id"]: c for c in content["categories"]}
        annotations: dict[Any, list[dict[str, Any]]] = {}
        for annotation in content["annotations"]:
            annotations.setdefault(annotation.get("image_id"), []).append(annotation)
        rows = [
            json.dumps({"image": image, "annotations": annotations[image["id"]]}).encode()
            for image in content["images"]
            if image["id"] in annotations
        ]
        _require_records(len(rows), self.path)
        if empty := len(content["images"]) - len(rows):
            logger.info("%s: %d images without annotations are left out", self.path, empty)
        # One block of bytes: cheap to send to workers, and a record can be changed without changing
        # the source.
        self._ends = np.cumsum([len(row) for row in rows])
        self._rows = b"".join(rows)
        self._fetch = _FileFetch(Path(data_dir) if data_dir is not None else self.path.parent)

    def __len__(self) -> int:
        return len(self._ends)

    def read(self, index: int) -> Record:
        start = int(self._ends[index - 1]) if index else 0
        row = json.loads(self._rows[start : int(self._ends[index])])
        where = f"{self.path}#image {row['image']['id']}"
        return Record(data={**row, "categories": dict(self._categories)}, where=where, fetch=self._fetch)


def _coco_tables(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as e:
        raise ValueError(f"{path}: not valid JSON ({_brief(e)}); a COCO file is one JSON object") from e
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path}: no list '{key}' at the top level; is this a COCO file?")
    for key in ("images", "categories"):
        if any(not isinstance(row, dict) or "id" not in row for row in content[key]):
            raise ValueError(f"{path}: an entry of '{key}' has no 'id'; COCO needs one")
    return content


# ------------------------------------------------------------------------------------- parts and combinations


class SelectedSource:
    """Records `start` to `end` of another source, or that many of them in shuffled order.

    Args:
        source: where they come from.
        start: first record.
        end: one past the last; beyond the source's end means its end.
        shuffle_seed: the source is shuffled with this before the cut.
    """

    def __init__(self, source: Source, start: int, end: int, shuffle_seed: int | None = None):
        self._source, self._start = source, start
        self._length = min(end, len(source)) - start
        self._key = None if shuffle_seed is None else stable_hash("select", shuffle_seed)
        if self._length < 1:
            raise ValueError(f"records {start} to {end} were asked for, there are {len(source)}")

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> Record:
        place = self._start + index
        return self._source.read(place if self._key is None else permute(place, len(self._source), self._key))


class ConcatSource:
    """Several sources, one after the other."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = tuple(sources)
        self._ends = list(accumulate(len(s) for s in self._sources))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> Record:
        which = bisect_right(self._ends, index)
        return self._sources[which].read(index - (self._ends[which - 1] if which else 0))


# ------------------------------------------------------------------------------------------------------ files


class _Files:
    """Open files, read without a file position: a forked worker may use its parent's; a new process opens its own."""

    LIMIT = 64

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": {}}

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, path: Path, offset: int, size: int) -> bytes:
        if path not in self._open:
            if len(self._open) >= self.LIMIT:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[path] = os.open(path, os.O_RDONLY)
        content = os.pread(self._open[path], size, offset)
        if len(content) < size:
            raise SkipSample(
                "truncated",
                f"{path}: ends before byte {offset + size}; the file changed or is cut short",
                str(path),
            )
        return content


@dataclass(frozen=True, slots=True)
class _FileFetch:
    root: Path

    def __call__(self, name: str) -> bytes:
        # Published rows write paths from "/" that mean "below the data directory".
        return (self.root / name.lstrip("/")).read_bytes()


def cached_index(path: Path, build: Callable[[Path], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The index of a file, from `FILE.index.npz` if that was made of the same size and modification time."""
    stamp = np.array([path.stat().st_size, path.stat().st_mtime_ns], np.int64)
    cache = path.with_name(path.name + ".index.npz")
    try:
        with np.load(cache, allow_pickle=False) as saved:
            index = {name: saved[name] for name in saved.files}
        if np.array_equal(index.pop("stamp", None), stamp):
            return index
    except (OSError, ValueError, EOFError, KeyError, zlib.error, zipfile.BadZipFile):
        pass  # absent or broken: built again below
    index = build(path)
    part = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    try:
        with part.open("wb") as file:
            np.savez(file, stamp=stamp, **index)  # type: ignore[arg-type]
        part.replace(cache)  # several ranks may do this at once; each writes the same bytes
    except OSError as e:
        logger.info("%s: index is kept in memory only (%s)", path, _brief(e))
        part.unlink(missing_ok=True)
    return index


def _existing(path: str | Path, key: str) -> Path:
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; check '{key}' in dataset_info")
    return Path(path)


def _require_records(count: int, path: str | Path) -> None:
    if not count:
        raise ValueError(f"{path}: the data set is empty; remove it from dataset_names or give it records")


def _brief(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"  # its own text says "line 1", whatever line of the file it is
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
