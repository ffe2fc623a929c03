"""Killed anywhere, continued on any number of ranks and workers: every record comes once per epoch, packs in the same order.

A state is what a checkpoint holds of the data: the cursors of all lanes. First 200 sequences of segments in one process (a worker
is then a stream whose packs travel as bytes), then ten with real ranks and workers that are ended by SIGKILL.
"""

import itertools
import json
import multiprocessing
import os
import pickle
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import loader
from data.loader import LaneStreams, build_loader
from data.policy import PackBudget
from data.stream import StreamPlan
from data.transport import Slots
from data.types import LaneCursor, PackedBatch
from tests.unit.data.toy_groups import group, lengths, plan

LANES, PACKS_PER_STEP = 12, 12
EPOCHS = {"short": 1, "long": 2, "tiny": 1}
BAD = 7


def finite_plan(policy: str = "drop") -> StreamPlan:
    """Three groups that end, one with fewer records than lanes, one with a record that is always rejected."""
    short = lengths(60, 5, 30)
    short[BAD] = -1
    records = {"short": short, "long": lengths(33, 30, 70), "tiny": [9, 11, 13]}
    groups = [
        group(name, numbers, when_exhausted="drop", epochs=EPOCHS[name]) for name, numbers in records.items()
    ]
    if policy == "repeat":
        groups = [group(name, numbers) for name, numbers in records.items()]
    budget = PackBudget(expected=70, maximum=80, per_sample=80, max_buffer=4)
    return plan(*groups, num_lanes=LANES, max_reject_fraction=1.0, budget=budget)


FINITE, ENDLESS = finite_plan(), finite_plan("repeat")


@dataclass(frozen=True, slots=True)
class Seen:
    """What is remembered of a pack."""

    lane: int
    number: int
    hash: str
    samples: tuple[tuple[str, int], ...]
    rejects: tuple[tuple[str, int], ...]

    @staticmethod
    def of(batch: PackedBatch) -> "Seen":
        return Seen(
            batch.cursor.lane,
            batch.cursor.packs,
            batch.hash,
            tuple((o.group, o.position) for o in batch.origins),
            tuple((r.group, r.position) for r in batch.rejects),
        )


@dataclass(frozen=True, slots=True)
class State:
    """A checkpoint's data state, and what the steps up to it trained on."""

    cursors: tuple[LaneCursor, ...] = tuple(LaneCursor(lane=lane) for lane in range(LANES))
    steps: tuple[tuple[Seen, ...], ...] = ()

    @property
    def packs(self) -> int:
        return sum(map(len, self.steps))

    def after(self, batches: Sequence[PackedBatch]) -> "State":
        cursors = list(self.cursors)
        for batch in batches:
            # As a checkpoint does: through JSON.
            cursors[batch.cursor.lane] = LaneCursor.from_json(json.loads(json.dumps(batch.cursor.to_json())))
        seen = sorted((Seen.of(b) for b in batches), key=lambda s: (s.number, s.lane))
        return State(tuple(cursors), (*self.steps, tuple(seen)))


@dataclass(frozen=True, slots=True)
class Segment:
    """A start of the run: on so many ranks and workers, killed after some steps, the checkpoint being of an earlier one."""

    world_size: int
    num_workers: int
    accumulation: int
    steps: int
    saved: int


def walk(plan: StreamPlan, state: State, segment: Segment) -> Iterator[State]:
    """The states after each step of a segment, until the data ends."""
    ranks = [
        build_loader(
            plan,
            rank=r,
            world_size=segment.world_size,
            num_workers=segment.num_workers,
            cursors=state.cursors,
            packs_consumed=state.packs,
        )
        for r in range(segment.world_size)
    ]
    while True:
        batches = [next(rank) for rank in ranks for _ in range(segment.accumulation)]
        real = [b for b in batches if not b.is_filler]
        if not real:
            return
        state = state.after(real)
        yield state


def survive(plan: StreamPlan, segments: Sequence[Segment]) -> State:
    """The state that the last checkpoint holds after all segments."""
    state = State()
    for segment in segments:
        states = [state, *itertools.islice(walk(plan, state, segment), segment.steps)]
        state = states[min(segment.saved, len(states) - 1)]
    return state


def require_exactly_once(state: State) -> None:
    """Everything read was trained on, waits or was rejected, once; nothing else was."""
    packs = [seen for step in state.steps for seen in step]
    places = Counter(place for seen in packs for place in (*seen.samples, *seen.rejects))
    places.update((w.group, w.position) for c in state.cursors for w in c.waiting)
    read = {
        (name, cursor.lane + LANES * n)
        for cursor in state.cursors
        for name, amount in cursor.read.items()
        for n in range(amount.samples)
    }
    assert set(places) == read, "lost, or from nowhere"
    assert set(places.values()) <= {1}, "used twice"


def segments(constant: bool) -> st.SearchStrategy[list[Segment]]:
    """Up to four starts; with `saved` 0 a run was killed before its first checkpoint: the next starts from the same one."""

    @st.composite
    def one(draw: st.DrawFn) -> Segment:
        world_size = draw(st.integers(1, 4))
        accumulation = PACKS_PER_STEP // world_size if constant else draw(st.integers(1, 3))
        steps = draw(st.integers(0, 2))
        return Segment(world_size, draw(st.integers(0, 3)), accumulation, steps, draw(st.integers(0, steps)))

    return st.lists(one(), min_size=2, max_size=4)


def through_memory(stream: LaneStreams, who: str, **_: object) -> Iterator[PackedBatch]:
    slots = Slots(1)
    return (slots.take(slots.put(batch)) for batch in stream.packs())


