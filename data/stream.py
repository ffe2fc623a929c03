"""Groups -> packs, one lane at a time: draw a group, read its next record, let the policy say which samples share a pack.

`LaneStream(plan, cursor).next_pack()` gives a `PackedBatch` whose `cursor` is the lane's whole state after
it: a stream built from that cursor goes on with the same bytes. A sample that was read is in a pack, waiting, rejected, or, under
a policy that loses samples (`data/policy.py`), counted as lost.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

from data.dataset_base import DropoutSpec, SkipSample, finish_sample
from data.layout import LayoutSpec
from data.mixture import Group
from data.order import choose, lane_position, record_index, sample_rng, uniform
from data.packing import pack
from data.policy import POLICIES, PackBudget
from data.tokens import SpecialTokens
from data.types import LaneCursor, Origin, PackedBatch, Reject, Sample

RECORD_ERRORS = (KeyError, IndexError, TypeError, ValueError, AttributeError, OSError)
"""What a dataset class raises on a record of another shape than it expects."""

REJECTS_IN_A_ROW = 1000
"""A lane gives up on a group after so many, whatever fraction the user allows: nothing may loop forever."""

REJECTS_SHOWN = 3


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


def make_sample(plan: StreamPlan, group: Group, lane: int, position: int) -> Sample | Reject:
    """The finished sample at a position of a group's order: the same on every call."""
    index = record_index(position, len(group.source), plan.seed, group.name)
    where = f"{group.name} record {index}"
    try:
        record = group.source.read(index)
        where = record.where
        sample = group.dataset.to_sample(record, sample_rng(plan.seed, group.name, position, "sample"))
        origin = Origin(group=group.name, lane=lane, position=position, where=where)
        sample = replace(sample, origin=origin, task=sample.task or group.name)
        finish_rng = sample_rng(plan.seed, group.name, position, "finish")
        sample = finish_sample(sample, finish_rng, plan.dropout, plan.timestep_shift)
    except SkipSample as e:
        reason, message, where = e.reason, e.message, e.where or where
    except RECORD_ERRORS as e:
        reason, message = "broken_record", f"{type(e).__name__}: {e} (in {type(group.dataset).__name__})"
    else:
        tokens = _tokens(sample, plan)
        if tokens <= plan.budget.longest:
            return sample
        reason = "too_long"
        message = f"{tokens} tokens, the budget is {plan.budget.longest}; raise --max_num_tokens_per_sample"
    message = " ".join(message.split())
    if where not in message:
        message = f"{where}: {message}"
    return Reject(group=group.name, position=position, where=where, reason=reason, message=message)


def _tokens(sample: Sample, plan: StreamPlan) -> int:
    try:
        return POLICIES[plan.budget.policy].length(sample, plan.layout)
    except ValueError as e:  # the transform does not suit the model: no fault of the record, so no reject
        raise ValueError(f"group {sample.origin.group!r}, {sample.origin.where}: {e}") from e


