"""Bytes of files, on a disk or behind a URL that fsspec knows (`s3://...`): ranges, streams, names.

A source's own file that cannot be read is tried again with growing pauses and is `SourceLost` after about a minute; a picture
that a row names and that is not there is the row's fault and is not waited for.
"""

import errno
import glob
import hashlib
import io
import logging
import os
import posixpath
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from data.doing import at_file
from data.sources.record import SkipSample, SourceLost, brief
from modeling.optional import require

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

RETRY_AFTER_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Pauses before a source's file is tried again."""

START_RETRY_AFTER_S = RETRY_AFTER_S[:4]
"""The same before a run, where somebody waits: stores refuse some requests when a thousand ranks start at once."""

MAX_FILE_BYTES = 1 << 28
"""A picture's file is not larger than this."""

INDEX_SUFFIX = ".index.safetensors"
"""Of the files that lie beside data sets and are none."""

HEAD_BYTES = 1 << 16
"""What the hash of a file's head covers."""

PASSING = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EAGAIN, errno.EMFILE, errno.ENFILE,
}  # fmt: skip
"""Errors of a disk, a network or the machine, not of one name."""

REMOTE_VERSION_KEYS = (
    "mtime", "ETag", "etag", "LastModified", "last_modified", "updated", "created", "md5Hash", "content_md5",
)  # fmt: skip
"""Where fsspec's file systems say which version of a file it is."""


@dataclass(frozen=True, slots=True)
class FileStamp:
    """Which version of a file was indexed.

    Attributes:
        path: absolute path, or URL.
        size: bytes (of a folder: files).
        modified: modification time, or what a remote store has instead.
        head: hash of the first `HEAD_BYTES` (of a folder: of the listing).
    """

    path: str
    size: int
    modified: str
    head: str


def is_remote(path: str | Path) -> bool:
    """Whether a path is a URL."""
    return "://" in str(path)


