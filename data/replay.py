"""Make the packs of a step again, from the run's journal alone: which samples, and whether they still are the same.

    python -m data.replay RUN --step N [--json]

Prints every pack of the step with its samples and a hash of its tensors, beside the hash that the trainer wrote. Reads the
records of these packs and nothing else. Exits with 1 if a pack differs (the data have changed), with 2 if it cannot be made.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.journal import Entry, plan_from_json, read_step
from data.packing import content_hash, pack
from data.stdout import nobody_reads
from data.stream import StreamPlan, make_sample
from data.types import PackedBatch, Reject, Sample


def replay(run: Path, step: int, index_cache_dir: str = "") -> list[tuple[Entry, PackedBatch]]:
    """Every pack of a step as it was journalled, and made again.

    Args:
        run: the run's `--results_dir`.
        step: as the log counts them.
        index_cache_dir: as the run had it; without, indexes may have to be made again.

    Raises:
        ValueError: if the run has no journal of the step, or a record cannot be used any more.
    """
    stored, entries = read_step(run, step)
    plan = plan_from_json(stored, index_cache_dir)
    return [(entry, _again(plan, entry)) for entry in entries]


def _again(plan: StreamPlan, entry: Entry) -> PackedBatch:
    groups = {group.name: group for group in plan.groups}
    samples: list[Sample] = []
    for name, position in entry.samples:
        made = make_sample(plan, groups[name], entry.lane, position)
        if isinstance(made, Reject):
            raise ValueError(f"group {name!r}, position {position}: cannot be used any more: {made.message}")
        samples.append(made)
    return pack(samples, plan.layout, plan.special)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a step's packs; 1 if one differs from what was trained on, 2 if there is nothing to print."""
    parser = argparse.ArgumentParser(prog="python -m data.replay", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="the run's --results_dir")
    parser.add_argument("--step", type=int, required=True, help="which step, as the log counts them")
    parser.add_argument(
        "--index_cache_dir", default="", help="directory for the indexes of the data, as the run had it"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    args = parser.parse_args(argv)
    try:
        packs = replay(args.run, args.step, args.index_cache_dir)
    except ValueError as e:
        sys.stderr.write(f"error: {e}\n")
        return 2
    results = [_describe(entry, batch) for entry, batch in packs]
    lines = [line for result in results for line in _lines(result)]
    if args.json:
        lines = [json.dumps({"step": args.step, "packs": results}, ensure_ascii=False)]
    try:
        sys.stdout.writelines(f"{line}\n" for line in lines)
        sys.stdout.flush()
    except BrokenPipeError:
        nobody_reads()
    same = all(r["hash"] == r["hash_of_training"] for r in results)
    if not same:
        sys.stderr.write("error: a pack is not what was trained on: its data have changed since\n")
    return 0 if same else 1


def _describe(entry: Entry, batch: PackedBatch) -> dict[str, Any]:
    samples = [
        {"group": o.group, "position": o.position, "where": o.where, "task": task, "tokens": tokens}
        for o, task, tokens in zip(batch.origins, batch.tasks, batch.sample_lens, strict=True)
    ]
    return {
        "rank": entry.rank,
        "lane": entry.lane,
        "tokens": batch.num_tokens,
        "hash": content_hash(batch),
        "hash_of_training": entry.hash,
        "samples": samples,
    }


def _lines(result: dict[str, Any]) -> list[str]:
    same = (
        "the same"
        if result["hash"] == result["hash_of_training"]
        else f"DIFFERENT from {result['hash_of_training']}"
    )
    head = f"rank {result['rank']} lane {result['lane']}: {len(result['samples'])} samples, {result['tokens']} tokens"
    return [
        f"{head}, hash {result['hash']} ({same})",
        *(
            f"  {s['tokens']:>6} tokens  {s['group']} {s['position']}  {s['where']}"
            for s in result["samples"]
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
