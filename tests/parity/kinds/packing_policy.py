"""Which samples share a batch: the published packer's choices, sample by sample, from lanes that replay its random numbers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.order import record_index
from data.policy import PackBudget
from data.stream import LaneStream, StreamPlan
from data.types import LaneCursor, Ticket
from tests.parity.comparison import Comparison
from tests.unit.data.toy_groups import group, plan

RECORDS = 512
"""More than any scenario reads of a group."""

Json = Mapping[str, Any]


class ReplayedLane(LaneStream):
    """A lane whose random numbers are given, and which remembers what it lost."""

    def __init__(self, settings: StreamPlan, numbers: Sequence[float]):
        super().__init__(settings, LaneCursor(lane=0))
        self._numbers = iter(numbers)
        self.names_of_lost: list[list[int]] = []

    def next_uniform(self) -> float:
        self._draws += 1
        return next(self._numbers)

    def lose(self, sample: Ticket) -> None:
        super().lose(sample)
        self.names_of_lost.append(_name(sample.group, sample.position))


def run(folder: Path) -> Comparison:
    """Every batch of every scenario: its samples, what was read and drawn by then, what waits; and what was never emitted."""
    found = Comparison()
    for name, scenario in json.loads((folder / "batch_policy.json").read_text()).items():
        _compare(found, name, scenario)
    return found


def _compare(found: Comparison, name: str, scenario: Json) -> None:
    lane = ReplayedLane(_plan(scenario), scenario["group_draws"])
    too_long: list[list[int]] = []
    for i, expected in enumerate(scenario["batches"]):
        batch = lane.next_pack()
        too_long += [_name(r.group, r.position) for r in batch.rejects]
        cursor = batch.cursor
        ours = {
            "items": [_name(o.group, o.position) for o in batch.origins],
            "sample_lens": list(batch.sample_lens),
            "sequence_length": batch.num_tokens,
            "consumed_so_far": sum(amount.samples for amount in cursor.read.values()),
            "draws_used_so_far": cursor.draws,
            "buffer": [_name(waiting.group, waiting.position) for waiting in cursor.waiting],
        }
        for key, value in expected.items():
            found.equal(f"{name}/batch{i}/{key}", ours[key], value)
    never = scenario["never_emitted"]
    found.equal(f"{name}/over_length_limit", sorted(too_long), sorted(never["over_length_limit"]))
    found.equal(f"{name}/lost", sorted(lane.names_of_lost), sorted(never["others"]))
    found.equal(
        f"{name}/lost, as counted",
        sum(amount.samples for amount in lane.cursor.lost.values()),
        len(never["others"]),
    )


def _plan(scenario: Json) -> StreamPlan:
    params = scenario["params"]
    settings = plan(
        *[
            _group(i, g["text_lens"], g["weight"], g["is_mandatory"])
            for i, g in enumerate(scenario["groups"])
        ],
        budget=PackBudget(
            expected=params["expected_num_tokens"],
            maximum=params["max_num_tokens"],
            per_sample=params["max_num_tokens_per_sample"],
            max_buffer=params["max_buffer_size"],
            prefer_buffer_before=params["prefer_buffer_before"],
            policy="upstream_compat",
        ),
        num_lanes=1,
        max_reject_fraction=1.0,
    )
    return settings


def _group(number: int, text_lens: Sequence[int], weight: float, mandatory: bool) -> Any:
    """A group whose i-th sample in the lane's order has `text_lens[i % n]` ids, and two tokens around them."""
    lengths = [0] * RECORDS
    seed, name = plan().seed, str(number)
    for i in range(RECORDS):
        lengths[record_index(i, RECORDS, seed, name)] = text_lens[i % len(text_lens)] + 2
    return group(name, lengths, weight=weight, mandatory=mandatory)


def _name(group_name: str, position: int) -> list[int]:
    return [int(group_name), position]
