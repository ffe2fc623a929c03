"""Named tensors of all ranks <-> one directory, as torch's distributed checkpoint plans it: it fits any world size and strategy.

Torch's planners say which rank writes which piece, each piece once, and which pieces a rank needs; the files are ours.
`RANK.safetensors` holds what a rank wrote, `index.json` where every piece of every tensor lies, with its checksum. Nothing is
pickled, a piece is read straight into its place and checked there, and writing needs no other rank: a thread can do it.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, WriteItem

from train.distributed.collectives import Group, ask_main, gather_objects, rank
from train.files import write_json
from train.streams import beside

INDEX = "index.json"
CHUNK_BYTES = 1 << 22
"""How much is written or read, and checked while it is in the cache, at a time; a multiple of a block."""
BLOCK_BYTES = 1 << 16
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A box cut out of a tensor, and where it lies.

    Attributes:
        name: of the tensor.
        dtype: as safetensors names it.
        full: shape of the whole tensor.
        at: corner of the box.
        shape: its size.
        file: in the directory; with `offset` and `bytes`, what to read.
        check: see `Checksum`.
    """

    name: str
    dtype: str
    full: tuple[int, ...]
    at: tuple[int, ...]
    shape: tuple[int, ...]
    file: str = ""
    offset: int = 0
    bytes: int = 0
    check: str = ""

    @property
    def key(self) -> str:
        """Its name in the safetensors file: of one tensor, several pieces may lie there."""
        return f"{self.name}@{','.join(map(str, self.at))}"


class Checksum:
    """SHA-256 over the 64-bit sums of blocks of 64 KiB, and over what is left.

    It finds what happens to files (bits that flip, pages that are lost, stale or in another place), as fast as memory can be
    read. It is no defence against somebody who means to deceive.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, data: Tensor) -> None:
        """Take in the next bytes, `n` uint8; all but the last call with whole blocks."""
        whole = data.numel() // BLOCK_BYTES * BLOCK_BYTES
        if whole:
            # A piece need not begin where a 64-bit number may.
            aligned = data[:whole] if data.data_ptr() % 8 == 0 else data[:whole].clone()
            sums = aligned.view(torch.int64).view(-1, BLOCK_BYTES // 8).sum(1)
            self._digest.update(sums.numpy().data)
        self._digest.update(data[whole:].numpy().data)

    def hex(self) -> str:
        return self._digest.hexdigest()


class Saver:
    """Takes this rank's share of the tensors; every piece is one rank's to write.

    Args:
        aside: copy the share into host memory that is used again for the next save (pinned if it comes from a GPU), so that
            training can go on while it is written. It costs as much memory as the share.
    """

    def __init__(self, *, aside: bool):
        self.aside = aside
        self._known: list[tuple[str, torch.Size]] = []
        self._items: list[WriteItem] = []
        self._copies: list[Tensor] = []

    @torch.no_grad()
    def take(
        self, tensors: Mapping[str, Tensor], group: Group | None = None, after: torch.cuda.Event | None = None
    ) -> list[tuple[Piece, Tensor]]:
        """This rank's pieces with their content as it is now; every rank must call, with the same names.

        The ranks talk with each other the first time, to divide the work, and when names or shapes have changed.

        Args:
            tensors: they must not change until this returns.
            group: to talk over.
            after: on a GPU, what has to be done there before; the copy is made beside what is done there meanwhile.

        Returns:
            the tensors lie in host memory if `aside`, else they are views of the ones that are trained.
        """
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(tensors), is_coordinator=rank() == 0)
        known = [(name, x.shape) for name, x in tensors.items()]
        if known != self._known:
            # Only rank 0 sees all plans: they grow with ranks times tensors.
            share = ask_main(
                planner.create_local_plan(), lambda plans: planner.create_global_plan(plans)[0], group
            )
            self._items = [item for item in share.items if _piece(item).shape.count(0) == 0]
            self._known, self._copies = known, []
        live = [cast(Tensor, planner.resolve_data(item)) for item in self._items]
        if self.aside:
            with beside(after) as stream:
                if not self._copies:
                    self._copies = [torch.empty_like(x, device="cpu", pin_memory=x.is_cuda) for x in live]
                torch._foreach_copy_(self._copies, live, non_blocking=True)
            if stream is not None:
                stream.synchronize()
            live = self._copies
        return [(_piece(item), x) for item, x in zip(self._items, live, strict=True)]


def write_pieces(directory: Path, share: Sequence[tuple[Piece, Tensor]], file: str) -> list[Piece]:
    """Write a rank's pieces into one file, and wait until it is on the disk. No other rank is needed.

    Returns:
        the pieces with their places, for the index.
    """
    places, end = [], 0
    for _, x in share:
        size = x.numel() * x.element_size()
        places.append((end, end + size))
        end += size
    entries = {
        piece.key: {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": place}
        for (piece, _), place in zip(share, places, strict=True)
    }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    begin = 8 + len(header)
    written = []
    with (directory / file).open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for (piece, x), (start, stop) in zip(share, places, strict=True):
            check = Checksum()
            for chunk in _bytes(x.detach().cpu().contiguous()).split(CHUNK_BYTES):
                check.update(chunk)
                out.write(chunk.numpy().data)
            written.append(
                replace(piece, file=file, offset=begin + start, bytes=stop - start, check=check.hex())
            )
        out.flush()
        os.fsync(out.fileno())
    return written


def write_index(directory: Path, pieces: Iterable[Piece]) -> None:
    """Write down where all ranks' pieces lie: without it, nothing there can be read."""
    by_name: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_name[piece.name].append(piece)
    tensors = {
        name: {
            "dtype": parts[0].dtype,
            "shape": parts[0].full,
            "pieces": [_without(asdict(p), "name", "dtype", "full") for p in parts],
        }
        for name, parts in sorted(by_name.items())
    }
    write_json(directory / INDEX, tensors, indent=0)


