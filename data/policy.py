"""Which samples share a pack. A policy sees one lane: what waits there, and what it may read next.

`conserving` packs every sample that was read, sooner or later. `upstream_compat` chooses as the published packer does, sample
by sample, and loses what that loses. All that a policy keeps between two packs is the lane's waiting samples, so either goes on
from a `LaneCursor`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from data.layout import LayoutSpec, num_tokens, planned_tokens
from data.mixture import Group
from data.types import Sample

LOST_IN_A_ROW = 1000
"""`upstream_compat` gives up on a mandatory group after so many: nothing may loop forever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackBudget:
    """When a pack is full.

    Attributes:
        expected: a pack is emitted once it has this many tokens.
        maximum: no pack has more (under `upstream_compat`, mandatory samples may exceed it).
        per_sample: a longer sample is rejected.
        max_buffer: how many samples may wait; `conserving` then emits a pack short of `expected`.
        prefer_buffer_before: `upstream_compat` takes waiting samples first while a pack has fewer tokens than this.
        policy: row of `POLICIES`.
    """

    expected: int
    maximum: int
    per_sample: int
    max_buffer: int = 50
    prefer_buffer_before: int = 16384
    policy: str = "conserving"

    def __post_init__(self) -> None:
        if not 0 < self.expected <= self.maximum:
            raise ValueError(
                f"--expected_num_tokens {self.expected} must be from 1 to --max_num_tokens {self.maximum}"
            )
        if self.per_sample < 1:
            raise ValueError(f"--max_num_tokens_per_sample {self.per_sample} must be at least 1")
        if self.policy not in POLICIES:
            raise ValueError(f"--packer {self.policy!r} is unknown; there are {', '.join(POLICIES)}")
        POLICIES[self.policy].require(self)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample that can be used."""
        return min(self.per_sample, self.maximum)


class Lane(Protocol):
    """What a policy may do with a lane.

    Attributes:
        groups: of the mixture.
        layout: of the model.
        budget: when a pack is full.
        waiting: samples read and not yet packed, oldest first; the policy's to change.
    """

    groups: tuple[Group, ...]
    layout: LayoutSpec
    budget: PackBudget
    waiting: list[Sample]

    def draw_group(self) -> Group:
        """A group by the weights: the lane's next random choice."""

    def read_next(self, group: Group) -> Sample | None:
        """The group's next sample; None if the record was rejected."""

    def lose(self, sample: Sample) -> None:
        """Count a sample that will be in no pack."""


class Filling:
    """The samples of a pack while it is being filled."""

    def __init__(self, lane: Lane) -> None:
        self._layout, self._maximum = lane.layout, lane.budget.maximum
        self.samples: list[Sample] = []
        self.groups: set[str] = set()
        self.tokens = 0

    def offer(self, sample: Sample) -> bool:
        """Take the sample if it fits."""
        fits = self.tokens + num_tokens(sample, self._layout) <= self._maximum
        if fits:
            self.take(sample)
        return fits

    def take(self, sample: Sample) -> None:
        """Take the sample, whether it fits or not."""
        self.samples.append(sample)
        self.groups.add(sample.origin.group)
        self.tokens += num_tokens(sample, self._layout)


# ------------------------------------------------------------------------------------------------- conserving


def conserving(lane: Lane) -> list[Sample]:
    """The next pack, losing nothing: what does not fit waits, and the oldest that waits goes first into the next pack."""
    pack, budget = Filling(lane), lane.budget
    # Even before the mandatory groups: whatever its length it fits, so no sample waits forever.
    if lane.waiting:
        pack.offer(lane.waiting.pop(0))
    for group in lane.groups:
        if group.is_mandatory and group.name not in pack.groups:
            _offer_mandatory(lane, group, pack)
    for sample in tuple(lane.waiting):
        if pack.tokens < budget.expected and pack.offer(sample):
            _stop_waiting(lane, sample)
    while pack.tokens < budget.expected and len(lane.waiting) < budget.max_buffer:
        drawn = lane.read_next(lane.draw_group())
        if drawn is not None and not pack.offer(drawn):
            lane.waiting.append(drawn)
    return pack.samples


