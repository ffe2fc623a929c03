"""Groups -> packs, one lane at a time: draw a group, read its next record, let the policy say which samples share a pack.

`LaneStream(plan, cursor).next_pack()` gives a `PackedBatch` whose `cursor` is the lane's whole state after
it: a stream built from that cursor goes on with the same bytes. A sample that was read is in a pack, waiting, rejected, or, under
a policy that loses samples (`data/policy.py`), counted as lost. Policies see sizes only, and sizes are all that a cursor keeps of
what waits: a lane goes on without having read anything again, and makes a sample again when its pack is made.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

from data.dataset_base import RECORD_ERRORS, DropoutSpec, SkipSample, finish_sample
from data.doing import at_record
from data.layout import LayoutSpec, loss_tokens, planned_tokens, splits_of, visible_pairs
from data.mixture import Group
from data.order import choose, lane_position, record_index, sample_rng, share_of_lane, uniform
from data.packing import content_hash, pack
from data.policy import POLICIES, PackBudget
from data.sources.record import SourceLost, TooManyRejects, printable
from data.tokens import SpecialTokens, Tokenizer
from data.types import Amount, LaneCursor, Origin, PackedBatch, Reject, Sample, Ticket

REJECTS_IN_A_ROW = 1000
"""A lane gives up on a group after so many, whatever fraction the user allows: nothing may loop forever."""

REJECTS_SHOWN = 3

KEPT_BYTES = 128 << 20
"""Pictures of waiting samples that a lane holds in memory; those of further ones are decoded again when they are packed."""

MEMORY = 1 - 1 / 512
"""What an earlier sample counts in the lane's averages, compared with the one after it."""


class StreamFlags(Protocol):
    """The flags that decide which packs come: the trainer's `DataArgs`, or what the tools parsed under the same names."""

    @property
    def expected_num_tokens(self) -> int: ...
    @property
    def max_num_tokens(self) -> int: ...
    @property
    def max_num_tokens_per_sample(self) -> int: ...
    @property
    def max_attention_pairs(self) -> int: ...
    @property
    def max_buffer_size(self) -> int: ...
    @property
    def prefer_buffer_before(self) -> int: ...
    @property
    def packer(self) -> str: ...
    @property
    def data_seed(self) -> int: ...
    @property
    def num_lanes(self) -> int: ...
    @property
    def text_cond_dropout_prob(self) -> float: ...
    @property
    def vit_cond_dropout_prob(self) -> float: ...
    @property
    def vae_cond_dropout_prob(self) -> float: ...
    @property
    def timestep_shift(self) -> float: ...
    @property
    def max_reject_fraction(self) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPlan:
    """Everything a lane's packs depend on besides its cursor."""

    groups: tuple[Group, ...]
    layout: LayoutSpec
    special: SpecialTokens
    budget: PackBudget
    seed: int
    num_lanes: int = 48
    dropout: DropoutSpec = DropoutSpec()
    timestep_shift: float = 1.0
    max_reject_fraction: float = 0.001

    def __post_init__(self) -> None:
        if not 0 <= self.max_reject_fraction <= 1:
            raise ValueError(f"--max_reject_fraction {self.max_reject_fraction} must be from 0 to 1")

    @staticmethod
    def from_flags(
        flags: StreamFlags, groups: tuple[Group, ...], layout: LayoutSpec, special: SpecialTokens
    ) -> "StreamPlan":
        """The plan that the flags describe.

        Raises:
            ValueError: if they contradict each other.
        """
        return StreamPlan(
            groups=groups,
            layout=layout,
            special=special,
            budget=PackBudget(
                expected=flags.expected_num_tokens,
                maximum=flags.max_num_tokens,
                per_sample=flags.max_num_tokens_per_sample,
                max_buffer=flags.max_buffer_size,
                prefer_buffer_before=flags.prefer_buffer_before,
                max_pairs=flags.max_attention_pairs,
                policy=flags.packer,
            ),
            seed=flags.data_seed,
            num_lanes=flags.num_lanes,
            dropout=DropoutSpec(
                text=flags.text_cond_dropout_prob,
                vit=flags.vit_cond_dropout_prob,
                vae=flags.vae_cond_dropout_prob,
            ),
            timestep_shift=flags.timestep_shift,
            max_reject_fraction=flags.max_reject_fraction,
        )


