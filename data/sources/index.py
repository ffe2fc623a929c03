"""Where every record of a data set lies: found once by reading its files, kept in a file, mapped into memory by all processes.

An index is a few integer arrays per file, made by the format's builder. Those of all files of a data set stand in one file,
`NAME.index.safetensors`: beside the data, or in `--index_cache_dir` (`WEFT_INDEX_CACHE_DIR`); where nothing may be written beside
the data, in the user's cache directory. Workers map it and share its memory. A file whose size, modification time or first bytes
changed is read again, the others are not. Ranks that start together wait for the one that builds.
"""

import fcntl
import hashlib
import json
import logging
import math
import mmap
import os
import posixpath
import time
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from data.sources.building import Arrays, Builder, build_file, build_in_processes, builder_name
from data.sources.record import SourceLost, brief
from data.sources.storage import (
    INDEX_SUFFIX,
    START_RETRY_AFTER_S,
    FileStamp,
    asked_again,
    is_remote,
    may_pass,
    take_stamp,
)

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "WEFT_INDEX_CACHE_DIR"
VERSION = 2
SMALL_BYTES = 1 << 26
"""Files that together are smaller than this are indexed in this process."""

DTYPES: Mapping[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "U8": np.dtype("u1")}
"""Of the arrays, under safetensors' names."""


