"""What evaluations share: rows that several processes write, each a part of its own, and that a killed one goes on with.

Used by `evaluate.py` and `evaluate_grounding.py`.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.files import replace_text

Rows = dict[str, dict[str, Any]]
"""By sample id."""

Settings = dict[str, Any]


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which model, and where it computes."""
    parser.add_argument(
        "--model_path", type=Path, required=True, help="model directory in the published layout"
    )
    parser.add_argument("--adapter", type=Path, help="adapters trained on it, as a run or PEFT leaves them")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema")
    parser.add_argument("--device", default="cpu")


def parse_with_parts(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, those of several processes among them; a value that cannot work stops the program here."""
    parts = parser.add_argument_group("several processes")
    parts.add_argument("--shard", type=int, default=0)
    parts.add_argument("--num_shards", type=int, default=1)
    parts.add_argument(
        "--merge", action="store_true", help="combine all parts in --output_dir and write the statistics"
    )
    args = parser.parse_args(argv)
    if not 0 <= args.shard < args.num_shards:
        parser.error(
            f"--shard must be from 0 to {args.num_shards - 1} (--num_shards {args.num_shards}), not {args.shard}"
        )
    if args.batch_size < 1:
        parser.error(f"--batch_size must be at least 1, not {args.batch_size}")
    return args


def part_file(args: argparse.Namespace) -> Path:
    """Where this process writes its rows."""
    return args.output_dir / (f"results.{args.shard}.jsonl" if args.num_shards > 1 else "results.jsonl")


@dataclass(kw_only=True)
class Progress:
    """One line per batch, at most one per second: how many are done, how fast, how long it will take."""

    total: int
    label: str = ""
    done: int = 0
    start: float = 0.0
    shown: float = 0.0

    def __post_init__(self) -> None:
        self.start = time.monotonic()

    def advance(self, count: int, task: str) -> None:
        """Count finished samples and perhaps print."""
        self.done += count
        now = time.monotonic()
        if now - self.shown < 1.0 and self.done < self.total:
            return
        self.shown = now
        speed = self.done / max(now - self.start, 1e-9)
        left = (self.total - self.done) / speed
        print(
            f"{self.label}{task:<5} {self.done}/{self.total} samples, {speed:.1f}/s, "
            f"{int(left) // 60}:{int(left) % 60:02d} left",
            flush=True,
        )


def read_rows(path: Path) -> Rows:
    """The rows of a results file by sample id. A last line that a kill cut short is removed from the file.

    Raises:
        ValueError: naming the line, if one before the last cannot be read.
    """
    if not path.exists():
        return {}
    rows: Rows = {}
    end = 0
    with path.open("rb") as file:
        lines = file.readlines()
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
            rows[row["sample_id"]] = row
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            if number < len(lines) - 1:
                raise ValueError(
                    f"{path}:{number + 1}: not a result row; remove the line or the file"
                ) from None
            break
        if not line.endswith(b"\n"):
            del rows[row["sample_id"]]
            break
        end += len(line)
    if end < path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(end)
    return rows


def read_parts(output_dir: Path) -> Rows:
    """The rows of all processes."""
    found: Rows = {}
    # An earlier merge first: what a part holds is newer than the failures written in its place then.
    for part in [output_dir / "results.jsonl", *sorted(output_dir.glob("results.*.jsonl"))]:
        found |= read_rows(part)
    return found


def weights_of(args: argparse.Namespace) -> tuple[Path, str]:
    """The file of the weights under test, and what the model is called.

    Raises:
        ValueError: if it is not there.
    """
    weights, called = args.model_path / f"{args.weights}.safetensors", args.model_path.resolve().name
    if args.adapter is not None:
        from modeling import adapters

        weights = adapters.find_adapter(args.adapter, args.weights) / adapters.WEIGHTS
        called = f"{called}+{args.adapter.resolve().parent.name}"
    if not weights.is_file():  # settings pinned without them would refuse the corrected command
        raise ValueError(f"{weights}: no weights here; --model_path must name a trained or exported model")
    return weights, called


def pin(settings: Settings, output_dir: Path) -> None:
    """Keep how a run is made in evaluation_settings.json: rows made in two ways must not meet in one results file.

    Raises:
        ValueError: if the directory holds rows that were made otherwise, naming a difference.
    """
    file = output_dir / "evaluation_settings.json"
    if file.exists():
        kept = json.loads(file.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if kept.get(name) != value:
                raise ValueError(
                    f"{output_dir}: holds results with {name} {kept.get(name)}, now it is {value}; "
                    "remove the directory or give another --output_dir"
                )
    else:
        replace_text(file, json.dumps(settings, indent=2) + "\n")