@contextmanager
def simulated_workers() -> Iterator[None]:
    """Workers of this process: each makes the packs of its lanes, which travel through memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "_from_worker", through_memory)
        yield


@pytest.fixture(scope="module")
def undisturbed() -> State:
    """The steps of a run on one rank that nobody killed."""
    *_, last = walk(FINITE, State(), Segment(1, 0, PACKS_PER_STEP, 0, 0))
    return last


def test_an_undisturbed_run_reads_every_record_once_per_epoch(undisturbed):
    require_exactly_once(undisturbed)
    packs = [seen for step in undisturbed.steps for seen in step]
    trained = Counter(place for seen in packs for place in seen.samples)
    records = {"short": 60, "long": 33, "tiny": 3}
    everything = {(name, p) for name, n in records.items() for p in range(n * EPOCHS[name])}
    rejected = {place for seen in packs for place in seen.rejects}
    assert len(rejected) == 1 and set(trained) == everything - rejected
    assert not any(cursor.waiting for cursor in undisturbed.cursors)


def require_same_order(state: State, undisturbed: State) -> None:
    """The steps are the same ones; after the first lane has ended, when steps hold fewer packs, each lane's packs are."""
    full = sum(len({seen.lane for seen in step}) == LANES for step in undisturbed.steps)
    assert full >= 4
    assert state.steps[:full] == undisturbed.steps[: min(full, len(state.steps))]
    for lane in range(LANES):
        own, expected = (
            [s for step in x.steps for s in step if s.lane == lane] for x in (state, undisturbed)
        )
        assert own == expected[: len(own)]


SEQUENCES = {"max_examples": 100, "derandomize": True, "deadline": None, "database": None}


@settings(**SEQUENCES)
@given(starts=segments(constant=True))
def test_with_constant_packs_per_step_the_order_of_packs_is_always_the_same(undisturbed, starts):
    with simulated_workers():
        state = survive(FINITE, starts)
    require_same_order(state, undisturbed)
    require_exactly_once(state)


@settings(**SEQUENCES)
@given(starts=segments(constant=False), last=st.integers(1, 5), policy=st.sampled_from(["drop", "repeat"]))
def test_with_any_packs_per_step_nothing_is_lost_or_used_twice(starts, last, policy):
    """The last start is on up to five ranks, which do not divide the lanes."""
    with simulated_workers():
        state = survive(FINITE if policy == "drop" else ENDLESS, [*starts, Segment(last, 1, 1, 2, 2)])
    require_exactly_once(state)


# ------------------------------------------------------------------------------------------- real processes


def train_as_rank(folder: str, state: State, segment: Segment, rank: int) -> None:
    """What a rank does until it is killed: a few steps more than are waited for, each noted with its cursors."""
    # A rank of the test is itself forked from a server that has imported everything; for a second one time is too short.
    loader.fork_server = lambda modules: multiprocessing.get_context("fork")
    packs = build_loader(
        FINITE,
        rank=rank,
        world_size=segment.world_size,
        num_workers=segment.num_workers,
        prefetch_factor=1,
        cursors=state.cursors,
        packs_consumed=state.packs,
    )
    with Path(folder, f"rank{rank}").open("wb") as file:
        for _ in range(segment.steps + 2):
            pickle.dump([next(packs) for _ in range(segment.accumulation)], file)
            file.flush()
    time.sleep(60)


def finished_steps(folder: Path, world_size: int) -> list[list[PackedBatch]]:
    """Packs of all ranks, of the steps that every rank has noted whole."""
    by_rank: list[list[list[PackedBatch]]] = []
    for rank in range(world_size):
        steps = []
        file = folder / f"rank{rank}"
        if file.exists():
            with file.open("rb") as stream, suppress(EOFError, pickle.UnpicklingError):
                while True:
                    steps.append(pickle.load(stream))
        by_rank.append(steps)
    return [[b for part in parts for b in part if not b.is_filler] for parts in zip(*by_rank, strict=False)]


def run_until_killed(folder: Path, state: State, segment: Segment, rest_s: float) -> State:
    """A segment in processes: SIGKILL to every rank, a moment after the steps were made."""
    folder.mkdir()
    context = multiprocessing.get_context("forkserver")
    arguments = [(str(folder), state, segment, rank) for rank in range(segment.world_size)]
    ranks = [context.Process(target=train_as_rank, args=a) for a in arguments]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + 60
    while len(finished_steps(folder, segment.world_size)) < segment.steps:
        assert time.monotonic() < deadline and all(p.is_alive() for p in ranks), "a rank ended on its own"
        time.sleep(0.03)
    time.sleep(rest_s)
    for process in ranks:
        os.kill(process.pid, signal.SIGKILL)
    for process in ranks:
        process.join()
    for batches in finished_steps(folder, segment.world_size)[: segment.saved]:
        state = state.after(batches)
    return state


@pytest.mark.timeout(120)
def test_ranks_that_are_killed_go_on_as_one_that_was_not(tmp_path, undisturbed):
    """Ten sequences of two starts, killed anywhere; packs per step are constant."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "data.stream", __name__])
    chance = np.random.default_rng(4)
    for sequence in range(10):
        state = State()
        for start in range(2):
            world_size = (1, 2, 3, 4)[int(chance.integers(4))]
            segment = Segment(world_size, int(chance.integers(4)), PACKS_PER_STEP // world_size, 1, 1 + start)
            state = run_until_killed(
                tmp_path / f"{sequence}.{start}", state, segment, float(chance.uniform(0, 0.02))
            )
        assert state.steps
        require_same_order(state, undisturbed)
        require_exactly_once(state)