class Index:
    """Where records lie, by number.

    Args:
        kind: name of the builder.
        stamps: the files, as they were when they were indexed.
        parts: the arrays of each; `count` says how many records the file has.
        place: file that the arrays are mapped from; "" = they are in memory only.
        digest: of that file's header.
    """

    def __init__(
        self,
        kind: str,
        stamps: Sequence[FileStamp],
        parts: Sequence[Arrays],
        place: str = "",
        digest: str = "",
    ):
        self.kind, self.stamps, self.parts = kind, tuple(stamps), tuple(parts)
        self.place, self.digest = place, digest
        self.ends = list(accumulate(int(part["count"][0]) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def locate(self, index: int) -> tuple[FileStamp, Arrays, int]:
        """The file of a record, that file's arrays and the record's number in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        which = bisect_right(self.ends, index)
        return self.stamps[which], self.parts[which], index - (self.ends[which - 1] if which else 0)

    def __getstate__(self) -> dict[str, Any]:
        if self.place:
            return {"place": self.place, "digest": self.digest}
        return {"kind": self.kind, "stamps": self.stamps, "parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "place" not in state:
            self.__init__(**state)  # type: ignore[misc]
            return
        try:
            index = _load(Path(state["place"]))
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise SourceLost(f"{state['place']}: the index cannot be read any more ({brief(e)})") from e
        if index.digest != state["digest"]:
            raise SourceLost(
                f"{state['place']}: another process has indexed the data anew: it changed while the run was going on; "
                "start the run again"
            )
        self.__dict__.update(index.__dict__)


def open_index(build: Builder, files: Sequence[str], cache_dir: str | Path | None = None) -> Index:
    """The index of a data set: from its cache where that is fresh, otherwise built and kept.

    Args:
        build: of the format; a function at the top of a module.
        files: absolute paths or URLs.
        cache_dir: where indexes are kept (default: `WEFT_INDEX_CACHE_DIR`, then beside the data, then the user's cache).

    Raises:
        ValueError: if a file cannot be read or is not what it should be, or the directory cannot be written.
    """
    kind, stamps = builder_name(build), _take_stamps(files)
    places = _places(stamps, cache_dir)
    for place in places:
        index = _fresh(place, kind, stamps)
        if index is not None:
            return index
    for place in places:
        if not _is_writable(place.parent):
            continue
        with _only_one(place.parent):
            index = _fresh(place, kind, stamps)  # another rank may have built it meanwhile
            if index is None:
                parts = _build(build, stamps, _reusable(place, kind))
                _save(place, kind, stamps, parts)
                index = _load(place)
        return index
    if cache_dir or os.environ.get(CACHE_VARIABLE):
        raise ValueError(f"{places[0].parent}: cannot write here; choose another --index_cache_dir")
    logger.warning(
        "%s: nowhere to keep the index; every process has its own (set %s)", files[0], CACHE_VARIABLE
    )
    return Index(kind, stamps, _build(build, stamps, {}))


def _take_stamps(files: Sequence[str]) -> list[FileStamp]:
    def stamp(path: str) -> FileStamp:
        pauses = START_RETRY_AFTER_S if is_remote(path) else ()
        try:
            return asked_again(lambda: take_stamp(path), path, pauses, may_pass)
        except SourceLost:
            raise
        except Exception as e:  # noqa: BLE001 - every remote file system raises its own errors
            raise ValueError(f"{path}: cannot be read ({brief(e)})") from e

    with ThreadPoolExecutor(min(16, len(files))) as pool:
        return list(pool.map(stamp, files))


# ---------------------------------------------------------------------------------------------------------- places


def _places(stamps: Sequence[FileStamp], cache_dir: str | Path | None) -> list[Path]:
    """Where the index may be kept, the best place first."""
    names = "\n".join(s.path for s in stamps)
    mark = hashlib.blake2b(names.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    name = posixpath.basename(stamps[0].path)
    if len(stamps) > 1:
        name = f"{name}.and_{len(stamps) - 1}_more.{mark}"
    given = cache_dir or os.environ.get(CACHE_VARIABLE)
    if given:
        return [Path(given).absolute() / f"{name}.{mark}{INDEX_SUFFIX}"]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    places = [home / "weft" / f"{name}.{mark}{INDEX_SUFFIX}"]
    if not is_remote(stamps[0].path):
        places.insert(0, Path(stamps[0].path).parent / f"{name}{INDEX_SUFFIX}")
    return places


def _is_writable(folder: Path) -> bool:
    probe = folder / f".index.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as e:
        logger.info("%s: no index is kept here (%s)", folder, brief(e))
        return False
    return True


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Held by one process at a time, where the file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: waiting for the process that builds an index here", folder)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            pass  # no locks here: several ranks may build the same index; each writes the same bytes
        yield
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------- one file of arrays


def _save(place: Path, kind: str, stamps: Sequence[FileStamp], parts: Sequence[Arrays]) -> None:
    """Write the arrays in the safetensors layout, 8-byte ones first."""
    named = [(f"{i}.{name}", array) for i, part in enumerate(parts) for name, array in part.items()]
    named.sort(key=lambda item: -item[1].dtype.itemsize)
    code = {dtype: name for name, dtype in DTYPES.items()}
    about = {
        "version": VERSION,
        "kind": kind,
        "files": [asdict(s) for s in stamps],
        "crc32": _checksum(named),
    }
    header: dict[str, Any] = {"__metadata__": {"index": json.dumps(about)}}
    end = 0
    for name, array in named:
        start, end = end, end + array.nbytes
        header[name] = {"dtype": code[array.dtype], "shape": [len(array)], "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    part_file = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    try:
        with part_file.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for _, array in named:
                array.tofile(file)
        part_file.replace(place)
    except OSError as e:
        part_file.unlink(missing_ok=True)
        raise ValueError(f"{place}: the index cannot be written ({brief(e)}); set {CACHE_VARIABLE}") from e


def _load(place: Path, whole: bool = False) -> Index:
    """Map an index.

    Args:
        place: its file.
        whole: read all of it and hold it against its checksum; else it is only mapped.

    Raises:
        OSError, ValueError, KeyError, TypeError: if it is absent, broken or of another version.
    """
    with place.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError("not an index")
        encoded = file.read(length)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header = json.loads(encoded)
    about = json.loads(header.pop("__metadata__")["index"])
    if about["version"] != VERSION:
        raise ValueError(f"an index of version {about['version']}")
    stamps = [FileStamp(**stamp) for stamp in about["files"]]
    parts: list[dict[str, np.ndarray]] = [{} for _ in stamps]
    named: list[tuple[str, np.ndarray]] = []
    for name, entry in header.items():
        number, _, field = name.partition(".")
        dtype = DTYPES[entry["dtype"]]
        start, end = entry["data_offsets"]
        if not 0 <= start <= end <= size - 8 - length:
            raise ValueError("cut short")
        count = math.prod(entry["shape"])
        array = np.frombuffer(mapped, dtype, count, 8 + length + start)
        parts[int(number)][field] = array
        named.append((name, array))
    if whole and _checksum(named) != about["crc32"]:
        raise ValueError("its checksum does not match")
    digest = hashlib.blake2b(encoded, digest_size=16).hexdigest()
    return Index(about["kind"], stamps, parts, str(place), digest)


def _checksum(named: Iterable[tuple[str, np.ndarray]]) -> int:
    crc = 0
    for name, array in named:
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
    return crc


def _existing(place: Path, kind: str) -> Index | None:
    try:
        index = _load(place, whole=True)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as e:
        logger.info("%s: the index is made anew (%s)", place, brief(e))
        return None
    return index if index.kind == kind else None


def _fresh(place: Path, kind: str, stamps: Sequence[FileStamp]) -> Index | None:
    index = _existing(place, kind)
    return index if index is not None and list(index.stamps) == list(stamps) else None


def _reusable(place: Path, kind: str) -> dict[FileStamp, Arrays]:
    index = _existing(place, kind)
    return {} if index is None else dict(zip(index.stamps, index.parts, strict=True))


# -------------------------------------------------------------------------------------------------------- building


def _build(build: Builder, stamps: Sequence[FileStamp], known: Mapping[FileStamp, Arrays]) -> list[Arrays]:
    todo = [s for s in stamps if s not in known]
    total = sum(s.size for s in todo)
    progress = _Progress(todo, total)
    if total < SMALL_BYTES:
        built = [build_file(build, s.path, partial(progress, s.path)) for s in todo]
    else:
        built = build_in_processes(build, [s.path for s in todo], progress)
    logger.info("%s: %s", progress.what, progress.text())
    by_path = {s.path: part for s, part in zip(todo, built, strict=True)}
    return [known[s] if s in known else by_path[s.path] for s in stamps]


class _Progress:
    """A line now and then: how much of the files has been read."""

    EVERY_S = 5.0

    def __init__(self, files: Sequence[FileStamp], total: int):
        self._done = {file.path: 0 for file in files}
        self._total = total
        self._started = self._said = time.monotonic()
        self.what = f"index of {files[0].path}" + (f" and {len(files) - 1} more" if len(files) > 1 else "")

    def __call__(self, path: str, done: int) -> None:
        self._done[path] = done
        now = time.monotonic()
        if now - self._said >= self.EVERY_S:
            self._said = now
            logger.info("%s: %s", self.what, self.text())

    def text(self) -> str:
        done, seconds = sum(self._done.values()), time.monotonic() - self._started
        return f"{done / 2**20:,.0f} of {self._total / 2**20:,.0f} MiB in {seconds:.1f} s"