class LaneStream:
    """The endless packs of one lane.

    Args:
        plan: what all lanes share.
        cursor: where to go on.

    Raises:
        ValueError: if the cursor names a group that the mixture does not have.
    """

    def __init__(self, plan: StreamPlan, cursor: LaneCursor):
        self.plan = plan
        self.lane = cursor.lane
        self.groups, self.layout, self.budget = plan.groups, plan.layout, plan.budget
        self._groups = {g.name: g for g in plan.groups}
        self._cumulative = list(accumulate(g.weight for g in plan.groups))
        self._require_groups(cursor)
        self._packs, self._draws = cursor.packs, cursor.draws
        self._read = Counter(cursor.read)
        self._rejected = {g: Counter(r) for g, r in cursor.rejected.items()}
        self._lost = Counter(cursor.lost)
        self.waiting = [self._again(*w) for w in cursor.waiting]
        self._new_rejects: list[Reject] = []
        self._in_a_row: Counter[str] = Counter()
        self._shown: dict[str, list[str]] = {}

    def next_pack(self) -> PackedBatch:
        """The lane's next pack.

        Raises:
            ValueError: if too many records of a group cannot be used.
        """
        samples, rejects = self.next_samples(), self.take_rejects()
        return pack(samples, self.plan.layout, self.plan.special, cursor=self.cursor, rejects=rejects)

    def next_samples(self) -> list[Sample]:
        """The samples of the next pack, in order."""
        samples = POLICIES[self.budget.policy].next_samples(self)
        self._packs += 1
        return samples

    def take_rejects(self) -> tuple[Reject, ...]:
        """What was rejected since this was last asked for."""
        rejects, self._new_rejects = tuple(self._new_rejects), []
        return rejects

    @property
    def cursor(self) -> LaneCursor:
        """The lane's state after the last pack."""
        return LaneCursor(
            lane=self.lane,
            packs=self._packs,
            draws=self._draws,
            read=dict(self._read),
            rejected={g: dict(r) for g, r in self._rejected.items()},
            lost=dict(self._lost),
            waiting=tuple((s.origin.group, s.origin.position) for s in self.waiting),
        )

    def next_uniform(self) -> float:
        """The lane's next random number, in [0, 1)."""
        number = uniform(self.plan.seed, self.lane, self._draws)
        self._draws += 1
        return number

    def draw_group(self) -> Group:
        """A group by the weights."""
        return self.groups[choose(self._cumulative, self.next_uniform())]

    def read_next(self, group: Group) -> Sample | None:
        """The group's next sample; None if the record was rejected.

        Raises:
            ValueError: if too many records of the group cannot be used.
        """
        position = lane_position(self.lane, self.plan.num_lanes, self._read[group.name])
        made = make_sample(self.plan, group, self.lane, position)
        self._read[group.name] += 1
        if isinstance(made, Reject):
            self._reject(made)
            return None
        self._in_a_row[group.name] = 0
        return made

    def lose(self, sample: Sample) -> None:
        """Count a sample that will be in no pack."""
        self._lost[sample.origin.group] += 1

    def _reject(self, reject: Reject) -> None:
        group = reject.group
        self._new_rejects.append(reject)
        self._rejected.setdefault(group, Counter())[reject.reason] += 1
        self._in_a_row[group] += 1
        shown = self._shown.setdefault(group, [])
        if len(shown) < REJECTS_SHOWN:
            shown.append(reject.message)
        count = self._rejected[group].total()
        records = len(self._groups[group].source)
        # Judged by what all lanes together have read about now: a bad record comes back once per
        # epoch, not per lane.
        limit = int(self.plan.max_reject_fraction * max(records, self._read[group] * self.plan.num_lanes))
        if count > limit or self._in_a_row[group] >= REJECTS_IN_A_ROW:
            raise ValueError(reject_message(group, count, limit, shown))

    def _again(self, group: str, position: int) -> Sample:
        made = make_sample(self.plan, self._groups[group], self.lane, position)
        if isinstance(made, Reject):
            raise ValueError(
                f"group {group!r}: a sample that waited at the checkpoint can no longer be used: {made.message}"
                "; restore the data and options of the run, or start a new one"
            )
        return made

    def _require_groups(self, cursor: LaneCursor) -> None:
        known: Mapping[str, Group] = self._groups
        for group in [*cursor.read, *(g for g, _ in cursor.waiting)]:
            if group not in known:
                raise ValueError(
                    f"the checkpoint was made with a group {group!r}, the mixture has {', '.join(known)}; "
                    "keep it (with weight 0 if it is not wanted any more) or start a new run"
                )


def reject_message(group: str, count: int, limit: int, first: list[str]) -> str:
    """Why a run stops over bad records, in one line."""
    records = f"{count} records" if count != 1 else "1 record"
    return (
        f"group {group!r}: {records} could not be used, the limit is {limit}; first: {' | '.join(first)}; "
        "repair or remove them, or raise --max_reject_fraction"
    )