def make_sample(plan: StreamPlan, group: Group, lane: int, position: int) -> Sample | Reject:
    """The finished sample at a position of a group's order: the same on every call."""
    made = _make(plan, group, lane, position)
    return made if isinstance(made, Reject) else made[0]


def _make(
    plan: StreamPlan, group: Group, lane: int, position: int, since: int = 0
) -> tuple[Sample, Ticket] | Reject:
    index = record_index(position, len(group.source), plan.seed, group.name)
    where = f"{group.name} record {index}"
    amount = Amount(samples=1)
    at_record(where)
    try:
        record = group.source.read(index)
        where = record.where
        at_record(where)
        _require_short(group.dataset.certain_texts(record), group.dataset.tokenizer, plan.budget)
        sample = group.dataset.sample(record, sample_rng(plan.seed, group.name, position, "sample"))
        origin = Origin(group=group.name, lane=lane, position=position, where=where)
        sample = replace(sample, origin=origin, task=sample.task or group.name)
        finish_rng = sample_rng(plan.seed, group.name, position, "finish")
        sample = finish_sample(sample, finish_rng, plan.dropout, plan.timestep_shift)
    except SkipSample as e:
        reason, message, where = e.reason, e.message, e.where or where
    except SourceLost:
        raise  # no fault of the record
    except RECORD_ERRORS as e:
        reason, message = "broken_record", f"{type(e).__name__}: {e} (in {type(group.dataset).__name__})"
    else:
        ticket = _ticket(sample, plan.layout, since)
        refused = _refused(ticket, plan.budget)
        if refused is None:
            return sample, ticket
        reason, message = refused
        amount = ticket.amount
    message = printable(" ".join(message.split()))
    if where not in message:
        message = f"{where}: {message}"
    return Reject(
        group=group.name, position=position, where=where, reason=reason, message=message, amount=amount
    )


def _require_short(texts: Sequence[str], tokenizer: Tokenizer, budget: PackBudget) -> None:
    """Refuse a sample whose texts alone are too long, before its pictures are read.

    Raises:
        SkipSample: "too_long".
    """
    # A token is a byte at least: nearly all texts need not be looked at.
    if sum(len(text.encode()) + 2 for text in texts) <= budget.longest:
        return
    tokens = sum(len(tokenizer.encode(text)) + 2 for text in texts)
    if tokens > budget.longest:
        message = f"{tokens} tokens in its answers alone, the budget is {budget.longest}; raise --max_num_tokens_per_sample"
        raise SkipSample("too_long", message)


def _ticket(sample: Sample, layout: LayoutSpec, since: int) -> Ticket:
    try:
        splits = splits_of(sample, layout)
        tokens = sum(splits.lens)
        return Ticket(
            group=sample.origin.group,
            position=sample.origin.position,
            since=since,
            tokens=tokens,
            planned=planned_tokens(sample, layout),
            loss_tokens=loss_tokens(sample, layout),
            pairs=visible_pairs([tokens], splits.lens, splits.modes, splits.branches),
        )
    except ValueError as e:  # the transform does not suit the model: no fault of the record, so no reject
        raise ValueError(f"group {sample.origin.group!r}, {sample.origin.where}: {e}") from e


def _refused(sample: Ticket, budget: PackBudget) -> tuple[str, str] | None:
    """Reason and message if no pack can hold the sample."""
    tokens = POLICIES[budget.policy].length(sample)
    if tokens > budget.longest:
        return (
            "too_long",
            f"{tokens} tokens, the budget is {budget.longest}; raise --max_num_tokens_per_sample",
        )
    if budget.max_pairs and sample.pairs > budget.max_pairs:
        message = f"attention over {sample.pairs} pairs, the bound is {budget.max_pairs}; raise --max_attention_pairs"
        return "too_costly", message
    return None


