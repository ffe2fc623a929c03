"""Packs through memory that two processes see."""

import multiprocessing
import os
from dataclasses import fields, replace

import pytest
import torch

from data.packing import content_hash
from data.transport import Slots
from data.types import LaneCursor, PackedBatch
from tests.unit.data.test_loader import loader


@pytest.fixture(scope="module")
def packs() -> list[PackedBatch]:
    stream = loader()
    return [next(stream) for _ in range(6)]


def larger(batch: PackedBatch, rows: int) -> PackedBatch:
    return replace(
        batch, und_patches=torch.arange(rows * 12).remainder(251).to(torch.uint8).reshape(rows, 12)
    )


def require_same(one: PackedBatch, other: PackedBatch) -> None:
    assert content_hash(one) == content_hash(other)
    assert all(torch.equal(a, b) for a, b in zip(one.gen_pixels, other.gen_pixels, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.und_views, other.und_views, strict=True))
    for field in fields(one):
        if not isinstance(getattr(one, field.name), torch.Tensor) and field.name not in (
            "gen_pixels",
            "und_views",
            "regions",
        ):
            assert getattr(one, field.name) == getattr(other, field.name), field.name


def test_a_pack_arrives_as_it_was_whatever_lay_there_before(packs):
    slots = Slots(2)
    sent = [*packs, larger(packs[0], 5000), packs[1], larger(packs[2], 100_000), packs[3]]
    for batch in sent:
        require_same(slots.take(slots.put(batch)), batch)


def test_what_was_taken_is_not_changed_by_what_comes_later(packs):
    slots = Slots(1)
    first = slots.take(slots.put(packs[0]))
    slots.put(packs[1])
    require_same(first, packs[0])


def test_as_many_as_there_are_slots_may_wait(packs):
    slots = Slots(3)
    for _ in range(2):
        messages = [slots.put(batch) for batch in packs[:3]]
        for message, batch in zip(messages, packs, strict=False):
            require_same(slots.take(message), batch)


def test_a_pack_of_nothing(packs):
    empty = packs[0].map(lambda t: t[:0])
    empty = replace(empty, gen_pixels=(), regions={}, cursor=LaneCursor(lane=1))
    slots = Slots(1)
    require_same(slots.take(slots.put(empty)), empty)


def test_pixels_that_do_not_lie_in_order(packs):
    strided = torch.arange(60, dtype=torch.uint8).reshape(4, 5, 3).permute(2, 0, 1)
    slots = Slots(1)
    taken = slots.take(slots.put(replace(packs[0], gen_pixels=(strided,))))
    assert torch.equal(taken.gen_pixels[0], strided)


def _put(slots: Slots, queue) -> None:
    queue.put(slots.put(next(loader())))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_child_process_puts_in_what_its_parent_takes(packs, start):
    context = multiprocessing.get_context(start)
    slots, queue = Slots(1), context.Queue()
    child = context.Process(target=_put, args=(slots, queue))
    child.start()
    require_same(slots.take(queue.get(timeout=60)), packs[0])
    child.join()


def test_nothing_is_left_open(packs):
    before = len(os.listdir("/proc/self/fd"))
    slots = Slots(3)
    slots.take(slots.put(packs[0]))
    assert len(os.listdir("/proc/self/fd")) > before
    del slots
    assert len(os.listdir("/proc/self/fd")) == before
