"""Run golden cases: `python -m tests.parity.run CASE_DIR [CASE_DIR ...]`.

Out: one JSON object per case on standard output, with the largest absolute and relative error of every output and its tolerance
(an error is null where shapes differ or what must be the same is not).
A directory that is no case stands for all cases below it; without any, all cases beside the checkout run, or the committed ones.
What lies below and is not built is named as skipped. `--table FILE` writes a Markdown table of what was compared.
Exit code 0 if all agree, 1 if one does not, 2 if one cannot be run.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tests.parity.comparison import Comparison, Row
from tests.parity.kinds import NOT_BUILT, find_cases, find_left_out, kind_of, run_case

Line = tuple[str, str, Comparison]

HEADER = """# Parity

Our numbers beside the published system's (upstream Bagel 056b5fd, tiny random models, float32 on a CPU). Written by
`make parity`; the cases are described in `tests/parity/golden/README.md`. "Worst" is the output nearest to its tolerance, its
error the largest absolute difference over the largest expected value. Indexes, ids, masks and sizes have to be the same.

| kind | case | outputs | worst | error | allowed | all agree |
|---|---|---|---|---|---|---|"""

COMMITTED = Path(__file__).parent / "golden"
BESIDE = Path(__file__).parents[3] / "shared" / "golden"
"""All golden cases, where the checkout has them as a neighbour."""


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case_dirs", nargs="*", type=Path, metavar="CASE_DIR")
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    parser.add_argument("--worst", action="store_true", help="only the worst output of each case")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    roots = args.case_dirs or [BESIDE if BESIDE.is_dir() else COMMITTED]
    code = 0
    lines: list[Line] = []
    for folder in _cases(roots):
        try:
            kind, found = kind_of(folder) or "", run_case(folder)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one case, the others are still compared
            _write({"case": str(folder), "error": f"{type(error).__name__}: {error}"})
            code = 2
            continue
        ok = all(row.ok for row in found.rows)
        outputs = [_output(row) for row in ([found.worst()] if args.worst else found.rows)]
        _write({"case": str(folder), "kind": kind, "ok": ok, "compared": len(found.rows), "outputs": outputs})
        code = code or int(not ok)
        lines.append((kind, folder.name, found))
    for folder in (left_out for root in roots if root.is_dir() for left_out in find_left_out(root)):
        _write({"case": str(folder), "skipped": NOT_BUILT[folder.name]})
    if args.table is not None:
        args.table.write_text(table(lines), encoding="utf-8")
    return code


def table(lines: Sequence[Line]) -> str:
    """One row per case, and what is left out."""
    rows = [
        f"| {kind} | {name} | {len(found.rows)} | {worst.name} | {worst.relative:.1e} | {_allowed(worst)} | "
        f"{'yes' if all(row.ok for row in found.rows) else '**no**'} |"
        for kind, name, found in lines
        for worst in [found.worst()]
    ]
    left_out = [f"- {name}: {why}." for name, why in NOT_BUILT.items()]
    return "\n".join([HEADER, *rows, "", "Left out:", "", *left_out, ""])


def _output(row: Row) -> dict[str, Any]:
    """What JSON can hold: an error that is no number (another shape, unequal, not a number) is null."""
    values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(row).items()}
    return {**values, "ok": row.ok}


def _allowed(row: Row) -> str:
    return f"{row.tolerance:.0e}" if row.tolerance else "exact"


def _write(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")


def _cases(roots: Sequence[Path]) -> Iterator[Path]:
    for root in roots:
        cases = list(find_cases(root)) if root.is_dir() else []
        yield from cases or [root]


if __name__ == "__main__":
    sys.exit(main())
