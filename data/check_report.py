"""What `data/check.py` found, worst first: as JSON, and as text for people."""

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.checks import CHECKS, SEVERITIES
from data.mixture import Group
from data.prediction import Prediction
from data.scan import COLUMNS, Found, Place, Scan
from data.stream import StreamPlan

DATA_VARIABLE = "WEFT_DATA"
"""Environment variable that published mixtures of this project take the data's folder from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One kind of fault in one group.

    Attributes:
        kind: row of `CHECKS`.
        severity: of that row, or `note` if the kind was accepted.
        group: of the mixture; empty if it is of none.
        count: records (or keys, files) that have it.
        first: some of them.
    """

    kind: str
    severity: str
    group: str
    count: int
    first: tuple[Place, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that was found.

    Attributes:
        file: the mixture.
        plan: what a run would stream.
        scans: by group.
        faults: the worst first.
        prediction: of packs; None if none could be made.
        no_prediction: why.
        seconds: that it took.
        validation: groups under `val`, which are looked at and not packed; their names begin with `val.`.
    """

    file: Path
    plan: StreamPlan
    scans: Mapping[str, Scan]
    faults: tuple[Fault, ...]
    prediction: Prediction | None
    no_prediction: str
    seconds: float
    validation: tuple[Group, ...] = ()

    @property
    def groups(self) -> tuple[Group, ...]:
        """All that were looked at."""
        return (*self.plan.groups, *self.validation)

    def near(self, text: str) -> str:
        """A text in which paths are relative to the mixture's directory, or to $WEFT_DATA, where that is shorter."""
        return near_paths(text, self.folder)

    @property
    def folder(self) -> Path:
        """Of the mixture, whose paths are relative to it."""
        return self.file.resolve().parent

    @property
    def counted(self) -> list[Fault]:
        """Faults that are more than notes."""
        return [fault for fault in self.faults if fault.severity != "note"]


def near_paths(text: str, folder: Path) -> str:
    """A text in which absolute paths below some folders are written from there.

    Args:
        text: a place or a message.
        folder: what paths are relative to: it, two above it, and that of the environment variable WEFT_DATA.
    """
    near = {str(folder): ""}
    for above, parent in enumerate(folder.parents[:2], start=1):
        near[str(parent)] = "../" * above
    if data := os.environ.get(DATA_VARIABLE):
        near[os.path.normpath(folder / data)] = f"${DATA_VARIABLE}/"
    for base, short in sorted(near.items(), key=lambda item: -len(item[0])):
        if len(base) > len(short):
            parts = re.split(rf"(?<![\w/.$]){re.escape(base)}/(?=[^/\s])", text)
            text = short.join(parts)
    return text


def in_order(found: Sequence[tuple[str, str, Found]], accepted: Sequence[str]) -> list[Fault]:
    """The worst first; kinds that are accepted become notes."""
    faults = [
        Fault(
            kind=kind,
            severity="note" if kind in accepted else CHECKS[kind].severity,
            group=group,
            count=places.count,
            first=tuple(places.first),
        )
        for kind, group, places in found
    ]
    rank = list(CHECKS)
    return sorted(faults, key=lambda f: (SEVERITIES.index(f.severity), rank.index(f.kind), -f.count))


def token_counts(scan: Scan) -> dict[str, dict[str, float]]:
    """Mean, median, 95th percentile and maximum of every column of `COLUMNS`."""
    if not scan.usable:
        return {}
    table = scan.token_table()
    return {
        name: {
            "mean": float(table[:, c].mean()),
            "median": float(np.median(table[:, c])),
            "p95": float(np.percentile(table[:, c], 95)),
            "max": int(table[:, c].max()),
        }
        for c, name in enumerate(COLUMNS)
    }


def as_json(report: Report) -> dict[str, Any]:
    """The report as JSON."""
    return {
        "dataset_config_file": str(report.file),
        "clean": not report.counted,
        "seconds": round(report.seconds, 3),
        "groups": {
            group.name: {
                "weight": group.weight,
                "records": scan.records,
                "looked_at": scan.looked_at,
                "usable": scan.usable,
                "tokens": token_counts(scan),
            }
            for group in report.groups
            for scan in [report.scans[group.name]]
        },
        "packs": asdict(report.prediction) if report.prediction else {"none_because": report.no_prediction},
        "faults": [
            {**asdict(fault), "title": CHECKS[fault.kind].title, "remedy": CHECKS[fault.kind].remedy}
            for fault in report.faults
        ],
    }


def text_lines(report: Report, show: int) -> Iterator[str]:
    """The report for people."""
    yield summary(report)
    yield ""
    yield from _aligned(list(group_rows(report)))
    yield ""
    yield packs_line(report)
    if any(scan.looked_at < scan.records for scan in report.scans.values()):
        yield "copies and leaks are looked for among the records looked at; --scan looks at all"
    if report.faults:
        yield f"paths are relative to {report.folder}"
    for kind, of_kind in by_kind(report.faults):
        yield ""
        check, severity = CHECKS[kind], of_kind[0].severity
        yield f"{severity.upper()} {kind}: {check.title}"
        yield f"  do: {check.remedy}"
        named = {
            fault: [(report.near(p.where), report.near(p.message)) for p in fault.first[:show]]
            for fault in of_kind
        }
        width = max((len(where) for places in named.values() for where, _ in places), default=0)
        for fault, places in named.items():
            yield from (f"  {where.ljust(width)}  {message}" for where, message in places)
            if more := fault.count - len(places):
                yield f"  and {more:,} more in {fault.group}"


def by_kind(faults: Sequence[Fault]) -> Iterator[tuple[str, list[Fault]]]:
    """The faults of one kind together, of whatever group."""
    for kind, of_kind in itertools.groupby(faults, key=lambda fault: fault.kind):
        yield kind, list(of_kind)


def summary(report: Report) -> str:
    """One line: what was looked at, and how it stands."""
    records, looked_at = (
        sum(getattr(scan, name) for scan in report.scans.values()) for name in ("records", "looked_at")
    )
    seen = "all" if records == looked_at else f"{looked_at:,}"
    counts = {s: sum(f.count for f in report.faults if f.severity == s) for s in ("error", "warning")}
    kinds = len({fault.kind for fault in report.counted})
    told = " and ".join(f"{n:,} {severity}{'s' * (n != 1)}" for severity, n in counts.items() if n)
    verdict = f"{told} of {kinds} kind{'s' * (kinds != 1)}" if kinds else "no fault"
    looked = (
        f"{seen} of {records:,} records of {len(report.scans)} groups looked at in {report.seconds:.1f} s"
    )
    return f"{report.file}: {verdict}; {looked}"


def packs_line(report: Report) -> str:
    """One line: how full packs will be."""
    p, budget = report.prediction, report.plan.budget
    if p is None:
        return f"packs: no prediction: {report.no_prediction}"
    return (
        f"packs ({budget.policy}, {p.packs} simulated): {p.efficiency:.1%} of {budget.maximum:,} tokens full, the emptiest "
        f"{p.emptiest:.1%}; {p.samples_per_pack:.1f} samples each; {steps_text(p.steps_per_epoch)} steps per epoch"
    )


def steps_text(steps: float) -> str:
    return f"{steps:,.0f}" if steps >= 100 else f"{steps:.3g}"


GROUP_HEADER = (
    "group", "records", "looked at", "unusable", "weight", "token share", "steps a pass", "tokens: mean", "median", "p95",
    "max", "text", "und", "cond", "gen", "with loss",
)  # fmt: skip
"""Columns of `group_rows`; those after `max` are means."""


def group_rows(report: Report) -> Iterator[tuple[str, ...]]:
    """The table of groups, its header first."""
    yield GROUP_HEADER
    for group in report.groups:
        scan, tokens, p = report.scans[group.name], token_counts(report.scans[group.name]), report.prediction
        share = f"{p.share[group.name]:.1%}" if p and group.name in p.share else "-"
        steps = steps_text(p.steps_per_pass[group.name]) if p and group.name in p.steps_per_pass else "-"
        counts = [
            f"{tokens['all'][what]:,.0f}" if tokens else "-" for what in ("mean", "median", "p95", "max")
        ]
        parts = [f"{tokens[name]['mean']:,.0f}" if tokens else "-" for name in COLUMNS[1:]]
        numbers = (
            f"{scan.records:,}",
            f"{scan.looked_at:,}",
            f"{scan.looked_at - scan.usable:,}",
            f"{group.weight:g}",
        )
        yield (group.name, *numbers, share, steps, *counts, *parts)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(
            cell.rjust(width) if c else cell.ljust(width)
            for c, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
