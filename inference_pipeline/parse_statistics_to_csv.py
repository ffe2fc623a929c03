"""Collect the statistics.json of one or more evaluations into one CSV, a row each.

    python -m inference_pipeline.parse_statistics_to_csv -d runs/quickstart runs/seed1 runs/seed2 -o summary.csv -v

Each directory is an evaluation's output directory, or a run's directory that holds it. A file that is missing or does not hold
the figures stops the program with its name, and no CSV is written: a table that silently lacks a run is worse than none.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inference_pipeline.figures import FIGURES, figure_lines
from train.files import replace_text

PLACES = ("statistics.json", "eval/statistics.json", "evaluation/statistics.json")
"""Where a directory's statistics may lie, tried in this order."""

COLUMNS = (
    "model_id",
    "split",
    *(name for name in FIGURES if name != "text_exact"),
    *(f"n_{name}" for name in FIGURES if name != "text_exact"),
    "text_exact",
    "n_text_exact",
    "judge_accuracy_on_real_test_digits",
    "timestamp",
    "seed",
)


def read_statistics(directory: Path) -> dict[str, Any]:
    """The statistics of one directory.

    Raises:
        ValueError: naming the file, if it is missing, is not JSON or lacks a figure.
    """
    file = next(
        (directory / place for place in PLACES if (directory / place).is_file()), directory / PLACES[0]
    )
    try:
        statistics = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{file}: not found; run `python -m inference_pipeline.evaluate` with --output_dir {directory}"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file}: not valid JSON ({error}); run the evaluation's --merge again to rewrite it"
        ) from None
    missing = (
        [name for name in FIGURES if name not in statistics]
        if isinstance(statistics, dict)
        else list(FIGURES)
    )
    if missing:
        raise ValueError(
            f"{file}: lacks {', '.join(missing)}; it was not written by inference_pipeline.evaluate"
        )
    return statistics


def summary_row(directory: Path, statistics: dict[str, Any]) -> dict[str, Any]:
    """One CSV row; a figure that was not measured stays empty."""
    sizes = statistics.get("n", {})
    values = {**statistics, **{f"n_{name}": sizes.get(name, 0) for name in FIGURES}}
    values["model_id"] = statistics.get("model_id") or directory.name
    return {column: "" if values.get(column) is None else values[column] for column in COLUMNS}


def main(argv: Sequence[str] | None = None) -> int:
    """Read every directory, write the CSV; 1 if one of them cannot be read."""
    parser = argparse.ArgumentParser(description="collect statistics.json files into one CSV")
    parser.add_argument(
        "-d", "--directories", nargs="+", type=Path, required=True, help="evaluation output directories"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("summary.csv"), help="the CSV to write")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every directory's figures")
    args = parser.parse_args(argv)
    try:
        collected = [(directory, read_statistics(directory)) for directory in args.directories]
        args.output.parent.mkdir(parents=True, exist_ok=True)
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, fieldnames=COLUMNS)
        writer.writeheader()
        writer.writerows(summary_row(directory, statistics) for directory, statistics in collected)
        replace_text(args.output, table.getvalue())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.verbose:
        for directory, statistics in collected:
            print(f"{directory}", *figure_lines(statistics), sep="\n  ")
    print(f"{args.output}: {len(collected)} row{'s' if len(collected) != 1 else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