class StoredTensors:
    """What is in a directory; every piece is checked when it is read.

    Args:
        directory: with `index.json`, which is read once.

    Raises:
        ValueError: if the index cannot be read.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        try:
            index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
            self.shapes = {name: tuple(entry["shape"]) for name, entry in index.items()}
            self.dtypes = {name: DTYPES[entry["dtype"]] for name, entry in index.items()}
            self.pieces = {
                name: [_stored_piece(name, entry, part) for part in entry["pieces"]]
                for name, entry in index.items()
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{directory / INDEX}: cannot be read ({type(error).__name__}: {error})"
            ) from error

    def read(self, name: str) -> Tensor:
        """One whole tensor, read by this process alone.

        Raises:
            ValueError: if it cannot be read, or is not what was written.
        """
        x = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        self.load({name: x})
        return x

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Read this rank's pieces of the given tensors, in place; no other rank is needed.

        Raises:
            ValueError: as `read`.
        """
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(tensors), self._metadata(tensors), is_coordinator=False)
        wanted: dict[str, list[tuple[Piece, ReadItem]]] = defaultdict(list)
        for item in planner.create_local_plan().items:
            piece = self._find(item.storage_index)
            wanted[piece.file].append((piece, item))
        for file, items in sorted(wanted.items()):
            path = self.directory / file
            try:
                with path.open("rb", buffering=0) as source:
                    for piece, item in sorted(items, key=lambda pair: pair[0].offset):
                        _read_piece(source, piece, item, planner.resolve_tensor(item).detach())
            except OSError as error:
                raise ValueError(f"{path}: cannot be read ({error.strerror})") from error

    def _metadata(self, names: Iterable[str]) -> Metadata:
        return Metadata(
            state_dict_metadata={
                name: TensorStorageMetadata(
                    properties=TensorProperties(dtype=self.dtypes[name]),
                    size=torch.Size(self.shapes[name]),
                    chunks=[
                        ChunkStorageMetadata(offsets=torch.Size(p.at), sizes=torch.Size(p.shape))
                        for p in self.pieces[name]
                    ],
                )
                for name in names
            }
        )

    def _find(self, index: MetadataIndex) -> Piece:
        pieces = self.pieces[index.fqn]
        if index.index is not None and torch.Size(pieces[index.index].at) == index.offset:
            return pieces[index.index]
        return next(p for p in pieces if torch.Size(p.at) == index.offset)


def load_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read into the given tensors, in place; all ranks must call, with the same names.

    Raises:
        ValueError: on every rank, if a name is missing there or has another shape, or a piece is not what was written.
    """
    stored = StoredTensors(directory)
    missing = [name for name in tensors if name not in stored.shapes]
    if missing:
        raise ValueError(
            f"{directory}: has no {_some(missing)}; it belongs to another model or other --freeze flags"
        )
    for name, x in tensors.items():
        if stored.shapes[name] != x.shape:
            raise ValueError(
                f"{directory}: {name} has shape {list(stored.shapes[name])}, the model needs {list(x.shape)}"
            )
    failure = ""
    try:
        stored.load(tensors)
    except ValueError as error:
        failure = str(error)
    if failures := [line for line in gather_objects(failure) if line]:
        raise ValueError(failures[0])


def _read_piece(source: FileIO, piece: Piece, item: ReadItem, target: Tensor) -> None:
    """Put what is wanted of one piece into `target`.

    Raises:
        ValueError: if it is not what was written.
    """
    dtype, check = DTYPES[piece.dtype], Checksum()
    is_whole = not any(item.storage_offsets) and tuple(item.lengths) == piece.shape
    in_place = is_whole and target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous()
    box = target if in_place else torch.empty(piece.shape, dtype=dtype)
    source.seek(piece.offset)
    for chunk in _bytes(box).split(CHUNK_BYTES):
        left = chunk.numpy().data
        while left:
            count = source.readinto(left)
            if not count:
                raise ValueError(f"{source.name}: ends before {piece.name}: it was cut off")
            left = left[count:]
        check.update(chunk)  # while it is in the cache
    if check.hex() != piece.check:
        raise ValueError(f"{source.name}: {piece.name} changed since it was written")
    if not in_place:
        for axis, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            box = box.narrow(axis, start, length)
        target.copy_(box)


def _piece(item: WriteItem) -> Piece:
    data = item.tensor_data
    assert data is not None, f"{item.index.fqn} is no tensor"
    return Piece(
        name=item.index.fqn,
        dtype=SAFETENSORS_DTYPES[data.properties.dtype],
        full=tuple(data.size),
        at=tuple(data.chunk.offsets),
        shape=tuple(data.chunk.sizes),
    )


def _stored_piece(name: str, entry: Mapping[str, Any], part: Mapping[str, Any]) -> Piece:
    return Piece(
        name=name,
        dtype=entry["dtype"],
        full=tuple(entry["shape"]),
        at=tuple(part["at"]),
        shape=tuple(part["shape"]),
        file=part["file"],
        offset=part["offset"],
        bytes=part["bytes"],
        check=part["check"],
    )


def _bytes(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)


def _without(entry: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in names}


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
