"""How a pack gets from a worker to the trainer: its tensors through memory that both see, the rest as a short message.

Not through torch's shared memory: that needs one file descriptor per tensor, a large `/dev/shm`, and leaves segments behind when
a rank is killed. The memory here has no name, so it goes with the last process that holds it.
"""

import io
import mmap
import os
import pickle
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.types import PackedBatch

ALIGNMENT = 64
"""Tensors begin at multiples of so many bytes, the width of a cache line."""


@dataclass(frozen=True, slots=True)
class Message:
    """A pack without its tensors.

    Attributes:
        slot: where the tensors lie.
        sizes: their bytes, in order.
        pack: all else, pickled.
    """

    slot: int
    sizes: tuple[int, ...]
    pack: bytes

    @property
    def num_bytes(self) -> int:
        """What travels: the tensors, the spaces between them, and this message."""
        return sum(map(_aligned, self.sizes)) + len(self.pack)


class Slots:
    """Memory for the tensors of `count` packs, used in turn: one process puts packs in, another takes them out.

    What is put in has to be taken before `count` more are put in. A child process can be given it as an argument when it starts.
    """

    def __init__(self, count: int):
        self._files = [_nameless_file() for _ in range(count)]
        self._memory: list[mmap.mmap | None] = [None] * count
        self._turn = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return _received_slots, ([DupFd(file) for file in self._files],)

    def __del__(self) -> None:
        for file in self._files:
            os.close(file)

    def put(self, batch: PackedBatch) -> Message:
        """Copy a pack's tensors into the next slot."""
        slot, self._turn = self._turn, (self._turn + 1) % len(self._files)
        pack, buffers = _taken_apart(batch)
        sizes = tuple(buffer.nbytes for buffer in buffers)
        memory = self._mapped(slot, sum(map(_aligned, sizes)))
        at = 0
        for buffer in buffers:
            memory[at : at + buffer.nbytes] = buffer
            at += _aligned(buffer.nbytes)
        return Message(slot, sizes, pack)

    def take(self, message: Message) -> PackedBatch:
        """The pack; what it holds is its own."""
        total = sum(map(_aligned, message.sizes))
        copy = np.empty(total, np.uint8)
        copy[:] = np.frombuffer(self._mapped(message.slot, total), np.uint8, total)
        buffers, at = [], 0
        for size in message.sizes:
            buffers.append(copy[at : at + size])
            at += _aligned(size)
        return pickle.loads(message.pack, buffers=buffers)

    def _mapped(self, slot: int, size: int) -> mmap.mmap:
        memory, size = self._memory[slot], max(size, 1)  # of no byte there is no map
        if memory is None or len(memory) < size:  # no pack before needed as much
            file = self._files[slot]
            if os.fstat(file).st_size < size:
                os.ftruncate(file, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
            memory = self._memory[slot] = mmap.mmap(file, 0)
        return memory


def _received_slots(files: Sequence[Any]) -> Slots:
    slots = Slots(0)
    slots._files = [file.detach() for file in files]
    slots._memory = [None] * len(files)
    return slots


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("packs")
    with (
        tempfile.TemporaryFile() as file
    ):  # not Linux: it lies on a disk, but is not written there while memory suffices
        return os.dup(file.fileno())


def _taken_apart(batch: PackedBatch) -> tuple[bytes, list[memoryview]]:
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    _TensorPickler(file, protocol=5, buffer_callback=buffers.append).dump(batch)
    return file.getvalue(), [buffer.raw() for buffer in buffers]


class _TensorPickler(pickle.Pickler):
    """Writes tensors as numpy arrays, whose bytes are handed out."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            return torch.from_numpy, (obj.contiguous().numpy(),)
        return NotImplemented


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
