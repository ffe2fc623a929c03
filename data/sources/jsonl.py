"""JSON lines: one record per line, which may name pictures below a folder."""

import posixpath
from pathlib import Path

import numpy as np

from data.sources.building import Arrays, Tick
from data.sources.indexed import IndexedSource
from data.sources.record import Record, SkipSample, brief, parse_json
from data.sources.storage import FileStamp, FolderFetch, expand, is_remote, open_stream

CHUNK_BYTES = 1 << 24
MAX_LINE_BYTES = 1 << 26
"""A longer line is no row."""

BLANK = b"\t\n\x0b\x0c\r "


def index_lines(path: str, tick: Tick) -> Arrays:
    """`start`: where each record begins. `end`: where the last one does. `blank`: per blank line, the records before it."""
    starts, suspects = [], []
    base, at_start = 0, True
    buffer = bytearray(CHUNK_BYTES)
    with open_stream(path) as file:
        while size := file.readinto(buffer):  # type: ignore[attr-defined]
            chunk = np.frombuffer(buffer, np.uint8, size)
            after = np.flatnonzero(chunk == 10) + 1
            begin = after[:-1] if after.size and after[-1] == size else after
            begin = np.concatenate([[0], begin]) if at_start else begin
            at_start = bool(chunk[-1] == 10)
            suspects.append(begin[np.isin(chunk[begin], np.frombuffer(BLANK, np.uint8))] + base)
            starts.append(begin + base)
            base += size
            del chunk  # the buffer is used again
            tick(base)
        start = np.concatenate([np.zeros(0, np.int64), *starts])
        lines = np.searchsorted(start, np.concatenate([np.zeros(0, np.int64), *suspects]))
        end = np.append(start[1:], base)
        blank = np.array([i for i in lines if _is_blank(file, int(start[i]), int(end[i]))], np.int64)
    return {
        "start": np.delete(start, blank),
        "end": np.array([base]),
        "blank": blank - np.arange(len(blank)),
        "count": np.array([len(start) - len(blank)]),
    }


def _is_blank(file, start: int, end: int) -> bool:
    file.seek(start)
    while start < end:
        part = file.read(min(end - start, 1 << 16))
        if part.strip():
            return False
        if not part:
            break
        start += len(part)
    return True


class JsonlSource(IndexedSource):
    """One record per line; blank lines are no records.

    Args:
        path: the file, a `{000..009}` range or a glob pattern; or URLs.
        data_dir: what image paths in the rows are relative to (default: the first file's directory).
        cache_dir: where the index is kept.

    Raises:
        ValueError: if the file is missing or has no line.
    """

    def __init__(
        self, path: str | Path, data_dir: str | Path | None = None, cache_dir: str | Path | None = None
    ):
        files = expand(path, "jsonl_path")
        super().__init__(index_lines, files, str(path), cache_dir)
        self._fetch = FolderFetch(folder_of(files[0], data_dir))

    def read_in(self, file: FileStamp, arrays: Arrays, row: int) -> Record:
        line = row + 1 + int(np.searchsorted(arrays["blank"], row, side="right"))
        where = f"{file.path}:{line}"
        start = int(arrays["start"][row])
        end = int(arrays["start"][row + 1] if row + 1 < len(arrays["start"]) else arrays["end"][0])
        if end - start > MAX_LINE_BYTES:
            message = f"{where}: {end - start:,} bytes, a row has at most {MAX_LINE_BYTES:,}; is this JSONL?"
            raise SkipSample("bad_json", message, where)
        content = self.files.read(file, start, end - start)
        try:
            data = parse_json(content.strip())
        except ValueError as e:  # also UnicodeDecodeError
            remedy = self._if_one_document(file) or "correct or remove the line"
            message = f"{where}: not valid JSON ({brief(e)}); {remedy}"
            raise SkipSample("bad_json", message, where) from e
        if not isinstance(data, dict):
            remedy = self._if_one_document(file) or "correct or remove the line"
            message = f"{where}: expected a JSON object, found {type(data).__name__}; {remedy}"
            raise SkipSample("bad_json", message, where)
        return Record(data=data, where=where, fetch=self._fetch)

    def _if_one_document(self, file: FileStamp) -> str:
        """What to do about a file that is one JSON list of rows, as LLaVA's are, and not JSONL."""
        head = self.files.read(file, 0, min(file.size, 1 << 12)).removeprefix(b"\xef\xbb\xbf").lstrip()
        if not head.startswith(b"["):
            return ""
        return (
            "the file is one JSON list: write a row per line, say with `jq -c '.[]' rows.json > rows.jsonl`"
        )


def folder_of(file: str, data_dir: str | Path | None) -> str:
    """What the paths in a file are relative to."""
    if data_dir is None:
        return posixpath.dirname(file)
    return str(data_dir) if is_remote(data_dir) else str(Path(data_dir).absolute())
