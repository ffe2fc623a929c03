"""WebDataset shards: consecutive members `KEY.EXT` of an uncompressed tar make one record.

The index has one number per record, where its first header begins; a record's bytes are read in one piece and its members found
in them. A damaged place makes one record of its own that is rejected, and reading goes on at the next header.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.sources.building import Arrays, Tick
from data.sources.indexed import IndexedSource
from data.sources.record import Record, SkipSample, brief, parse_json
from data.sources.storage import FileStamp, expand, open_ranges

BLOCK = 512
ZEROS = bytes(BLOCK)
MAX_RECORD_BYTES = 1 << 30
MAX_NAME_BYTES = 1 << 16
"""Of a name or an attribute block that stands in a member of its own."""

SEARCH_BYTES = 1 << 20

Read = Callable[[int, int], bytes]
"""`(offset, size)`; less only at the end."""


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a tar.

    Attributes:
        name: its path; "" = a damaged place.
        start: where its first header begins.
        offset, size: its bytes.
        fault: why it cannot be used; "" = it can.
        unsafe: the fault is one of intent: it would reach outside of the archive.
    """

    name: str
    start: int
    offset: int
    size: int
    fault: str = ""
    unsafe: bool = False

    @property
    def key(self) -> str:
        folder, slash, name = self.name.rpartition("/")
        return folder + slash + name.partition(".")[0]

    @property
    def extension(self) -> str:
        return self.name.rpartition("/")[2].partition(".")[2].lower()


def members(read: Read, start: int, end: int) -> Iterator[Member]:
    """The members whose headers lie from `start` to before `end`, and the damaged places between them; no folders."""
    at = start
    while at < end:
        try:
            member, after = _member(read, at, end)
        except ValueError as e:
            after = _next_header(read, at + BLOCK, end)
            yield Member("", at, at, after - at, str(e))
            at = after
            continue
        if after == at:  # the end of an archive; another one may have been put behind it
            at = _next_header(read, at + BLOCK, end)
            continue
        if member is not None:
            yield member
        at = after


def _member(read: Read, start: int, end: int) -> tuple[Member | None, int]:
    """The member at a place (None: a folder) and where the next one begins: at the same place if the archive ends here."""
    if read(start, BLOCK) == ZEROS:
        return None, start
    at, name, size = _announced(read, start)
    kind, own_name, own_size = _header(read(at, BLOCK))
    content = at + BLOCK
    name = own_name if name is None else name
    if kind == b"5" or (kind == b"\0" and name.endswith("/")):
        return None, content
    if kind in (b"1", b"2", b"3", b"4", b"6"):
        what = "a link" if kind in (b"1", b"2") else "a device"
        return Member(name, start, content, 0, f"{what}, which is not followed", unsafe=True), content
    size = own_size if size is None else size
    if content + size > end:
        raise ValueError(f"{name!r} needs bytes up to {content + size:,}, the file ends at {end:,}")
    fault = "" if kind in (b"0", b"\0", b"7") else f"a member of type {kind!r}"
    unsafe = name.startswith("/") or ".." in name.split("/")
    if unsafe:
        fault = "a path that leads out of the archive"
    return Member(name, start, content, size, fault, unsafe), content + _padded(size)


def _announced(read: Read, at: int) -> tuple[int, str | None, int | None]:
    """Where a member's own header is, and the name and size that headers before it give it."""
    name, size = None, None
    while True:
        kind, _, length = _header(read(at, BLOCK))
        if kind not in (b"L", b"K", b"x", b"g"):
            return at, name, size
        if length > MAX_NAME_BYTES:
            raise ValueError(f"a header at byte {at:,} claims {length:,} bytes of attributes")
        body = read(at + BLOCK, length)
        if len(body) < length:
            raise ValueError(f"the file ends within a header at byte {at:,}")
        if kind == b"L":
            name = _text(body.split(b"\0")[0])
        elif kind == b"x":
            attributes = _attributes(body, at)
            name = attributes.get("path", name)
            size = int(attributes["size"]) if "size" in attributes else size
        at += BLOCK + _padded(length)


def _header(block: bytes) -> tuple[bytes, str, int]:
    """Type, name and size."""
    if len(block) < BLOCK:
        raise ValueError("the file ends within a header")
    try:
        stated = int(block[148:156].split(b"\0")[0].strip(b" "), 8)
    except ValueError:
        raise ValueError("no tar header") from None
    if stated != sum(block) - sum(block[148:156]) + 8 * 32:
        raise ValueError("a header whose checksum does not match")
    name = block[:100].split(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345] and block[156:157] not in (b"L", b"K"):
        name = block[345:500].split(b"\0")[0] + b"/" + name
    field = block[124:136]
    if field[0] & 0x80:  # beyond what 11 octal digits can say
        size = int.from_bytes(field, "big") & ((1 << 95) - 1)
    else:
        try:
            size = int(field.split(b"\0")[0].strip(b" ") or b"0", 8)
        except ValueError:
            raise ValueError(f"a header with the size {field!r}") from None
    return block[156:157], _text(name), size