class LaneStream:
    """The packs of one lane.

    Args:
        plan: what all lanes share.
        cursor: where to go on.

    Raises:
        ValueError: if the cursor names a group that the mixture does not have, or no pack can hold a sample that waits.
    """

    def __init__(self, plan: StreamPlan, cursor: LaneCursor):
        self.plan = plan
        self.lane = cursor.lane
        self.groups, self.budget = plan.groups, plan.budget
        self._groups = {g.name: g for g in plan.groups}
        self._require_groups(cursor)
        self._require_fitting(cursor)
        self.packs, self._draws = cursor.packs, cursor.draws
        self._read = dict(cursor.read)
        self._rejected = {g: dict(r) for g, r in cursor.rejected.items()}
        self._lost = dict(cursor.lost)
        self._recent_tokens, self._recent_pairs = cursor.recent
        self.waiting = list(cursor.waiting)
        self._kept: dict[tuple[str, int], Sample] = {}
        self._kept_bytes = 0
        self._new_rejects: list[Reject] = []
        self._in_a_row: Counter[str] = Counter()
        self._shown: dict[str, list[str]] = {}

    def next_pack(self) -> PackedBatch:
        """The lane's next pack; of a lane that has ended, an empty one.

        Raises:
            TooManyRejects: if too many records of a group cannot be used.
        """
        samples, rejects = self.next_samples(), self.take_rejects()
        batch = pack(samples, self.plan.layout, self.plan.special, cursor=self.cursor, rejects=rejects)
        return replace(batch, hash=content_hash(batch))

    def next_samples(self) -> list[Sample]:
        """The samples of the next pack, in order."""
        policy = POLICIES[self.budget.policy]
        chosen = policy.next_samples(self)
        while (made := [self._made(ticket) for ticket in chosen]) != chosen:
            # Options have changed since these were read: they are as the new ones make them, and are chosen among anew.
            self.waiting = [*made, *self.waiting]
            chosen = policy.next_samples(self)
        self.packs += 1
        return [self._drop(ticket) for ticket in chosen]

    def take_rejects(self) -> tuple[Reject, ...]:
        """What was rejected since this was last asked for."""
        rejects, self._new_rejects = tuple(self._new_rejects), []
        return rejects

    @property
    def cursor(self) -> LaneCursor:
        """The lane's state after the last pack."""
        return LaneCursor(
            lane=self.lane,
            packs=self.packs,
            draws=self._draws,
            read=dict(self._read),
            rejected={g: dict(r) for g, r in self._rejected.items()},
            lost=dict(self._lost),
            waiting=tuple(self.waiting),
            recent=(self._recent_tokens, self._recent_pairs),
        )

    @property
    def pairs_per_token(self) -> float:
        """Mean attention of the samples read of late."""
        return self._recent_pairs / self._recent_tokens if self._recent_tokens else 0.0

    @property
    def has_ended(self) -> bool:
        """Whether all there was to read is packed."""
        return not self.waiting and not self._open_groups()

    def has_more(self, group: Group) -> bool:
        """Whether the lane may read on in the group."""
        return bool(self._open_groups()) and not self._is_exhausted(group)

    def next_uniform(self) -> float:
        """The lane's next random number, in [0, 1)."""
        number = uniform(self.plan.seed, self.lane, self._draws)
        self._draws += 1
        return number

    def draw_group(self) -> Group | None:
        """A group by the weights, of those that have records left; None if the lane reads nothing more."""
        groups = self._open_groups()
        if not groups:
            return None
        return groups[choose(list(accumulate(g.weight for g in groups)), self.next_uniform())]

    def read_next(self, group: Group) -> Ticket | None:
        """The group's next sample; None if the record was rejected.

        Raises:
            TooManyRejects: if too many records of the group cannot be used.
        """
        read = self._read.get(group.name, Amount())
        position = lane_position(self.lane, self.plan.num_lanes, read.samples)
        made = _make(self.plan, group, self.lane, position, since=self.packs)
        self._read[group.name] = read + (made.amount if isinstance(made, Reject) else made[1].amount)
        if isinstance(made, Reject):
            self._reject(made)
            return None
        sample, ticket = made
        self._in_a_row[group.name] = 0
        self._recent_tokens = self._recent_tokens * MEMORY + ticket.tokens
        self._recent_pairs = self._recent_pairs * MEMORY + ticket.pairs
        size = _bytes_of(sample)
        if self._kept_bytes + size <= KEPT_BYTES:
            self._kept[group.name, position] = sample
            self._kept_bytes += size
        return ticket

    def lose(self, sample: Ticket) -> None:
        """Count a sample that will be in no pack."""
        self._lost[sample.group] = self._lost.get(sample.group, Amount()) + sample.amount
        if (sample.group, sample.position) in self._kept:
            self._drop(sample)

    def _open_groups(self) -> list[Group]:
        """The groups that may be drawn."""
        if any(g.when_exhausted == "stop" and self._is_exhausted(g) for g in self.groups):
            return []
        return [g for g in self.groups if g.weight and not self._is_exhausted(g)]

    def _is_exhausted(self, group: Group) -> bool:
        if group.epochs is None:
            return False
        share = share_of_lane(self.lane, self.plan.num_lanes, group.epochs * len(group.source))
        return self._read.get(group.name, Amount()).samples >= share

    def _made(self, ticket: Ticket) -> Ticket:
        """The ticket of a sample that is in memory now, made again if it was not; what it takes is counted as it is now."""
        if (ticket.group, ticket.position) in self._kept:
            return ticket
        made = _make(self.plan, self._groups[ticket.group], self.lane, ticket.position, ticket.since)
        if isinstance(made, Reject):
            raise ValueError(
                f"group {ticket.group!r}: a sample that waited for its pack can no longer be used: {made.message}"
                "; restore the data and options of the run, or start a new one"
            )
        sample, now = made
        self._kept[now.group, now.position] = sample
        self._kept_bytes += _bytes_of(sample)
        self._read[now.group] += now.amount - ticket.amount
        return now

    def _drop(self, ticket: Ticket) -> Sample:
        sample = self._kept.pop((ticket.group, ticket.position))
        self._kept_bytes -= _bytes_of(sample)
        return sample

    def _reject(self, reject: Reject) -> None:
        group = reject.group
        self._new_rejects.append(reject)
        reasons = self._rejected.setdefault(group, {})
        reasons[reject.reason] = reasons.get(reject.reason, Amount()) + reject.amount
        self._in_a_row[group] += 1
        shown = self._shown.setdefault(group, [])
        if len(shown) < REJECTS_SHOWN:
            shown.append(reject.message)
        count = sum(amount.samples for amount in reasons.values())
        records = len(self._groups[group].source)
        # Judged by what all lanes together have read about now: a bad record comes back once per
        # epoch, not per lane.
        limit = int(
            self.plan.max_reject_fraction * max(records, self._read[group].samples * self.plan.num_lanes)
        )
        if count > limit or self._in_a_row[group] >= REJECTS_IN_A_ROW:
            raise TooManyRejects(reject_message(group, count, limit, shown))

    def _require_groups(self, cursor: LaneCursor) -> None:
        known: Mapping[str, Group] = self._groups
        for group in [*cursor.read, *(w.group for w in cursor.waiting)]:
            if group not in known:
                raise ValueError(
                    f"the checkpoint was made with a group {group!r}, the mixture has {', '.join(known)}; "
                    "keep it (with weight 0 if it is not wanted any more) or start a new run"
                )

    def _require_fitting(self, cursor: LaneCursor) -> None:
        for waiting in cursor.waiting:
            refused = _refused(waiting, self.budget)
            if refused is not None:
                raise ValueError(
                    f"group {waiting.group!r}: a sample that waits since before the run was resumed fits no pack any more: "
                    f"{refused[1]}, or restore the options of the run"
                )


def _bytes_of(sample: Sample) -> int:
    return sum(s.pixels.nbytes for s in sample.segments) + sum(r.mask.nbytes for r in sample.regions)


def reject_message(group: str, count: int, limit: int, first: list[str]) -> str:
    """Why a run stops over bad records, in one line."""
    records = f"{count} records" if count != 1 else "1 record"
    return (
        f"group {group!r}: {records} could not be used, the limit is {limit}; first: {' | '.join(first)}; "
        "repair or remove them, or raise --max_reject_fraction"
    )
