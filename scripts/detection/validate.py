"""Check files of detection rows: every error with its file and line; 1 if there is any.

python -m scripts.detection.validate train.jsonl val.jsonl [--image_root D --check-images] [--pool pool.jsonl] [--json]
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.detection_tools import read_lines, warnings
from data.teachers import read_pool


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--image_root", type=Path, help="where pictures lie; default: beside each file")
    parser.add_argument("--check-images", action="store_true", help="open them and compare their size")
    parser.add_argument("--pool", help="pool of teachers: a picture that is in it is an error")
    parser.add_argument("--max_objects", type=int, default=0, help="num_queries of the head: more is told")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    try:
        pool = read_pool(args.pool) if args.pool else ()
        report: list[dict[str, Any]] = []
        for file in args.files:
            lines = read_lines(file, (args.image_root or file.parent) if args.check_images else None)
            told = warnings(lines, pool, args.max_objects)
            leaks = [f"{file}: {w}" for w in told if "pool of teachers" in w]
            errors = [line.error for line in lines if line.row is None] + leaks
            bad = sum(line.row is None for line in lines) + len(leaks)
            report.append(
                {
                    "file": str(file),
                    "rows": len(lines),
                    "valid": len(lines) - bad,
                    "errors": errors,
                    "warnings": [w for w in told if "pool of teachers" not in w],
                }
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(report, ensure_ascii=False, indent=1))
    else:
        for found in report:
            for told_line in (*found["errors"], *(f"warning: {w}" for w in found["warnings"])):
                print(told_line)
            print(f"{found['file']}: {found['valid']} of {found['rows']} rows are valid")
    return int(any(found["errors"] or not found["rows"] for found in report))


if __name__ == "__main__":
    sys.exit(main())
