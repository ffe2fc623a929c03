"""Named tensors of all ranks <-> one directory, by torch's distributed checkpoint: it fits any world size and strategy.

The directory's `.metadata` is a pickle that torch itself writes: call `load_tensors` and `stored_shapes` only on files of our own
whose hashes were checked before (`train/checkpoint.py`).
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata


def save_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write every rank's pieces; all ranks must call, with the same names.

    Raises:
        ValueError: on every rank, if any of them cannot write.
    """
    try:
        with _alone_on_purpose():
            dcp.save(
                dict(tensors),
                storage_writer=dcp.FileSystemWriter(directory),
                no_dist=not dist.is_initialized(),
            )
    except CheckpointException as error:
        raise ValueError(f"{directory}: cannot be written: {_cause(error)}") from error


def load_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read into the given tensors, in place; all ranks must call, with the same names.

    Raises:
        ValueError: if a name is missing there or has another shape.
    """
    stored = stored_shapes(directory)
    missing = [name for name in tensors if name not in stored]
    if missing:
        raise ValueError(
            f"{directory}: has no {_some(missing)}; it belongs to another model or other --freeze flags"
        )
    for name, x in tensors.items():
        if stored[name] != x.shape:
            raise ValueError(
                f"{directory}: {name} has shape {list(stored[name])}, the model needs {list(x.shape)}"
            )
    try:
        with _alone_on_purpose():
            dcp.load(
                dict(tensors),
                storage_reader=dcp.FileSystemReader(directory),
                no_dist=not dist.is_initialized(),
            )
    except CheckpointException as error:
        raise ValueError(f"{directory}: cannot be read: {_cause(error)}") from error


def stored_shapes(directory: Path) -> dict[str, torch.Size]:
    """Names and full shapes of what is there."""
    entries = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    return {name: entry.size for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


class StoredTensors:
    """What is in a directory, read one tensor at a time, by one process.

    Args:
        directory: see `load_tensors`; its metadata is read once.
    """

    def __init__(self, directory: Path):
        self._reader = _CachedMetadata(directory)
        entries = self._reader.read_metadata().state_dict_metadata
        self._entries = {n: e for n, e in entries.items() if isinstance(e, TensorStorageMetadata)}
        self.shapes = {name: tuple(entry.size) for name, entry in self._entries.items()}
        self.dtypes = {name: entry.properties.dtype for name, entry in self._entries.items()}

    def read(self, name: str) -> Tensor:
        """One whole tensor.

        Raises:
            ValueError: if it cannot be read.
        """
        tensors = {name: torch.empty(self.shapes[name], dtype=self.dtypes[name])}
        try:
            with _alone_on_purpose():
                dcp.load(tensors, storage_reader=self._reader, no_dist=True)
        except CheckpointException as error:
            raise ValueError(f"{self._reader.path}: {name} cannot be read: {_cause(error)}") from error
        return tensors[name]


class _CachedMetadata(dcp.FileSystemReader):
    """Torch reads all of the metadata again for every load; of a large model that is most of the time."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if not hasattr(self, "_metadata"):
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata


@contextmanager
def _alone_on_purpose() -> Iterator[None]:
    """Tools and tests have no process group, and mean it: torch need not warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning
        )
        yield


def _cause(error: CheckpointException) -> str:
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {type(cause).__name__}: {cause}"


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
