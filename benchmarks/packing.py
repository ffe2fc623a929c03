"""What each packer loses, how full its packs are, how long samples wait, and how evenly ranks are loaded: one JSON line.

    python benchmarks/packing.py [--samples 6000] [--ranks 8]

No pictures and no model: samples of drawn sizes go through the real order, lanes and policies, as 8 ranks of 48 lanes would read
them. Exits with 1 unless `conserving` lost nothing, filled packs to 98%, and kept the slowest rank within 1.1 of the mean.

Mixture, by weight; sizes in tokens, `ln(m, s)` lognormal with median m, pictures with sides of `low … high` px and an aspect of
e^|N(0, 0.25)|, cut to the multiple of a patch:

- 40% pictures from text: text ln(60, 0.6) up to 400, picture of 512 … 1024 px (VAE, 16 px a patch);
- 35% questions about pictures: picture of 378 … 980 px (ViT, 14 px), question ln(40, 0.8), answer ln(120, 1.0) up to 4,000;
- 15% edits: picture of 512 … 1024 px twice (clean and noised), again for the ViT at 224 … 518 px, text ln(40, 0.6);
- 10% text alone: ln(600, 1.1) up to 16,000.

Budgets (expected / maximum / longest sample): 10240 / 11520 / 10240 and 32768 / 36864 / 16384.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.dataset_base import TaskDataset
from data.layout import LayoutSpec, num_tokens, splits_of, visible_pairs
from data.mixture import Group
from data.policy import PAIRS_PER_TOKEN_COST, POLICIES, PackBudget
from data.sources import Record
from data.stream import LaneStream, StreamPlan
from data.tokens import SpecialTokens
from data.types import LaneCursor, Sample, Segment

BUDGETS = ((10240, 11520, 10240), (32768, 36864, 16384))
RECORDS = 1_000_000
PIXEL = torch.zeros(3, 1, 1, dtype=torch.uint8)
TOKEN = torch.zeros(1, dtype=torch.int64)


def text(
    rng: np.random.Generator, median: float, sigma: float, most: int, *, supervised: bool = False
) -> Segment:
    length = min(most, max(1, int(rng.lognormal(math.log(median), sigma))))
    return Segment(kind="text", ids=TOKEN.expand(length), supervised=supervised)


def sides(rng: np.random.Generator, low: int, high: int, stride: int) -> tuple[int, int]:
    """Height and width in pixels, multiples of the stride."""
    long = rng.uniform(low, high)
    short = max(long / math.exp(abs(rng.normal(0, 0.25))), low / 2)
    return round(long / stride) * stride, round(short / stride) * stride


def picture(kind: Any, height: int, width: int) -> Segment:
    return Segment(kind=kind, pixels=PIXEL.expand(3, height, width))  # one pixel in memory


def drawing(rng: np.random.Generator) -> tuple[Segment, ...]:
    return text(rng, 60, 0.6, 400), picture("gen_image", *sides(rng, 512, 1024, 16))


def question(rng: np.random.Generator) -> tuple[Segment, ...]:
    image = picture("und_image", *sides(rng, 378, 980, 14))
    return image, text(rng, 40, 0.8, 1000), text(rng, 120, 1.0, 4000, supervised=True)


def edit(rng: np.random.Generator) -> tuple[Segment, ...]:
    size, small = sides(rng, 512, 1024, 16), sides(rng, 224, 518, 14)
    clean, noised = picture("cond_image", *size), picture("gen_image", *size)
    return clean, picture("und_image", *small), text(rng, 40, 0.6, 400), noised


def words(rng: np.random.Generator) -> tuple[Segment, ...]:
    return (text(rng, 600, 1.1, 16_000, supervised=True),)


MIXTURE: dict[str, tuple[float, Callable[[np.random.Generator], tuple[Segment, ...]]]] = {
    "drawings": (0.40, drawing),
    "questions": (0.35, question),
    "edits": (0.15, edit),
    "words": (0.10, words),
}


class Sizes:
    """As many records as a large data set has; all that there is of one is its number."""

    def __len__(self) -> int:
        return RECORDS

    def read(self, index: int) -> Record:
        return Record(data={"index": index}, where=f"record {index}", fetch=None)


class SizedDataset(TaskDataset):
    """A sample of the size that belongs to the record."""

    def __init__(self, make: Callable[[np.random.Generator], tuple[Segment, ...]]):
        super().__init__(tokenizer=None)  # type: ignore[arg-type]  # there is no text
        self.make = make

    def to_sample(self, record: Record, rng: np.random.Generator) -> Sample:
        return Sample(segments=self.make(np.random.default_rng(record.data["index"])))


@dataclass(frozen=True, slots=True)
class Pack:
    tokens: int
    pairs: int

    @property
    def cost(self) -> float:
        """In tokens: linear work and attention."""
        return self.tokens + self.pairs / PAIRS_PER_TOKEN_COST


def run(
    policy: str, budget: tuple[int, int, int], num_samples: int, ranks: int, lanes: int
) -> dict[str, Any]:
    """Pack until so many samples were read; a step takes one pack per rank, each from the lane whose turn it is."""
    expected, maximum, per_sample = budget
    plan = StreamPlan(
        groups=tuple(
            Group(name=name, weight=weight, is_mandatory=False, dataset=SizedDataset(make), source=Sizes())
            for name, (weight, make) in MIXTURE.items()
        ),
        layout=LayoutSpec(),
        special=SpecialTokens(begin=1, end=2, image_start=3, image_end=4, anchors={}),
        budget=PackBudget(expected=expected, maximum=maximum, per_sample=per_sample, policy=policy),
        seed=0,
        num_lanes=lanes,
        max_reject_fraction=1.0,
    )
    streams = [LaneStream(plan, LaneCursor(lane=lane)) for lane in range(lanes)]
    packs: list[Pack] = []
    ages: list[int] = []
    places: Counter[tuple[str, int]] = Counter()
    started = time.process_time()
    while len(packs) % ranks or sum(a.samples for s in streams for a in s.cursor.read.values()) < num_samples:
        stream = streams[len(packs) % lanes]
        since = {(w.group, w.position): w.since for w in stream.waiting}
        now = stream.cursor.packs
        samples = stream.next_samples()
        origins = [(s.origin.group, s.origin.position) for s in samples]
        places.update(origins)
        ages += [now - since[o] for o in origins if o in since]
        packs.append(
            Pack(sum(num_tokens(s, plan.layout) for s in samples), sum(pairs_of(s, plan) for s in samples))
        )
    seconds = time.process_time() - started
    waiting = Counter((w.group, w.position) for s in streams for w in s.waiting)
    rejected = Counter((r.group, r.position) for s in streams for r in s.take_rejects())
    everywhere = places + waiting + rejected
    read = sum(a.samples for s in streams for a in s.cursor.read.values())
    assert max(everywhere.values()) == 1, "a sample was used twice"
    lost = read - everywhere.total()
    assert lost == sum(a.samples for s in streams for a in s.cursor.lost.values()), (
        "the ledger counts otherwise"
    )
    steps = [packs[i : i + ranks] for i in range(0, len(packs) - ranks + 1, ranks)]
    slowest = [max(p.cost for p in step) for step in steps]
    mean = [statistics.mean(p.cost for p in step) for step in steps]
    fill = [p.tokens / maximum for p in packs]
    balance = sum(slowest) / sum(mean)
    return {
        "read": read,
        "trained": places.total(),
        "waiting": waiting.total(),
        "rejected": rejected.total(),
        "lost": lost,
        "lost_share": round(lost / read, 4),
        "packs": len(packs),
        "fill": round(statistics.mean(fill), 4),
        "fill_median": round(statistics.median(fill), 4),
        "fill_min": round(min(fill), 4),
        "fill_max": round(max(fill), 4),
        "slowest_rank_over_mean": round(balance, 4),
        "worst_step": round(max(s / m for s, m in zip(slowest, mean, strict=True)), 4),
        "fill_times_balance": round(statistics.mean(fill) / balance, 4),
        "packs_waited_max": max(ages, default=0),
        "packs_waited_bound": plan.budget.max_buffer if policy == "conserving" else None,
        "waiting_per_lane": round(waiting.total() / lanes, 2),
        "us_per_sample": round(1e6 * seconds / read, 1),
    }


def pairs_of(sample: Sample, plan: StreamPlan) -> int:
    splits = splits_of(sample, plan.layout)
    return visible_pairs([sum(splits.lens)], splits.lens, splits.modes, splits.branches)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=6000, help="to be read, at least")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--lanes", type=int, default=48)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "pairs_per_token_cost": PAIRS_PER_TOKEN_COST,
        "ranks": args.ranks,
        "lanes": args.lanes,
    }
    good = True
    for budget in BUDGETS:
        results = {policy: run(policy, budget, args.samples, args.ranks, args.lanes) for policy in POLICIES}
        ours, published = results["conserving"], results["upstream_compat"]
        ratio = ours["fill_times_balance"] / published["fill_times_balance"]
        found["/".join(map(str, budget))] = {**results, "fill_times_balance_ratio": round(ratio, 3)}
        good &= ours["lost"] == 0 and ours["fill"] >= 0.98 and ours["slowest_rank_over_mean"] <= 1.1
        good &= ours["packs_waited_max"] <= ours["packs_waited_bound"]
    print(json.dumps({**found, "good": good}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
