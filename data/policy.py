"""Which samples share a pack. A policy sees one lane: what waits there, and what it may read next, by their sizes.

`conserving` packs every sample that was read, sooner or later, and fills packs by looking a few samples ahead.
`upstream_compat` chooses as the published packer does, sample by sample, and loses what that loses. All that a policy keeps
between two packs is the lane's waiting samples, so either goes on from a `LaneCursor`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from data.knapsack import Choice, choose_subset
from data.mixture import Group
from data.types import Ticket

LOST_IN_A_ROW = 1000
"""`upstream_compat` gives up on a mandatory group after so many: nothing may loop forever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackBudget:
    """When a pack is full.

    Attributes:
        expected: a pack has at least as many tokens, if so many can be had.
        maximum: no pack has more (under `upstream_compat`, mandatory samples may exceed it).
        per_sample: a longer sample is rejected.
        max_pairs: no pack has more (query, key) pairs for attention to compute, no sample either; 0: no such bound.
        max_buffer: how many samples may wait; `conserving` then emits a pack short of `expected`. Also the most packs that any
            sample waits (half as many more beside mandatory groups).
        prefer_buffer_before: `upstream_compat` takes waiting samples first while a pack has fewer tokens than this.
        policy: row of `POLICIES`.
    """

    expected: int
    maximum: int
    per_sample: int
    max_pairs: int = 0
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
        if self.max_pairs < 0:
            raise ValueError(f"--max_attention_pairs {self.max_pairs} must be at least 0 (0: no bound)")
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
        budget: when a pack is full.
        waiting: samples read and not yet packed, oldest first; the policy's to change.
        packs: that the lane has made.
    """

    groups: tuple[Group, ...]
    budget: PackBudget
    waiting: list[Ticket]
    packs: int

    @property
    def pairs_per_token(self) -> float:
        """Mean attention of the samples read of late."""

    def has_more(self, group: Group) -> bool:
        """Whether the lane may read on in the group."""

    def draw_group(self) -> Group | None:
        """A group by the weights: the lane's next random choice; None if there is nothing left to read."""

    def read_next(self, group: Group) -> Ticket | None:
        """The group's next sample; None if the record was rejected."""

    def lose(self, sample: Ticket) -> None:
        """Count a sample that will be in no pack."""


class Filling:
    """The samples of a pack while it is being filled."""

    def __init__(self, budget: PackBudget) -> None:
        self._maximum = budget.maximum
        self._max_pairs = budget.max_pairs or math.inf
        self.samples: list[Ticket] = []
        self.groups: set[str] = set()
        self.tokens = 0
        self.pairs = 0

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self._maximum - self.tokens

    @property
    def pairs_left(self) -> float:
        """Pairs that attention may still compute."""
        return self._max_pairs - self.pairs

    def offer(self, sample: Ticket) -> bool:
        """Take the sample if it fits."""
        fits = sample.tokens <= self.room and sample.pairs <= self.pairs_left
        if fits:
            self.take(sample)
        return fits

    def take(self, sample: Ticket) -> None:
        """Take the sample, whether it fits or not."""
        self.samples.append(sample)
        self.groups.add(sample.group)
        self.tokens += sample.tokens
        self.pairs += sample.pairs


# ------------------------------------------------------------------------------------------------- conserving

FULL = 0.99
"""Share of its tokens at which a pack is full enough to look at its attention instead of reading on."""

BALANCED = 0.03
"""How far, as a share of what a pack costs, its attention may be from the average without another look around."""

LOOK_AHEAD = 16
"""Samples that may wait for the sake of balance alone."""

PAIRS_PER_TOKEN_COST = 12_000
"""Pairs whose attention takes as long as the rest of a token's way through a 7B model: a sample of n tokens is reckoned to cost
n + n^2 / 20,000, and about 0.58 n^2 of its pairs are visible."""


def conserving(lane: Lane) -> list[Ticket]:
    """The next pack, losing nothing: the fullest that what waits and what comes next can make, its attention near the average.

    The oldest that waits is in it, if it fits beside the mandatory samples or has waited for long. So no sample waits for more
    packs than samples may wait, or half as many more in a mixture with mandatory groups.
    """
    pack = Filling(lane.budget)
    is_urgent = bool(lane.waiting) and lane.packs - lane.waiting[0].since >= lane.budget.max_buffer // 2
    if is_urgent:  # alone it fits, whatever its size
        pack.take(lane.waiting.pop(0))
    for group in lane.groups:
        if group.is_mandatory and group.name not in pack.groups:
            _offer_mandatory(lane, group, pack)
    if not is_urgent and lane.waiting and pack.offer(lane.waiting[0]):
        lane.waiting.pop(0)
    chosen = _best(lane, pack)
    while not _is_good(lane, pack, chosen) and _read_on(lane, pack):
        chosen = _best(lane, pack)
    for place in chosen.taken:
        pack.take(lane.waiting[place])
    taken = set(chosen.taken)
    lane.waiting = [s for place, s in enumerate(lane.waiting) if place not in taken]
    return pack.samples


def _offer_mandatory(lane: Lane, group: Group, pack: Filling) -> None:
    waiting = [s for s in lane.waiting if s.group == group.name]
    taken = next((s for s in waiting if pack.offer(s)), None)
    if taken is not None:
        lane.waiting.remove(taken)
    while not waiting and lane.has_more(group):
        sample = lane.read_next(group)
        if sample is not None:
            if not pack.offer(sample):
                lane.waiting.append(sample)
            return


