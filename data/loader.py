"""Lanes -> the packs of one rank, in order, made ahead of time by worker processes.

A rank owns every `W`-th lane, a worker every `n`-th of these, and whoever owns lanes lets the one make a pack that has made the
fewest (`data/order.py`). So any number of ranks and workers can go on from any cursors; where the number of ranks divides that of
the lanes, the packs that all ranks take in a step are the same ones whatever that number is. A rank whose lanes have ended gives
empty packs, so that it can take part in the others' steps.
"""

import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from data.doing import Doing
from data.order import lanes_of, next_lane
from data.packing import pack
from data.processes import fork_server
from data.sources import SourceLost, TooManyRejects
from data.stream import LaneStream, StreamPlan
from data.transport import Message, Slots
from data.types import NO_LANE, LaneCursor, PackedBatch
from data.watch import poll_s, watched

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
    worker_timeout_s: float = 300.0,
) -> Iterator[PackedBatch]:
    """The packs of one rank; without end, once its lanes have ended they are fillers.

    Args:
        plan: what decides which packs come; its number of lanes has to stay the same over a run's life.
        rank, world_size: among the ranks that read different data.
        num_workers: processes that prepare packs; 0 prepares them in this one.
        prefetch_factor: packs each worker prepares ahead.
        cursors: of all lanes, after `packs_consumed` packs; None starts at the beginning.
        packs_consumed: packs that all ranks together have trained on.
        worker_timeout_s: how long a worker may do nothing while its pack is waited for.

    Raises:
        ValueError: if there are more ranks than lanes, or the cursors belong to another run.
        TooManyRejects: while iterating, if too many records of a group are unusable.
        SourceLost: while iterating, if a file of the data vanished or changed, or a worker hangs.
        RuntimeError: while iterating, if a worker fails or dies.
    """
    num_lanes = plan.num_lanes
    if not 1 <= world_size <= num_lanes:
        raise ValueError(
            f"{num_lanes} lanes cannot be dealt to {world_size} ranks: each needs one; start a new run with a larger --num_lanes"
        )
    if num_lanes % world_size and rank == 0:
        logger.warning(
            "%d ranks do not own equally many of %d lanes: some read on faster than others, and the order of packs is not that "
            "of other numbers of ranks (every sample still comes once per epoch)",
            world_size,
            num_lanes,
        )
    if rank == 0:
        _tell_repeats(plan)
    cursors = _require_cursors(cursors, num_lanes, packs_consumed)
    own = [cursors[lane] for lane in lanes_of(rank, world_size, num_lanes)]

    def start_worker(stream: LaneStreams, number: int) -> Iterator[PackedBatch]:
        who = f"data worker {number} of rank {rank}"
        return _from_worker(stream, who, prefetch_factor=prefetch_factor, timeout_s=worker_timeout_s)

    packs = _in_turn(plan, own, min(num_workers, len(own)), start_worker)
    return _pinned(packs) if torch.cuda.is_available() else packs


def _tell_repeats(plan: StreamPlan) -> None:
    """A group that has fewer records than there are lanes comes again and again, at once: nobody should have to find out."""
    for group in plan.groups:
        records = len(group.source)
        if records < plan.num_lanes and group.epochs is None and (group.weight or group.is_mandatory):
            logger.warning(
                "group %r: %d records for %d lanes: when every lane has read one, each record was read %.3g times; write "
                "when_exhausted: drop or stop into its YAML entry if once is enough",
                group.name,
                records,
                plan.num_lanes,
                plan.num_lanes / records,
            )


def _require_cursors(
    cursors: Sequence[LaneCursor] | None, num_lanes: int, packs_consumed: int
) -> tuple[LaneCursor, ...]:
    if cursors is None:
        cursors = tuple(LaneCursor(lane=lane) for lane in range(num_lanes))
    if len(cursors) != num_lanes:
        raise ValueError(
            f"the checkpoint has {len(cursors)} lanes; set --num_lanes {len(cursors)}, not {num_lanes}"
        )
    packs = sum(cursor.packs for cursor in cursors)
    if [c.lane for c in cursors] != list(range(num_lanes)) or packs != packs_consumed:
        raise ValueError(
            f"the cursors stand at {packs} packs, the run at {packs_consumed}: the checkpoint's cursors do not belong to its step"
        )
    return tuple(cursors)


