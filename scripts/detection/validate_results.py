"""Count what `scripts.detection.predict` wrote; 1 if the file is missing, cannot be read, or every row failed.

    python -m scripts.detection.validate_results out.jsonl [--no-preview] [--count-only] [--labels labels.txt]

`--count-only` prints total:successful:failed.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--no-preview", action="store_true")
    parser.add_argument("--count-only", action="store_true")
    parser.add_argument("--labels", type=Path, help="known labels, one a line: others are counted")
    args = parser.parse_args(argv)
    try:
        rows = read_results(args.file)
        known = set(args.labels.read_text(encoding="utf-8").splitlines()) if args.labels else None
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    good = [row for row in rows if is_good(row)]
    if args.count_only:
        print(f"{len(rows)}:{len(good)}:{len(rows) - len(good)}")
        return int(not good)
    print(f"rows {len(rows)}, successful {len(good)}, failed {len(rows) - len(good)}")
    for name, amount in count(rows, known).items():
        print(f"{name:<28}{amount}")
    if not args.no_preview:
        for row in good[:3]:
            print(f"{row.get('image')}: {row['pred_result'][:200]}")
    return int(not good)


def read_results(path: Path) -> list[dict[str, Any]]:
    """Records of JSONL, or of a JSON list.

    Raises:
        ValueError: naming the line that is none.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                rows.append(json.loads(line))
            except ValueError as e:
                raise ValueError(f"{path}:{number}: not JSON ({e})") from e
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: a record is not an object")
    return rows


def is_good(row: Mapping[str, Any]) -> bool:
    """No error, and something was said."""
    return not row.get("error") and bool(row.get("pred_result"))


def count(rows: Sequence[Mapping[str, Any]], known: set[str] | None) -> dict[str, int]:
    """What is worth a look."""
    found = Counter[str]()
    for row in rows:
        predictions = row.get("predictions") or []
        found["answers not understood"] += row.get("parse_status") == "failed"
        found["answers cut off"] += bool(row.get("truncated"))
        found["answers read with leniency"] += str(row.get("parse_status")).startswith("recovered")
        found["repeated objects"] += sum("repeats" in note for note in row.get("dropped") or [])
        found["boxes over the edge"] += sum("over the edge" in note for note in row.get("dropped") or [])
        found["objects"] += len(predictions)
        if known is not None:
            found["labels that are not known"] += sum(p.get("label") not in known for p in predictions)
    return dict(found)


if __name__ == "__main__":
    sys.exit(main())