def take_stamp(path: str) -> FileStamp:
    """The stamp of a file or a local folder as it is now.

    Raises:
        OSError: if it cannot be read.
    """
    if is_remote(path):
        size, version = _remote_version(path)
        return FileStamp(path, size, version, _hash(_remote_range(path, 0, HEAD_BYTES)))
    if os.path.isdir(path):
        files = sorted(
            (e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in os.scandir(path) if e.is_file()
        )
        return FileStamp(path, len(files), "", _hash(repr(files).encode()))
    with open(path, "rb", buffering=0) as file:
        about = os.fstat(file.fileno())
        return FileStamp(path, about.st_size, str(about.st_mtime_ns), _hash(file.read(HEAD_BYTES)))


def expand(pattern: str | Path, key: str, suffix: str = "") -> list[str]:
    """The files that a location names: one, a `{000..009}` range, a glob pattern, or the `suffix` files of a folder.

    Args:
        pattern: path or URL.
        key: where it stands, for the message.
        suffix: of the files that count where the pattern is a folder; "" = a folder is refused.

    Raises:
        ValueError: if there is no such file.
    """
    pattern = str(pattern)
    if brace := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        low, high = brace.groups()
        if int(high) < int(low):
            raise ValueError(f"{pattern}: the range ends before it begins; check '{key}' in dataset_info")
        names = (
            f"{pattern[: brace.start()]}{n:0{len(low)}d}{pattern[brace.end() :]}"
            for n in range(int(low), int(high) + 1)
        )
        return [_existing(name, key) for name in names]
    if suffix and _is_folder(pattern, key):
        pattern = posixpath.join(pattern if is_remote(pattern) else glob.escape(pattern), f"*{suffix}")
    if not glob.has_magic(pattern):
        return [_existing(pattern, key)]
    if is_remote(pattern):
        fs, inner = _remote(pattern)
        names = _at_start(lambda: fs.glob(inner), pattern, key)
        found = sorted(fs.unstrip_protocol(name) for name in names)
    else:
        found = sorted(os.path.abspath(name) for name in glob.glob(pattern))
    found = [name for name in found if not name.endswith(INDEX_SUFFIX)]
    if not found:
        raise ValueError(f"{pattern}: no such file; check '{key}' in dataset_info")
    return found


def _existing(path: str, key: str) -> str:
    if not _is_file(path, key):
        raise ValueError(f"{path}: no such file; check '{key}' in dataset_info")
    return path if is_remote(path) else os.path.abspath(path)


def _is_file(path: str, key: str) -> bool:
    if not is_remote(path):
        return os.path.isfile(path)
    fs, inner = _remote(path)
    try:
        # Not `isfile`: where a store answers with an error, that says that there is no file.
        return _at_start(lambda: fs.info(inner), path, key)["type"] == "file"
    except FileNotFoundError:
        return False


def _is_folder(path: str, key: str) -> bool:
    if not is_remote(path):
        return os.path.isdir(path)
    fs, inner = _remote(path)
    return _at_start(lambda: fs.isdir(inner), path, key)


def _at_start(read: Callable[[], Result], path: str, key: str) -> Result:
    """What a store says before a run.

    Raises:
        FileNotFoundError: if it has nothing of this name.
        ValueError: if it goes on answering with errors.
    """
    try:
        return asked_again(read, path, START_RETRY_AFTER_S, may_pass)
    except Exception as e:
        if is_absent(e):
            raise
        why = brief(e.__cause__ if isinstance(e, FileNotFoundError) and e.__cause__ else e)
        raise ValueError(f"{path}: cannot be reached ({why}); check '{key}' in dataset_info") from e


def _remote(url: str) -> tuple[Any, str]:
    core = require("fsspec.core", package="fsspec", extra="remote", why=f"{url.split('://')[0]}:// data")
    try:
        fs, inner = core.url_to_fs(url)
    except (ImportError, ValueError) as e:
        raise ValueError(f"{url}: fsspec cannot open it ({brief(e)})") from e
    return fs, inner


def _remote_version(url: str) -> tuple[int, str]:
    """Size, and what the store has for a modification time."""
    fs, inner = _remote(url)
    info = fs.info(inner)
    return int(info["size"]), str({key: str(info[key]) for key in REMOTE_VERSION_KEYS if key in info})


def _remote_range(url: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` on, less at the end.

    Raises:
        SourceLost: if more came: some HTTP servers and proxies send the whole file, from its beginning, whatever is asked for.
    """
    fs, inner = _remote(url)
    content = fs.cat_file(inner, start=offset, end=offset + size)
    if len(content) > size:
        raise SourceLost(
            f"{url}: {len(content):,} bytes came where {size:,} were asked for: the server does not know ranges; serve the data "
            "by one that does (it answers 206), or copy them to a disk"
        )
    return content


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


# -------------------------------------------------------------------------------------------- a source's own files


@contextmanager
def open_ranges(path: str) -> Iterator[tuple[Callable[[int, int], bytes], int]]:
    """`read(offset, size)` of a file while it is indexed, front to back, less only at its end; and the file's size."""
    with open_stream(path) as file:

        def read(offset: int, size: int) -> bytes:
            file.seek(offset)
            return file.read(size)

        size = file.seek(0, os.SEEK_END)
        yield read, size


def open_stream(path: str) -> IO[bytes]:
    """A file to read from front to back."""
    if is_remote(path):
        fs, inner = _remote(path)
        return fs.open(inner, "rb", block_size=1 << 22)
    return open(path, "rb", buffering=1 << 13)


class Files:
    """Ranges of indexed files, without a file position: what is open is used by forked processes, others open their own."""

    LIMIT = 64

    def __init__(self) -> None:
        self._open: dict[str, int] = {}
        self._unchanged: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": {}, "_unchanged": set()}

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, file: FileStamp, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on, which the file had when it was indexed.

        Raises:
            SourceLost: if it cannot be read, or is not the one that was indexed.
        """
        content = patiently(lambda: self._once(file, offset, size), file.path)
        if len(content) < size:
            raise SourceLost(
                f"{file.path}: ends before byte {offset + size:,}, it had {file.size:,} when it was indexed; restore it, or "
                "start the run again to index it anew"
            )
        return content

    def _once(self, file: FileStamp, offset: int, size: int) -> bytes:
        if is_remote(file.path):
            if file.path not in self._unchanged:
                _require_unchanged(file, *_remote_version(file.path), partial(_remote_range, file.path))
                self._unchanged.add(file.path)
            return _remote_range(file.path, offset, size)
        if file.path not in self._open:
            if len(self._open) >= self.LIMIT:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[file.path] = _open_unchanged(file)
        try:
            content = os.pread(self._open[file.path], size, offset)
            while 0 < len(content) < size:  # one call gives 2 GiB at most
                more = os.pread(self._open[file.path], size - len(content), offset + len(content))
                if not more:
                    break
                content += more
            return content
        except OSError:
            os.close(self._open.pop(file.path))  # a stale handle stays stale
            raise


def _open_unchanged(file: FileStamp) -> int:
    descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
    about = os.fstat(descriptor)
    try:
        _require_unchanged(
            file,
            about.st_size,
            str(about.st_mtime_ns),
            lambda offset, size: os.pread(descriptor, size, offset),
        )
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _require_unchanged(file: FileStamp, size: int, modified: str, read: Callable[[int, int], bytes]) -> None:
    """Raise `SourceLost` if a file is not the one that was indexed; one of the same size and head with another date is."""
    if (size, modified) == (file.size, file.modified):
        return
    if size != file.size or _hash(read(0, HEAD_BYTES)) != file.head:
        raise SourceLost(
            f"{file.path}: changed since it was indexed ({file.size:,} bytes then, {size:,} now); "
            "restore it, or start the run again to index it anew"
        )


def patiently(read: Callable[[], Result], what: str) -> Result:
    """What `read` returns, tried again after each of `RETRY_AFTER_S` while it fails.

    Raises:
        SourceLost: if it still fails.
    """
    try:
        return asked_again(read, what, RETRY_AFTER_S, lambda error: True)
    except (SourceLost, SkipSample):
        raise
    except Exception as e:  # noqa: BLE001 - every remote file system raises its own errors
        tries, waited = len(RETRY_AFTER_S) + 1, sum(RETRY_AFTER_S)
        raise SourceLost(
            f"{what}: cannot be read any more, {tries} times within {waited:g} s ({brief(e)}); "
            "restore it and start the run again with --auto_resume True"
        ) from e


def asked_again(
    read: Callable[[], Result],
    what: str,
    pauses_s: Sequence[float],
    may_pass: Callable[[Exception], bool],
) -> Result:
    """What `read` returns, tried again after each of the pauses while it fails with something that may pass; then its error."""
    for pause in (*pauses_s, None):
        at_file(what)
        try:
            return read()
        except (SourceLost, SkipSample):
            raise
        except Exception as e:  # noqa: BLE001 - every remote file system raises its own errors
            if pause is None or not may_pass(e):
                raise
            logger.warning("%s: cannot be read (%s), trying again in %g s", what, brief(e), pause)
            time.sleep(pause)
    raise AssertionError("the last pause is None")


def may_pass(error: Exception) -> bool:
    """Whether a store's error is none of the name that was asked for, and not our own."""
    return not is_absent(error) and (
        isinstance(error, FileNotFoundError) or not isinstance(error, (ValueError, ImportError))
    )


def is_absent(error: BaseException) -> bool:
    """Whether a store says that it has nothing of the name; fsspec's HTTP says so of servers that fail or do not answer, too."""
    if not isinstance(error, FileNotFoundError):
        return False
    cause = error.__cause__
    failed = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
    return not failed and getattr(cause, "status", 404) in (404, 410)


# ------------------------------------------------------------------------------------------- files that rows name


@dataclass(frozen=True, slots=True)
class FolderFetch:
    """Files below a folder by the names that rows give them.

    A leading "/" means the folder itself, as in published rows. A name that leaves the folder is refused; links that the folder
    holds are its owner's business and are followed.
    """

    root: str

    def __call__(self, name: str) -> bytes:
        return self._reached(name, _read_whole)

    def list_folder(self, name: str) -> list[str]:
        """The files of a folder, by names that this fetches."""
        return sorted(posixpath.join(name, file) for file in self._reached(name, _file_names))

    def _reached(self, name: str, read: Callable[[str], Result]) -> Result:
        path = posixpath.join(self.root, self._inner(name))
        at_file(path)
        try:
            return read(path)
        except Exception as e:  # noqa: BLE001 - every remote file system raises its own errors
            if not self._is_away(e):
                raise
        return patiently(lambda: read(path), path)

    def _inner(self, name: str) -> str:
        if not isinstance(name, str):
            raise TypeError(f"a path is a text, not {type(name).__name__}")
        inner = posixpath.normpath(name.lstrip("/"))
        if inner == ".." or inner.startswith("../"):
            message = f"{name!r} leads out of {self.root}; paths are relative to 'data_dir' and stay below it"
            raise SkipSample("unsafe_path", message)
        return inner

    def _is_away(self, error: Exception) -> bool:
        """Whether it is not this one name that fails but the disk, the folder or the network."""
        if is_remote(self.root):
            return not isinstance(error, SkipSample) and may_pass(error)
        if isinstance(error, FileNotFoundError):
            return not os.path.isdir(self.root)
        return isinstance(error, OSError) and error.errno in PASSING


def _file_names(folder: str) -> list[str]:
    if is_remote(folder):
        fs, inner = _remote(folder)
        return [posixpath.basename(e["name"]) for e in fs.ls(inner, detail=True) if e["type"] == "file"]
    return [entry.name for entry in os.scandir(folder) if entry.is_file()]


def _read_whole(path: str) -> bytes:
    if is_remote(path):
        fs, inner = _remote(path)
        _require_small(path, fs.size(inner) or 0)
        return fs.cat_file(inner)
    # A name may stand for a pipe, whose opening and reading would wait for ever, or for a device without end.
    with io.FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("not a regular file")
        _require_small(path, about.st_size)
        return file.readall()


def _require_small(path: str, size: int) -> None:
    if size > MAX_FILE_BYTES:
        message = f"{path} has {size:,} bytes, the limit is {MAX_FILE_BYTES:,}; make it smaller or remove the record"
        raise SkipSample("too_large", message)
