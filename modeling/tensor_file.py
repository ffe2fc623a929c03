"""Weights -> safetensors files, one tensor in memory at a time; read back by `modeling/weights.py`.

In: names, shapes and precisions, known before anything is read (`plan_files`), then the tensors one by one in the plan's order
(`write_files`). Out: `STEM.safetensors`, or shards and their index. The same tensors give the same bytes, the library's own
(`safetensors.torch.save_file` with `{"format": "pt"}` as metadata): it wants all of them in memory at once, which is why it does
not write here.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modeling.weights import DTYPES

SPELLINGS = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A tensor that a file will hold."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlan:
    """A file's name and its tensors, in the order in which they are written."""

    name: str
    entries: Mapping[str, Entry]

    @property
    def num_bytes(self) -> int:
        return len(_header(self.entries)) + sum(entry.num_bytes for entry in self.entries.values())


@dataclass(frozen=True, slots=True)
class Written:
    """Size and SHA-256 of a file."""

    num_bytes: int
    sha256: str


def plan_files(stem: str, entries: Mapping[str, Entry], shard_size: int | None = None) -> list[FilePlan]:
    """Which tensor goes into which file.

    Args:
        stem: `ema` gives `ema.safetensors`, or `ema-00001-of-00003.safetensors` and so on.
        entries: in the model's order; shards are cut in it.
        shard_size: bytes of tensors per file; a tensor that is larger stands alone. None: one file.
    """
    parts: list[dict[str, Entry]] = [{}]
    size = 0
    for name, entry in entries.items():
        if shard_size is not None and parts[-1] and size + entry.num_bytes > shard_size:
            parts.append({})
            size = 0
        parts[-1][name] = entry
        size += entry.num_bytes
    names = [f"{stem}.safetensors"]
    if len(parts) > 1:
        names = [f"{stem}-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    return [FilePlan(name=n, entries=_in_file_order(p)) for n, p in zip(names, parts, strict=True)]


def write_files(
    folder: Path, plan: Sequence[FilePlan], tensors: Iterator[tuple[str, Tensor]]
) -> dict[str, Written]:
    """Write the planned files and, if there are several, their index.

    Args:
        folder: exists; its files of these names are replaced.
        plan: of `plan_files`.
        tensors: (name, tensor) in the plan's order; each is brought to its planned precision and then let go.

    Returns:
        size and hash by file name.

    Raises:
        OSError: if it cannot be written.
    """
    written = {}
    for part in plan:
        digest, size = hashlib.sha256(), 0
        with (folder / part.name).open("wb") as file:
            for data in _pieces(part.entries, tensors):
                file.write(data)
                digest.update(data)
                size += len(data)
                del data  # or it would live on while the next tensor is read
            file.flush()
            os.fsync(file.fileno())
        written[part.name] = Written(size, digest.hexdigest())
    if len(plan) > 1:
        stem = plan[0].name.rsplit("-", 3)[0]
        places = {name: part.name for part in plan for name in part.entries}
        total = sum(entry.num_bytes for part in plan for entry in part.entries.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        data = (json.dumps(index, indent=2) + "\n").encode()
        (folder / f"{stem}.safetensors.index.json").write_bytes(data)
        written[f"{stem}.safetensors.index.json"] = Written(len(data), hashlib.sha256(data).hexdigest())
    return written


def _pieces(
    entries: Mapping[str, Entry], tensors: Iterator[tuple[str, Tensor]]
) -> Iterator[bytes | memoryview]:
    yield _header(entries)
    for name, entry in entries.items():
        given, tensor = next(tensors)
        assert (given, tuple(tensor.shape)) == (name, entry.shape), (
            f"{name} {entry.shape} expected, not {given}"
        )
        flat = tensor.detach().to(device="cpu", dtype=entry.dtype).contiguous().reshape(-1)
        del tensor
        yield flat.view(torch.uint8).numpy().data
        del flat


def _in_file_order(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The library's order: wide numbers first, so that all are aligned, then by name."""
    return dict(sorted(entries.items(), key=lambda row: (-row[1].dtype.itemsize, row[0])))


def _header(entries: Mapping[str, Entry]) -> bytes:
    rows: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in entries.items():
        begin, end = end, end + entry.num_bytes
        rows[name] = {
            "dtype": SPELLINGS[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
