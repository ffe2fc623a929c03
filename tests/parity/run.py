"""Run golden cases: `python -m tests.parity.run CASE_DIR [CASE_DIR ...]`.

Out: one JSON object per case on standard output, with the largest absolute and relative error of every output and its tolerance.
A directory that is no case stands for all cases below it. Exit code 0 if all agree, 1 if one does not, 2 if one cannot be run.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tests.parity.kinds import find_cases, kind_of, run_case


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case_dirs", nargs="+", type=Path, metavar="CASE_DIR")
    parser.add_argument("--worst", action="store_true", help="only the worst output of each case")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    code = 0
    for folder in _cases(args.case_dirs):
        try:
            found = run_case(folder)
        except (ValueError, OSError, KeyError, RuntimeError) as error:
            _write(
                {"case": str(folder), "kind": kind_of(folder), "error": f"{type(error).__name__}: {error}"}
            )
            code = 2
            continue
        ok = all(row.ok for row in found.rows)
        rows = [found.worst()] if args.worst else found.rows
        outputs = [{**asdict(row), "ok": row.ok} for row in rows]
        facts = {"case": str(folder), "kind": kind_of(folder), "ok": ok, "compared": len(found.rows)}
        _write({**facts, "outputs": outputs})
        code = code or int(not ok)
    return code


def _write(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")


def _cases(roots: Sequence[Path]) -> Iterator[Path]:
    for root in roots:
        cases = list(find_cases(root)) if root.is_dir() else []
        yield from cases or [root]


if __name__ == "__main__":
    sys.exit(main())
