"""What every pack of a run was made of, step by step: enough to make any of them again (`data/replay.py`).

`journal.RANK.jsonl` in a run's directory has one line per step: `{"step": 7, "packs": [{"lane": 3, "samples": [["vqa", 120],
…], "hash": "…"}]}`, a sample by its group and position. Rank 0's also has the plan, once per start of the run: `{"step": steps
done, "plan": …}`. A sample is a function of plan, group and position; so no order has to be gone through again.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from data.dataset_base import DropoutSpec
from data.layout import LayoutSpec
from data.mixture import GroupSpec, SourceSpec, build_groups
from data.policy import PackBudget
from data.stream import StreamPlan
from data.tokens import Tokenizer
from data.types import PackedBatch

PATTERN = "journal.*.jsonl"


def journal_name(rank: int) -> str:
    """Name of a rank's file."""
    return PATTERN.replace("*", str(rank))


def step_line(step: int, batches: Iterable[PackedBatch]) -> str:
    """What a rank writes about a step."""
    packs = [
        {
            "lane": batch.cursor.lane,
            "samples": [[origin.group, origin.position] for origin in batch.origins],
            "hash": batch.hash,
        }
        for batch in batches
        if not batch.is_filler
    ]
    return json.dumps({"step": step, "packs": packs}, ensure_ascii=False)


def plan_line(steps_done: int, plan: StreamPlan, specs: Sequence[GroupSpec], tokenizer: Tokenizer) -> str:
    """What rank 0 writes when a run starts or goes on."""
    return json.dumps({"step": steps_done, "plan": plan_to_json(plan, specs, tokenizer)}, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------- the plan


def plan_to_json(plan: StreamPlan, specs: Sequence[GroupSpec], tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that a plan was built from, with absolute paths."""
    from data.dataset_info import DATASET_REGISTRY  # it imports every dataset class

    names = {cls: name for name, cls in DATASET_REGISTRY.items()}
    groups = [
        {**{f.name: getattr(s, f.name) for f in fields(s)}, "sources": [asdict(x) for x in s.sources],
         "dataset_class": names[s.dataset_class]}
        for s in specs
    ]  # fmt: skip
    return {
        "groups": groups,
        "tokenizer": str(tokenizer.path.resolve()),
        "layout": asdict(plan.layout),
        "budget": asdict(plan.budget),
        "dropout": asdict(plan.dropout),
        "seed": plan.seed,
        "num_lanes": plan.num_lanes,
        "timestep_shift": plan.timestep_shift,
        "max_reject_fraction": plan.max_reject_fraction,
    }


def plan_from_json(stored: Mapping[str, Any], index_cache_dir: str = "") -> StreamPlan:
    """The plan again, with the groups' files open.

    Raises:
        ValueError: if a file is gone, or the journal is of a version that kept something else.
    """
    from data.dataset_info import DATASET_REGISTRY

    try:
        specs = [
            GroupSpec(
                **{
                    **group,
                    "dataset_class": DATASET_REGISTRY[group["dataset_class"]],
                    "sources": tuple(SourceSpec(**source) for source in group["sources"]),
                }
            )
            for group in stored["groups"]
        ]
        layout, budget, dropout = (
            LayoutSpec(**stored["layout"]),
            PackBudget(**stored["budget"]),
            DropoutSpec(**stored["dropout"]),
        )
        rest = {name: stored[name] for name in ("seed", "num_lanes", "timestep_shift", "max_reject_fraction")}
    except (KeyError, TypeError) as e:
        raise ValueError(f"the journal's plan is of another version of Weft ({e})") from e
    tokenizer = Tokenizer(stored["tokenizer"])
    groups = build_groups(specs, tokenizer, index_cache_dir)
    return StreamPlan(
        groups=groups, layout=layout, special=tokenizer.special, budget=budget, dropout=dropout, **rest
    )


# ------------------------------------------------------------------------------------------------- reading it


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A pack of a step, as journalled."""

    rank: int
    lane: int
    samples: tuple[tuple[str, int], ...]
    hash: str


def read_step(run: Path, step: int) -> tuple[Mapping[str, Any], list[Entry]]:
    """The plan that held at a step, and the step's packs by rank.

    Raises:
        ValueError: if the run has no journal, or none of that step.
    """
    files = sorted(run.glob(PATTERN), key=lambda path: int(path.name.split(".")[1]))
    if not files:
        raise ValueError(f"{run}: no {PATTERN} here; name a run's --results_dir")
    plan: Mapping[str, Any] | None = None
    entries: list[Entry] = []
    last = 0
    for rank, file in ((int(path.name.split(".")[1]), path) for path in files):
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                # Long journals: only the lines that matter are parsed.
                if not line.endswith("}\n") or not line.startswith('{"step": '):
                    continue  # half-written by a killed run
                at = int(line[len('{"step": ') :].partition(",")[0])
                last = max(last, at)
                if at == step and '"packs": ' in line[:40]:
                    packs = json.loads(line)["packs"]
                    entries = [e for e in entries if e.rank != rank] + [_entry(rank, p) for p in packs]
                elif at < step and '"plan": ' in line[:40]:
                    plan = json.loads(line)["plan"]
    if not entries or plan is None:
        raise ValueError(f"{run}: its journal has no step {step}; it goes up to {last}")
    return plan, entries


def _entry(rank: int, pack: Mapping[str, Any]) -> Entry:
    samples = tuple((str(group), int(position)) for group, position in pack["samples"])
    return Entry(rank=rank, lane=int(pack["lane"]), samples=samples, hash=str(pack["hash"]))
