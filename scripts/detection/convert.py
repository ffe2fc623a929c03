"""Annotation tools' JSON -> detection rows: train, val, teacher and all_samples.jsonl, candidates.json, report.json.

    python -m scripts.detection.convert --input_dir RAW --output_dir DATA --output_image_dir DATA/images --language chinese \
        --resize --val_ratio 0.1 --max_teachers 10

What is read: data/vendor_json.py. Pictures are written upright. Teachers are in neither train nor val.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.detection_tools import choose_pool, phrase_list, split_rows, write_rows
from data.detections import read_detection
from data.vendor_json import LEVELS, Conversion, Report, convert, read_hierarchy

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--output_image_dir", type=Path, required=True)
    parser.add_argument("--language", choices=("chinese", "english"), default="chinese")
    parser.add_argument("--response_types", nargs="+", default=list(LEVELS), help="levels of the label")
    parser.add_argument("--resize", action="store_true", help="pictures to multiples of --factor")
    parser.add_argument("--factor", type=int, default=28)
    parser.add_argument("--min_pixels", type=int, default=3136)
    parser.add_argument("--max_pixels", type=int, default=401408)
    parser.add_argument("--min_box_size", type=int, default=1)
    parser.add_argument("--val_ratio", type=float, default=0.1)
    parser.add_argument("--max_teachers", type=int, default=10)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--token_map_path", type=Path, help="English: JSON object, token -> word")
    parser.add_argument("--hierarchy_path", type=Path, help="JSON: object types and their properties")
    parser.add_argument("--log_level", default="INFO")
    args = parser.parse_args(argv)
    logging.basicConfig(level=args.log_level, format="%(message)s")
    try:
        if not args.input_dir.is_dir():
            raise ValueError(f"--input_dir {args.input_dir}: there is no such directory")
        tokens = json.loads(args.token_map_path.read_text(encoding="utf-8")) if args.token_map_path else {}
        how = Conversion(
            language=args.language,
            levels=tuple(args.response_types),
            tokens=tokens,
            hierarchy=read_hierarchy(args.hierarchy_path) if args.hierarchy_path else None,
            resize=(args.factor, args.min_pixels, args.max_pixels) if args.resize else None,
            min_box_size=args.min_box_size,
        )
        report = Report()
        rows = list(convert(args.input_dir, args.output_image_dir, how, report))
        if not rows:
            raise ValueError(f"{args.input_dir}: no annotation could be used; {'; '.join(report.errors[:3])}")
        scenes = [read_detection(row).student for row in rows]
        # At most a half of them: the others are to be trained on.
        teachers, pool = choose_pool(scenes, min(args.max_teachers, len(rows) // 2), args.seed)
        rest = [row for i, row in enumerate(rows) if i not in set(teachers)]
        train, val = split_rows(rest, args.val_ratio, args.seed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    out = args.output_dir
    files = {"train": train, "val": val, "teacher": [rows[i] for i in teachers], "all_samples": rows}
    counts = {name: write_rows(out / f"{name}.jsonl", found) for name, found in files.items()}
    for name, content in (
        ("candidates", phrase_list(scenes)),
        ("report", {**report.to_json(), "pool": pool, "rows": counts}),
    ):
        (out / f"{name}.json").write_text(
            json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
    for line in report.errors:
        logger.warning("%s", line)
    if report.missing_tokens:
        logger.warning("not in --token_map_path: %s", ", ".join(sorted(report.missing_tokens)))
    print(
        f"{out}: {', '.join(f'{count} {name}' for name, count in counts.items())}; {len(report.errors)} errors"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
