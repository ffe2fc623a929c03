"""Choose teachers from a file of detection rows: few scenes that between them show most (data/detection_tools.py).

    python -m scripts.detection.make_pool all_samples.jsonl --output pool.jsonl --max_teachers 10 [--rest train.jsonl]

`--rest` gets all rows that are not in the pool. Prints what the pool covers.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.detection_tools import choose_pool, read_lines, write_rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rest", type=Path)
    parser.add_argument("--max_teachers", type=int, default=10)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args(argv)
    try:
        lines = read_lines(args.file)
        if bad := [line.error for line in lines if line.row is None]:
            raise ValueError(f"{len(bad)} rows cannot be used, first {bad[0]}")
        students = [line.row.student for line in lines if line.row is not None]
        chosen, report = choose_pool(students, args.max_teachers, args.seed)
        if not chosen:
            raise ValueError(f"{args.file}: no rows to choose from")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    of_student = [_student(line.data) for line in lines]
    write_rows(args.output, (of_student[i] for i in chosen))
    if args.rest:
        write_rows(args.rest, (line.data for i, line in enumerate(lines) if i not in set(chosen)))
    print(json.dumps(report, ensure_ascii=False, indent=1))
    return 0


def _student(row: dict) -> dict:
    return row.get("student") or row.get("target") or row


if __name__ == "__main__":
    sys.exit(main())
