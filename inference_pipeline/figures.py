"""From the rows of results.jsonl to the figures of statistics.json, in plain functions; `evaluate.py` calls them.

A row is one sample: `sample_id`, `task`, `main_task_type`, `correct` and the columns of its task. A figure is the mean of one
column over the rows of one task. A sample without output has a row like any other, with `correct` false and 0 in every score.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One headline number: the mean of `column` over the rows of `task`, and what it has to reach (if it is a target)."""

    task: str
    column: str
    title: str
    target: float | None = None


FIGURES: dict[str, Figure] = {
    "vqa_exact": Figure(task="vqa", column="correct", title="Questions answered exactly", target=0.95),
    "generation_digit": Figure(
        task="t2i", column="digit_right", title="Drawn digits as requested", target=0.90
    ),
    "generation_colour": Figure(
        task="t2i", column="colour_right", title="Drawn in the requested colour", target=0.95
    ),
    "edit_success": Figure(task="edit", column="correct", title="Edited as asked, nothing else", target=0.85),
    "box_acc_50": Figure(task="box", column="correct", title="Boxes with IoU of 0.5 or more", target=0.95),
    "mask_miou": Figure(task="mask", column="mask_iou", title="Masks, mean IoU", target=0.85),
    "text_exact": Figure(task="text", column="correct", title="Text-only answers, exact"),
}


def mean(rows: Iterable[Row], column: str) -> float | None:
    """Mean of a column, a row without it counting as 0; None without rows: nothing was measured."""
    values = [float(row.get(column) or 0.0) for row in rows]
    return round(sum(values) / len(values), 6) if values else None


def compute_statistics(rows: Sequence[Row], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything statistics.json says.

    Args:
        rows: one per sample of the evaluation, the ones without output included.
        settings: how the run was made and judged (weights, seed, split, the judge's own accuracy, ...); copied to the top level.

    Returns:
        A JSON-able mapping: the figures by name, `n` per figure, `overall`, `by_task_type`, `edit_success_by_kind_and_digits`,
        the settings.
    """
    by_task: dict[str, list[Row]] = defaultdict(list)
    by_type: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_task[row["task"]].append(row)
        by_type[row["main_task_type"]].append(row)
    return {
        **{name: mean(by_task[f.task], f.column) for name, f in FIGURES.items()},
        "n": {name: len(by_task[f.task]) for name, f in FIGURES.items()},
        "overall": _summary(rows),
        "by_task_type": {kind: _summary(of_type) for kind, of_type in sorted(by_type.items())},
        "edit_success_by_kind_and_digits": _edits(by_task["edit"]),
        **settings,
    }


def _edits(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, Any]]]:
    """Edits by what is asked and how many digits the picture had before: `{remove: {"2": {"n": …, "edit_success": …}}}`."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if "wanted" not in row or "edit_kind" not in row:  # of another data set's edits
            continue
        # The digits that have to be there afterwards; one that was to go was there before.
        digits = len(row["wanted"]) + (row["edit_kind"] == "remove")
        found.setdefault(row["edit_kind"], {}).setdefault(str(digits), []).append(row)
    return {
        kind: {
            digits: {"n": len(alike), "edit_success": mean(alike, "correct")}
            for digits, alike in sorted(by_digits.items())
        }
        for kind, by_digits in sorted(found.items())
    }


def _summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Size, share of correct samples and the mean of every numeric column that the rows have."""
    numeric = {
        k for row in rows for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)
    }
    return {
        "n": len(rows),
        "correct": mean(rows, "correct"),
        "missing_outputs": sum(bool(row.get("missing")) for row in rows),
        # Averaged over the rows that have the column: in `overall`, tasks with other columns do not dilute it.
        **{k: mean([row for row in rows if k in row], k) for k in sorted(numeric)},
    }


def figure_lines(statistics: Mapping[str, Any]) -> list[str]:
    """The figures as a table for the terminal."""
    lines = [f"{'figure':<20}{'value':>8}{'target':>9}{'n':>8}"]
    for name, figure in FIGURES.items():
        value = statistics.get(name)
        shown = "-" if value is None else f"{value:.3f}"
        target = "" if figure.target is None else f"{figure.target:.2f}"
        mark = (
            ""
            if value is None or figure.target is None
            else ("  reached" if value >= figure.target else "  missed")
        )
        lines.append(f"{name:<20}{shown:>8}{target:>9}{statistics.get('n', {}).get(name, 0):>8}{mark}")
    return lines