def _offer_mandatory(lane: Lane, group: Group, pack: Filling) -> None:
    sample = next((s for s in lane.waiting if s.origin.group == group.name), None)
    if sample is not None:
        if pack.offer(sample):
            _stop_waiting(lane, sample)
        return
    while sample is None:
        sample = lane.read_next(group)
    if not pack.offer(sample):
        lane.waiting.append(sample)


def _stop_waiting(lane: Lane, sample: Sample) -> None:
    # Not `remove`: it compares samples, and tensors do not compare to one truth.
    lane.waiting = [s for s in lane.waiting if s is not sample]


def _require_room_to_wait(budget: PackBudget) -> None:
    if budget.max_buffer < 1:
        raise ValueError(
            f"--max_buffer_size {budget.max_buffer} must be at least 1: with none waiting, what does not fit would be lost "
            "(that is --packer upstream_compat)"
        )


# ------------------------------------------------------------------------------------------- as published


def upstream_compat(lane: Lane) -> list[Sample]:
    """The next pack as the published packer makes it.

    A sample that does not fit waits if it was just drawn and there is room to wait; else it closes the pack and is lost. So is a
    sample of a mandatory group that is exactly as long as the limit per sample.

    Source: upstream Bagel 056b5fd, measured in the golden case `batch_policy.json`.
    """
    pack, budget = Filling(lane), lane.budget
    while True:
        if pack.tokens == 0:
            for group in lane.groups:
                if group.is_mandatory:
                    pack.take(_shorter_than_the_limit(lane, group))
        waited = bool(lane.waiting) and pack.tokens < budget.prefer_buffer_before
        sample = lane.waiting.pop(0) if waited else lane.read_next(lane.draw_group())
        if sample is None:
            continue
        if pack.tokens + planned_tokens(sample, lane.layout) <= budget.maximum:
            pack.take(sample)
            if pack.tokens >= budget.expected:
                return pack.samples
        elif not waited and len(lane.waiting) < budget.max_buffer:
            lane.waiting.append(sample)
        else:
            lane.lose(sample)
            return pack.samples


def _shorter_than_the_limit(lane: Lane, group: Group) -> Sample:
    limit = lane.budget.per_sample
    for _ in range(LOST_IN_A_ROW):
        sample = lane.read_next(group)
        if sample is not None and planned_tokens(sample, lane.layout) < limit:
            return sample
        if sample is not None:
            lane.lose(sample)
    raise ValueError(
        f"group {group.name!r}: {LOST_IN_A_ROW} records in a row could not be used; --packer upstream_compat takes a sample of a "
        f"mandatory group only if it is shorter than --max_num_tokens_per_sample {limit}: raise the limit by one"
    )


def _require_samples_that_fit(budget: PackBudget) -> None:
    if budget.per_sample > budget.maximum:
        raise ValueError(
            f"--max_num_tokens_per_sample {budget.per_sample} is above --max_num_tokens {budget.maximum}: with --packer "
            f"upstream_compat, samples between the two would give empty packs; lower the first to {budget.maximum}"
        )


# ---------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True, slots=True)
class Policy:
    """A row of `POLICIES`.

    Attributes:
        next_samples: chooses the samples of the lane's next pack, in order.
        length: tokens of a sample that count against the limit per sample.
        require: raises ValueError for a budget that the policy cannot keep to.
    """

    next_samples: Callable[[Lane], list[Sample]]
    length: Callable[[Sample, LayoutSpec], int]
    require: Callable[[PackBudget], None]


POLICIES: Mapping[str, Policy] = {
    "conserving": Policy(conserving, num_tokens, _require_room_to_wait),
    # The published packer judges a sample before it leaves conditions out.
    "upstream_compat": Policy(upstream_compat, planned_tokens, _require_samples_that_fit),
}
"""Value of --packer -> the policy."""