def _attributes(body: bytes, at: int) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE\\n` of a pax header."""
    found: dict[str, str] = {}
    place = 0
    while place < len(body) and body[place]:
        length, _, _ = body[place : place + 20].partition(b" ")
        if not length.isdigit() or not 5 <= int(length) <= len(body) - place:
            raise ValueError(f"a broken pax header at byte {at}")
        entry = body[place + len(length) + 1 : place + int(length) - 1]
        key, _, value = entry.partition(b"=")
        found[_text(key)] = _text(value)
        place += int(length)
    if not found.get("size", "0").isdigit():
        raise ValueError(f"a pax header with the size {found['size']!r} at byte {at}")
    return found


def _next_header(read: Read, start: int, end: int) -> int:
    """Where the next block lies that is a header, or `end`."""
    for base in range(start, end, SEARCH_BYTES):
        content = read(base, SEARCH_BYTES)
        blocks = np.frombuffer(content, np.uint8, len(content) // BLOCK * BLOCK).reshape(-1, BLOCK)
        for number in np.flatnonzero((blocks[:, 257:262] == np.frombuffer(b"ustar", np.uint8)).all(1)):
            try:
                _header(blocks[number].tobytes())
            except ValueError:
                continue
            return base + int(number) * BLOCK
    return end


def _text(name: bytes) -> str:
    # Messages with it are written to files: what is not UTF-8 must be printable all the same.
    return name.decode("utf-8", "backslashreplace")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def index_members(path: str, tick: Tick) -> Arrays:
    """`start`: where each record's first header begins. `end`: where the last record ends."""
    starts: list[int] = []
    key, end, sound = "", 0, 0
    with open_ranges(path) as (read, size):
        for member in members(read, 0, size):
            if not member.name or member.key != key or not starts:
                starts.append(member.start)
                key = member.key if member.name else ""
            sound += bool(member.name)
            end = member.offset + _padded(member.size)
            tick(end)
    if size and not sound and starts:
        raise ValueError(f"{path}: not a readable, uncompressed tar; write the shard again")
    return {
        "start": np.array(starts, np.int64),
        "end": np.array([min(end, size)]),
        "count": np.array([len(starts)]),
    }


class TarSource(IndexedSource):
    """WebDataset shards.

    JSON members are parsed, text members decoded; others are there for `open_image` and `fetch`.

    Args:
        path: one shard, a `{000000..000009}` range, or a glob pattern; or URLs of that form.
        cache_dir: where the index is kept.

    Raises:
        ValueError: if no shard is found, or a shard is not a plain tar.
    """

    def __init__(self, path: str | Path, cache_dir: str | Path | None = None):
        super().__init__(index_members, expand(path, "tar_path"), str(path), cache_dir)

    def read_in(self, file: FileStamp, arrays: Arrays, row: int) -> Record:
        start = int(arrays["start"][row])
        end = int(arrays["start"][row + 1] if row + 1 < len(arrays["start"]) else arrays["end"][0])
        if end - start > MAX_RECORD_BYTES:
            where = f"{file.path}#byte {start}"
            raise SkipSample("too_large", f"{where}: a record of {end - start:,} bytes", where)
        span = self.files.read(file, start, end - start)
        found = list(members(lambda at, size: span[at - start : at - start + size], start, end))
        key = next((m.key for m in found if m.name), "")
        where = f"{file.path}#{key}" if key else f"{file.path}#byte {start}"
        for member in found:
            if member.fault:
                where = f"{file.path}#{member.name}" if member.name else where
                reason = "unsafe_member" if member.unsafe else "bad_tar"
                raise SkipSample(reason, f"{where}: {member.fault}; write the shard again", where)
        parts: dict[str, bytes] = {}
        for member in found:
            if member.extension in parts:
                message = f"{where}: two members .{member.extension}, {member.name!r} is the second; write the shard again"
                raise SkipSample("bad_tar", message, where)
            parts[member.extension] = span[member.offset - start : member.offset - start + member.size]
        data: dict[str, Any] = {"__key__": key}
        for ext in parts.keys() & _DECODERS.keys():
            try:
                data[ext] = _DECODERS[ext](parts[ext])
            except ValueError as e:
                message = f"{where}.{ext}: not valid {ext} ({brief(e)}); write the shard again"
                raise SkipSample("bad_json", message, where) from e
        return Record(data=data, where=where, fetch=_MemberFetch(parts))


_DECODERS: Mapping[str, Callable[[bytes], Any]] = {
    "json": parse_json,
    "txt": bytes.decode,
    "caption": bytes.decode,
    "cls": int,
}


@dataclass(frozen=True, slots=True)
class _MemberFetch:
    parts: Mapping[str, bytes]

    def __call__(self, name: str) -> bytes:
        if name not in self.parts:
            raise KeyError(f"members are {', '.join(sorted(self.parts))}")
        return self.parts[name]
