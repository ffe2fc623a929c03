"""Lanes -> the packs of one rank, in order, made ahead of time by worker processes.

Pack `p` of the run (`p = step x packs per step + i`) comes from lane `p % L` and belongs to rank `p % W`. `W`
divides `L`, so a rank owns whole lanes; the number of workers divides `L / W`, so a worker does too, and
taking turns among workers keeps the order. Which pack is where therefore depends on neither.

Packs travel from the workers as one block of bytes, not through torch's shared memory: that needs one file
descriptor per tensor, a large `/dev/shm`, and leaves segments behind when a rank is killed.
"""

import io
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.order import pack_lane, packs_of_lane, usable_world_sizes
from data.stream import LaneStream, StreamPlan
from data.types import LaneCursor, PackedBatch

logger = logging.getLogger(__name__)


def build_loader(
    plan: StreamPlan,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    prefetch_factor: int = 2,
    cursors: Sequence[LaneCursor] | None = None,
    packs_consumed: int = 0,
) -> Iterator[PackedBatch]:
    """The endless packs of one rank.

    Args:
        plan: what decides which packs come; its number of lanes has to stay the same over a run's life.
        rank, world_size: among the ranks that read different data.
        num_workers: processes that prepare packs; 0 prepares them in this one.
        prefetch_factor: packs each worker prepares ahead.
        cursors: of all lanes, after `packs_consumed` packs; None starts at the beginning.
        packs_consumed: packs that all ranks together have trained on.

    Raises:
        ValueError: if the world size does not divide the lanes, or the cursors belong to another run; while
            iterating, if too many records of a group are unusable.
        RuntimeError: while iterating, if a worker fails or dies.
    """
    num_lanes = plan.num_lanes
    if world_size < 1 or num_lanes % world_size:
        raise ValueError(
            f"{num_lanes} lanes cannot be dealt to {world_size} ranks evenly; usable world sizes are "
            f"{', '.join(map(str, usable_world_sizes(num_lanes)))} (or set --num_lanes for a new run)"
        )
    if packs_consumed % world_size:
        raise ValueError(
            f"{packs_consumed} packs were consumed, {world_size} ranks cannot go on amid a round; "
            "use a world size that divides the packs per step"
        )
    cursors = _require_cursors(cursors, num_lanes, packs_consumed)
    stream = RankStream(plan, cursors, rank, world_size, packs_consumed // world_size)
    workers = usable_workers(num_workers, num_lanes // world_size)
    return _packs(stream, workers, prefetch_factor)


def usable_workers(num_workers: int, lanes_of_rank: int) -> int:
    """The largest number of workers, at most `num_workers`, that own the same number of lanes each."""
    usable = max((n for n in range(1, num_workers + 1) if lanes_of_rank % n == 0), default=0)
    if usable != num_workers:
        logger.info(
            "--num_workers %d: %d are used, to share %d lanes evenly", num_workers, usable, lanes_of_rank
        )
    return usable


class RankStream(IterableDataset[Any]):
    """The packs of one rank; in a worker, those of the lanes that the worker owns.

    Args:
        plan: what all lanes share.
        cursors: of all lanes.
        rank, world_size: among the ranks that read different data.
        start: packs this rank has consumed.
    """

    def __init__(
        self, plan: StreamPlan, cursors: Sequence[LaneCursor], rank: int, world_size: int, start: int
    ):
        self.plan, self.cursors = plan, tuple(cursors)
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        return self.packs(0, 1) if worker is None else _messages(self.packs(worker.id, worker.num_workers))

    def packs(self, worker: int, num_workers: int) -> Iterator[PackedBatch]:
        """Every `num_workers`-th pack, beginning with the `worker`-th."""
        streams: dict[int, LaneStream] = {}
        for turn in count(self.start + worker, num_workers):
            lane = pack_lane(turn * self.world_size + self.rank, self.plan.num_lanes)
            if lane not in streams:
                streams[lane] = LaneStream(self.plan, self.cursors[lane])
            yield streams[lane].next_pack()


def _require_cursors(
    cursors: Sequence[LaneCursor] | None, num_lanes: int, packs_consumed: int
) -> tuple[LaneCursor, ...]:
    if cursors is None:
        cursors = tuple(LaneCursor(lane=lane) for lane in range(num_lanes))
    if len(cursors) != num_lanes:
        raise ValueError(
            f"the checkpoint has {len(cursors)} lanes; set --num_lanes {len(cursors)}, not {num_lanes}"
        )
    for lane, cursor in enumerate(cursors):
        packs = packs_of_lane(lane, num_lanes, packs_consumed)
        if (cursor.lane, cursor.packs) != (lane, packs):
            raise ValueError(
                f"cursor {lane} stands at lane {cursor.lane}, pack {cursor.packs}; after {packs_consumed} packs of "
                f"the run it must be at pack {packs}: the checkpoint's cursors do not belong to its step"
            )
    return tuple(cursors)


# ---------------------------------------------------------------------------------------------------- workers


@dataclass(frozen=True, slots=True)
class WorkerFailure:
    """An error on its way from a worker to the trainer."""

    is_user_error: bool
    message: str
    trace: str

    def error(self) -> Exception:
        """The error to raise: its message is the worker's one line, its notes say where it happened."""
        error = (
            ValueError(self.message) if self.is_user_error else RuntimeError(f"data worker: {self.message}")
        )
        error.add_note(self.trace)
        return error


def _packs(stream: RankStream, num_workers: int, prefetch_factor: int) -> Iterator[PackedBatch]:
    pin = torch.cuda.is_available()
    for batch in _from_workers(stream, num_workers, prefetch_factor) if num_workers else stream:
        yield batch.pin_memory() if pin else batch


def _from_workers(stream: RankStream, num_workers: int, prefetch_factor: int) -> Iterator[PackedBatch]:
    # Forked from a small server, not from the trainer: that has threads (gloo, NCCL, OpenMP) whose
    # locks a fork would copy.
    workers = multiprocessing.get_context("forkserver")
    workers.set_forkserver_preload(["__main__", "torch", "data.stream"])  # imported once, not by every worker
    # No `timeout`: with one, torch looks whether the workers live only when it has passed; without, every 5 s.
    loader = DataLoader(
        stream,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        worker_init_fn=_start_worker,
        multiprocessing_context=workers,
    )
    messages = iter(loader)
    while True:
        try:
            message = next(messages)
        except RuntimeError as e:
            raise RuntimeError(
                f"a data worker died ({str(e).splitlines()[0]}); if it was killed for memory, lower --num_workers or "
                "--prefetch_factor"
            ) from e
        if isinstance(message, WorkerFailure):
            raise message.error()
        yield pickle.loads(message)


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer handles Ctrl-C and ends its workers
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    # torch watches the process that forked the worker. That is the fork server, and it lives as long as its workers do: without
    # this, a killed trainer would leave them all behind.
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)


def _messages(packs: Iterator[PackedBatch]) -> Iterator[bytes | WorkerFailure]:
    try:
        for batch in packs:
            yield to_bytes(batch)
    except Exception as e:  # noqa: BLE001 - whatever it is, the trainer has to hear of it
        user_error = isinstance(e, ValueError)
        message = " ".join(str(e).split())
        message = message if user_error else f"{type(e).__name__}: {message}"
        yield WorkerFailure(user_error, message, "".join(traceback.format_exception(e)))


class _TensorPickler(pickle.Pickler):
    """Writes tensors as numpy arrays: small, fast, without shared memory."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            return torch.from_numpy, (obj.numpy(),)
        return NotImplemented


def to_bytes(batch: PackedBatch) -> bytes:
    """A pack as bytes; `pickle.loads` reads it."""
    buffer = io.BytesIO()
    _TensorPickler(buffer, protocol=5).dump(batch)
    return buffer.getvalue()