def _read_on(lane: Lane, pack: Filling) -> bool:
    """Read a sample, and on as long as all that wait fit into the pack without filling it; False if there is nothing more."""
    tokens = pack.tokens + sum(s.tokens for s in lane.waiting)
    pairs = sum(s.pairs for s in lane.waiting)
    has_read = False
    while not has_read or (tokens < _full(lane.budget) and pairs <= pack.pairs_left):
        drawn = lane.draw_group()
        if drawn is None:
            return has_read
        sample = lane.read_next(drawn)
        if sample is not None:
            lane.waiting.append(sample)
            tokens, pairs, has_read = tokens + sample.tokens, pairs + sample.pairs, True
    return True


def _best(lane: Lane, pack: Filling) -> Choice:
    """What of the waiting samples goes into the rest of the pack."""
    average = lane.pairs_per_token
    candidates = [i for i, s in enumerate(lane.waiting) if s.pairs <= pack.pairs_left]
    while True:
        chosen = choose_subset(
            [lane.waiting[i] for i in candidates],
            room=pack.room,
            enough=_full(lane.budget) - pack.tokens,
            wanted_pairs=average * lane.budget.maximum - pack.pairs,
            pairs_per_token=average,
        )
        taken = tuple(candidates[i] for i in chosen.taken)
        if chosen.pairs <= pack.pairs_left:
            return Choice(taken, chosen.tokens, chosen.pairs)
        candidates.remove(max(taken, key=lambda i: lane.waiting[i].pairs))


def _is_good(lane: Lane, pack: Filling, chosen: Choice) -> bool:
    """Whether to leave it at this choice, or to read another sample first."""
    left = len(lane.waiting) - len(chosen.taken)
    if left >= lane.budget.max_buffer:
        return True
    tokens = pack.tokens + chosen.tokens
    if tokens < _full(lane.budget):
        return False
    if left >= LOOK_AHEAD:
        return True
    average = lane.pairs_per_token * tokens
    cost = tokens + average / PAIRS_PER_TOKEN_COST
    return abs(pack.pairs + chosen.pairs - average) / PAIRS_PER_TOKEN_COST <= BALANCED * cost


def _full(budget: PackBudget) -> int:
    return max(budget.expected, math.ceil(FULL * budget.maximum))


def _require_room_to_wait(budget: PackBudget) -> None:
    if budget.max_buffer < 1:
        raise ValueError(
            f"--max_buffer_size {budget.max_buffer} must be at least 1: with none waiting, what does not fit would be lost "
            "(that is --packer upstream_compat)"
        )


# ------------------------------------------------------------------------------------------- as published


def upstream_compat(lane: Lane) -> list[Ticket]:
    """The next pack as the published packer makes it.

    A sample that does not fit waits if it was just drawn and there is room to wait; else it closes the pack and is lost. So is a
    sample of a mandatory group that is exactly as long as the limit per sample.

    Source: upstream Bagel 056b5fd, measured in the golden case `batch_policy.json`.
    """
    pack, budget = Filling(lane.budget), lane.budget
    while True:
        if pack.tokens == 0:
            for group in lane.groups:
                if group.is_mandatory and lane.has_more(group):
                    pack.take(_shorter_than_the_limit(lane, group))
        waited = bool(lane.waiting) and pack.tokens < budget.prefer_buffer_before
        drawn = None if waited else lane.draw_group()
        if drawn is not None:
            sample = lane.read_next(drawn)
        elif lane.waiting:
            waited, sample = True, lane.waiting.pop(0)
        else:
            return (
                pack.samples
            )  # the published stream has no end, so it does not say what should be done at one
        if sample is None:
            continue
        if sample.planned <= pack.room:
            pack.take(sample)
            if pack.tokens >= budget.expected:
                return pack.samples
        elif not waited and len(lane.waiting) < budget.max_buffer:
            lane.waiting.append(sample)
        else:
            lane.lose(sample)
            return pack.samples


def _shorter_than_the_limit(lane: Lane, group: Group) -> Ticket:
    limit = lane.budget.per_sample
    for _ in range(LOST_IN_A_ROW):
        sample = lane.read_next(group)
        if sample is not None and sample.planned < limit:
            return sample
        if sample is not None:
            lane.lose(sample)
    raise ValueError(
        f"group {group.name!r}: {LOST_IN_A_ROW} records in a row could not be used; --packer upstream_compat takes a sample of a "
        f"mandatory group only if it is shorter than --max_num_tokens_per_sample {limit}: raise the limit by one"
    )


def _require_as_published(budget: PackBudget) -> None:
    if budget.per_sample > budget.maximum:
        raise ValueError(
            f"--max_num_tokens_per_sample {budget.per_sample} is above --max_num_tokens {budget.maximum}: with --packer "
            f"upstream_compat, samples between the two would give empty packs; lower the first to {budget.maximum}"
        )
    if budget.max_pairs:
        raise ValueError(
            f"--max_attention_pairs {budget.max_pairs}: the published packer knows no such bound; leave it out, or take --packer "
            "conserving"
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

    next_samples: Callable[[Lane], list[Ticket]]
    length: Callable[[Ticket], int]
    require: Callable[[PackBudget], None]


POLICIES: Mapping[str, Policy] = {
    "conserving": Policy(conserving, lambda sample: sample.tokens, _require_room_to_wait),
    # The published packer judges a sample before it leaves conditions out.
    "upstream_compat": Policy(upstream_compat, lambda sample: sample.planned, _require_as_published),
}
"""Value of --packer -> the policy."""