def _in_turn(
    plan: StreamPlan,
    cursors: Sequence[LaneCursor],
    num_workers: int,
    start_worker: "Callable[[LaneStreams, int], Iterator[PackedBatch]]",
) -> Iterator[PackedBatch]:
    """The packs of some lanes: each time that of the lane whose turn it is, from whoever makes it."""
    made = {cursor.lane: cursor.packs for cursor in cursors}
    makers: dict[int, Iterator[PackedBatch]] = {}
    for worker in range(max(num_workers, 1)):
        share = cursors[worker :: max(num_workers, 1)]
        stream = LaneStreams(plan, share)
        maker = start_worker(stream, worker) if num_workers else stream.packs()
        makers.update({cursor.lane: maker for cursor in share})
    while made:
        lane = next_lane(made)
        batch = next(makers[lane])
        if batch.cursor.lane == lane:
            made[lane] += 1
            yield batch
        else:  # it has ended
            del made[lane]
    while True:
        yield filler(plan)


def filler(plan: StreamPlan) -> PackedBatch:
    """The empty pack of a rank whose lanes have ended."""
    return pack([], plan.layout, plan.special, cursor=LaneCursor(lane=NO_LANE))


def _pinned(packs: Iterator[PackedBatch]) -> Iterator[PackedBatch]:
    return (batch.pin_memory() for batch in packs)


class LaneStreams:
    """The packs of some lanes in turn; where a lane has ended, once an empty pack of no lane in place of its turn.

    Args:
        plan: what all lanes share.
        cursors: of these lanes.
    """

    def __init__(self, plan: StreamPlan, cursors: Sequence[LaneCursor]):
        self.plan, self.cursors = plan, tuple(cursors)

    def packs(self) -> Iterator[PackedBatch]:
        made = {cursor.lane: cursor.packs for cursor in self.cursors}
        cursor_of = {cursor.lane: cursor for cursor in self.cursors}
        streams: dict[int, LaneStream] = {}
        while made:
            lane = next_lane(made)
            if lane not in streams:
                streams[lane] = LaneStream(self.plan, cursor_of[lane])
            if streams[lane].has_ended:
                del made[lane], streams[lane]
                yield filler(self.plan)
            else:
                made[lane] += 1
                yield streams[lane].next_pack()


# ---------------------------------------------------------------------------------------------------- workers


@dataclass(frozen=True, slots=True)
class WorkerFailure:
    """An error on its way from a worker to the trainer."""

    kind: type[Exception]
    message: str
    trace: str

    def error(self) -> Exception:
        """The error to raise: its message is the worker's one line, its notes say where it happened."""
        error = self.kind(self.message)
        error.add_note(self.trace)
        return error


def _from_worker(
    stream: LaneStreams, who: str, *, prefetch_factor: int, timeout_s: float
) -> Iterator[PackedBatch]:
    """The packs that a worker makes; it starts at once."""
    context = fork_server(["__main__", "torch", "data.stream", "numba"])
    doing = Doing(context)
    # The trainer asks for a pack when it is handed one: no more are on their way at a time than there are slots besides its own.
    slots = Slots(prefetch_factor + 1)
    loader = DataLoader(
        _Sender(stream, slots, doing),
        batch_size=None,
        num_workers=1,
        prefetch_factor=prefetch_factor,
        worker_init_fn=_start_worker,
        multiprocessing_context=context,
        timeout=poll_s(timeout_s),
    )
    return _received(watched(iter(loader), doing, timeout_s, who), slots)


def _received(messages: Iterator[Any], slots: Slots) -> Iterator[PackedBatch]:
    while True:
        try:
            message = next(messages)
        except StopIteration:
            return
        except RuntimeError as e:
            raise RuntimeError(
                f"a data worker died ({str(e).splitlines()[0]}); if it was killed for memory, lower --num_workers or "
                "--prefetch_factor"
            ) from e
        if isinstance(message, WorkerFailure):
            raise message.error()
        yield slots.take(message)


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


class _Sender(IterableDataset[Any]):
    """What a worker does."""

    def __init__(self, stream: LaneStreams, slots: Slots, doing: Doing):
        self.stream, self.slots, self.doing = stream, slots, doing

    def __iter__(self) -> Iterator[Message | WorkerFailure]:
        self.doing.begin()
        return _messages(self.stream.packs(), self.slots)


def _messages(packs: Iterator[PackedBatch], slots: Slots) -> Iterator[Message | WorkerFailure]:
    try:
        for batch in packs:
            yield slots.put(batch)
    except Exception as e:  # noqa: BLE001 - whatever it is, the trainer has to hear of it
        message, trace = " ".join(str(e).split()), "".join(traceback.format_exception(e))
        for kind in (SourceLost, TooManyRejects, ValueError):
            if isinstance(e, kind):
                yield WorkerFailure(kind, message, trace)
                return
        yield WorkerFailure(RuntimeError, f"data worker: {type(e).__name__}: {message}", trace)
