"""Split a file of detection rows in two.

    python -m scripts.detection.split all.jsonl --train train.jsonl --val val.jsonl --val_ratio 0.1 [--group_key site]

Rows whose `--group_key` is the same stay together; with `--stratify` the rarest labels are dealt out first.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.detection_tools import Line, read_lines, split_rows, write_rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--val_ratio", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--group_key", default="", help="key of the row, or of its `meta`")
    parser.add_argument("--stratify", action="store_true")
    args = parser.parse_args(argv)

    def group(line: Line) -> str:
        meta = line.data.get("meta")
        value = line.data.get(args.group_key, meta.get(args.group_key) if isinstance(meta, dict) else None)
        if value is None:
            raise ValueError(f"{args.file}:{line.number}: has no {args.group_key!r} (--group_key)")
        return str(value)

    def labels(line: Line) -> Sequence[str]:
        return sorted(line.row.student.labels) if line.row else ()

    try:
        lines = read_lines(args.file)
        if bad := [line.error for line in lines if line.row is None]:
            raise ValueError(f"{len(bad)} rows cannot be used, first {bad[0]}")
        parts = split_rows(
            lines,
            args.val_ratio,
            args.seed,
            group if args.group_key else None,
            labels if args.stratify else None,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    counts = [
        write_rows(path, (line.data for line in part))
        for path, part in zip((args.train, args.val), parts, strict=True)
    ]
    print(f"{args.train}: {counts[0]} rows; {args.val}: {counts[1]} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
