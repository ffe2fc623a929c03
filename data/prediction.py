"""How full the packs of a run will be and how many steps an epoch takes, from the outlines of scanned samples.

The trainer's own stream makes the packs (`data/stream.py`: order, choice of groups, dropout, policy); only the records are
replaced by samples without contents, so nothing is decoded.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from data.dataset_base import SkipSample, TaskDataset
from data.layout import num_tokens
from data.mixture import Group
from data.scan import Outline, Scan, from_outline
from data.sources import Record
from data.stream import LaneStream, StreamPlan
from data.types import LaneCursor, Region, Sample

PACKS, LANES, SAMPLES = 128, 8, 20_000
"""What is simulated: so many packs of so many lanes, or fewer when so many samples are in packs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Of the packs of a run.

    Attributes:
        packs: how many were made for it.
        efficiency: tokens in packs over `--max_num_tokens`.
        emptiest: the same of the emptiest pack.
        samples_per_pack: of all groups.
        waiting: samples per lane that wait for a pack, at the end.
        steps_per_epoch: until as many records are read as there are in the groups drawn from.
        share: by group, of the tokens in packs.
        steps_per_pass: by group, until it has been read once; groups that were never drawn are left out.
    """

    packs: int
    efficiency: float
    emptiest: float
    samples_per_pack: float
    waiting: float
    steps_per_epoch: float
    share: Mapping[str, float]
    steps_per_pass: Mapping[str, float]


def predict(plan: StreamPlan, scans: Mapping[str, Scan], packs_per_step: int) -> Prediction:
    """Simulate packs.

    Args:
        plan: the run's; its groups say weights and sizes.
        scans: by group.
        packs_per_step: ranks times accumulation.

    Raises:
        ValueError: if nothing can be packed.
    """
    outlined = _all_outlined(plan, scans)
    lanes = _lanes(plan, outlined)
    filled: list[int] = []
    tokens: Counter[str] = Counter()
    samples: Counter[str] = Counter()
    for packed in _packs(lanes):
        lengths = [num_tokens(sample, plan.layout) for sample in packed]
        filled.append(sum(lengths))
        for sample, length in zip(packed, lengths, strict=True):
            tokens[sample.origin.group] += length
            samples[sample.origin.group] += 1
    read = Counter[str]()
    for lane in lanes:
        read.update({group: amount.samples for group, amount in lane.cursor.read.items()})
    steps = len(filled) / packs_per_step
    drawn = [group for group in outlined if read[group.name]]
    return Prediction(
        packs=len(filled),
        efficiency=float(np.mean(filled)) / plan.budget.maximum,
        emptiest=min(filled) / plan.budget.maximum,
        samples_per_pack=samples.total() / len(filled),
        waiting=sum(len(lane.waiting) for lane in lanes) / len(lanes),
        steps_per_epoch=sum(len(g.source) for g in drawn) * steps / read.total(),
        share={g.name: tokens[g.name] / tokens.total() for g in plan.groups},
        steps_per_pass={g.name: len(g.source) * steps / read[g.name] for g in drawn},
    )


def simulated_packs(plan: StreamPlan, scans: Mapping[str, Scan]) -> Iterator[list[Sample]]:
    """The samples of the packs that `predict` judges by, without contents.

    Raises:
        ValueError: if nothing can be packed.
    """
    return _packs(_lanes(plan, _all_outlined(plan, scans)))


def _all_outlined(plan: StreamPlan, scans: Mapping[str, Scan]) -> tuple[Group, ...]:
    outlined = tuple(_outlined(group, scans[group.name]) for group in plan.groups if scans[group.name].usable)
    if not any(group.weight for group in outlined):
        raise ValueError("no group that is drawn has a usable record")
    return outlined


def _lanes(plan: StreamPlan, outlined: tuple[Group, ...]) -> list[LaneStream]:
    lifted = replace(plan, groups=outlined, max_reject_fraction=1.0)
    return [LaneStream(lifted, LaneCursor(lane=lane)) for lane in range(min(LANES, plan.num_lanes))]


def _packs(lanes: Sequence[LaneStream]) -> Iterator[list[Sample]]:
    made = samples = 0
    while made < PACKS and samples < SAMPLES:
        packed = lanes[made % len(lanes)].next_samples()
        if not packed:  # groups that are read a number of times only, and have been
            return
        made += 1
        samples += len(packed)
        yield packed


def _outlined(group: Group, scan: Scan) -> Group:
    source = _Outlines(tuple(scan.outlines), len(group.source))
    return replace(group, dataset=_OutlineDataset(tokenizer=group.dataset.tokenizer), source=source)


@dataclass(frozen=True, slots=True)
class _Outlines:
    """As many records as the group has; each is one of the scanned ones, so shares of lengths and rejects are theirs."""

    outlines: tuple[Outline | None, ...]
    records: int

    def __len__(self) -> int:
        return self.records

    def read(self, index: int) -> Record:
        drawn = self.outlines[index % len(self.outlines)]
        return Record(data={"outline": drawn}, where=f"record {index}", fetch=_no_files)


class _OutlineDataset(TaskDataset):
    """Outlines -> samples without contents."""

    source_format: ClassVar[str] = "outline"

    def to_sample(self, record: Record, rng: np.random.Generator) -> Sample:
        if record.data["outline"] is None:
            raise SkipSample("unusable", "the scanned record gives no sample")
        sample = from_outline(record.data["outline"])
        seen = [i for i, segment in enumerate(sample.segments) if segment.kind == "und_image"]
        if any(s.supervised or s.kind == "gen_image" for s in sample.segments) or not seen:
            return sample
        # It learns from regions alone, of which an outline tells nothing: one stands in for them.
        return replace(sample, regions=(Region(head="", segment=seen[0], token=0, image=seen[0]),))


def _no_files(name: str) -> bytes:
    raise KeyError(name)
