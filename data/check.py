"""Check a mixture before a run: what would be rejected, what would be trained although it is wrong, how full packs will be.

    python -m data.check --dataset_config_file configs/quickstart.yaml --html check.html

Reads the YAML and the records with the trainer's own code; needs the tokenizer and the configurations of a model directory, no
weights. What is looked for is the table in `data/checks.py`. Exit code: 0 clean, 1 faults found, 2 nothing could be checked.
"""

import argparse
import itertools
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data.checks import CHECKS, SEVERITIES
from data.inspect import add_plan_flags, parse_plan_args, stream_plan
from data.mixture import Group, GroupSpec, build_groups, load_mixture
from data.prediction import Prediction, predict
from data.scan import COLUMNS, Found, Place, Scan, scan_groups
from data.sources import ConcatSource
from data.stream import StreamPlan
from data.tokens import Tokenizer

TRAINER_LIMITS = {
    "expected_num_tokens": 32768,
    "max_num_tokens": 36864,
    "max_num_tokens_per_sample": 16384,
    "text_cond_dropout_prob": 0.1,
    "vit_cond_dropout_prob": 0.3,
    "vae_cond_dropout_prob": 0.3,
}
"""Defaults of the trainer's flags; `tests/unit/data/test_check.py` holds them against `train/config.py`."""


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
    """

    file: Path
    plan: StreamPlan
    scans: Mapping[str, Scan]
    faults: tuple[Fault, ...]
    prediction: Prediction | None
    no_prediction: str
    seconds: float

    @property
    def counted(self) -> list[Fault]:
        """Faults that are more than notes."""
        return [fault for fault in self.faults if fault.severity != "note"]


def main(argv: Sequence[str] | None = None) -> int:
    """Check; returns the exit code."""
    logging.getLogger("data").setLevel(logging.ERROR)  # its warnings are faults here
    try:
        args = parse_plan_args(_parser(), argv)
        _require_numbers(args)
        tokenizer = Tokenizer(args.model_path)
        report = check(args, tokenizer)
        if args.html:
            from data.check_page import render

            args.html.parent.mkdir(parents=True, exist_ok=True)
            args.html.write_text(render(report, tokenizer), encoding="utf-8")
    except (ValueError, OSError, RuntimeError) as e:
        sys.stderr.write(f"error: {' '.join(str(e).split())}\n")
        return 2
    try:
        lines = [json.dumps(as_json(report), indent=1)] if args.json else text_lines(report, args.show)
        sys.stdout.writelines(f"{line}\n" for line in lines)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough (`| head`); what is still buffered must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1 if report.counted else 0


def check(args: argparse.Namespace, tokenizer: Tokenizer) -> Report:
    """Look at everything.

    Raises:
        ValueError: if the mixture cannot be read, or no group of it.
    """
    started = time.monotonic()
    found: list[tuple[str, str, Found]] = []
    groups = open_mixture(args, tokenizer, found)
    plan = stream_plan(args, groups, tokenizer)
    samples = None if args.scan else args.samples
    progress = _Progress(args.dataset_config_file)
    scans = scan_groups(
        plan, tokenizer, samples=samples, keep=args.show, num_workers=args.num_workers, progress=progress
    )
    lines = YamlLines(args.dataset_config_file)
    for group in groups:
        scan = scans[group.name]
        found += [(kind, group.name, faults) for kind, faults in scan.faults.items()]
        found += [(kind, group.name, faults) for kind, faults in _group_faults(group, scan, plan, lines)]
        found += [(kind, group.name, faults) for kind, faults in _copies(group, scan, args.show)]
    if args.against:
        found += _leaks(plan, scans, args, tokenizer)
    prediction, no_prediction = None, ""
    try:
        prediction = predict(plan, scans, args.packs_per_step)
    except ValueError as e:
        no_prediction = str(e)
    return Report(
        file=args.dataset_config_file,
        plan=plan,
        scans=scans,
        faults=tuple(_in_order(found, args.accept)),
        prediction=prediction,
        no_prediction=no_prediction,
        seconds=time.monotonic() - started,
    )


def _in_order(found: Sequence[tuple[str, str, Found]], accepted: Sequence[str]) -> list[Fault]:
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


# ------------------------------------------------------------------------------------------------ the mixture


def open_mixture(
    args: argparse.Namespace, tokenizer: Tokenizer, found: list[tuple[str, str, Found]]
) -> tuple[Group, ...]:
    """The groups that can be opened; what is wrong with the others is added to `found`.

    Raises:
        ValueError: if no group is left.
    """
    file: Path = args.dataset_config_file
    faults: list[ValueError] = []
    with _told() as warnings:
        try:
            specs = load_mixture(file, faults=faults)
        except ValueError:
            if not faults:
                raise
            specs = ()
    lines = YamlLines(file)
    found += [_yaml_fault(file, str(fault), lines) for fault in faults]
    for warning in warnings:
        _, name, place = _yaml_fault(file, warning, lines)
        found.append(("no_effect", name, place))

    def build(spec: GroupSpec) -> Group:
        return build_groups((spec,), tokenizer, args.index_cache_dir)[0]

    groups = [group for spec in specs if (group := _open(spec, build, lines, found)) is not None]
    if not groups:
        told = [place.message for _, _, places in found for place in places.first]
        raise ValueError(f"{file}: no group can be checked: {' | '.join(told)}")
    return tuple(groups)


@contextmanager
def _told() -> Iterator[list[str]]:
    """What data/mixture.py warns of meanwhile."""
    logger, messages = logging.getLogger(load_mixture.__module__), list[str]()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _yaml_fault(file: Path, text: str, lines: "YamlLines") -> tuple[str, str, Found]:
    path, _, message = text.removeprefix(f"{file}: ").partition(": ")
    key = re.search(r"(?:key|set|group) '([^']+)'", message)
    line = lines.of(f"{path}.{key.group(1)}" if key else path)
    by_end = {"dataset_names": "unknown_dataset", "weight": "wrong_weight", "num_used_data": "wrong_count"}
    kind = next((kind for end, kind in by_end.items() if f".{end}" in path), "bad_key")
    place = Place(line, f"{file}:{line}", f"{path}: {message}")
    return kind, path.partition(".")[0], Found(1, [place])


def _open(
    spec: GroupSpec,
    build: Callable[[GroupSpec], Group],
    lines: "YamlLines",
    found: list[tuple[str, str, Found]],
) -> Group | None:
    """The group, of those of its data sets that can be opened: one by one, so that each missing one is named."""
    parts: list[Group] = []
    where, line = lines.place(spec.name)
    for source in spec.sources:
        try:
            with _told() as warnings:
                part = build(replace(spec, sources=(source,)))
        except (ValueError, OSError) as e:
            message = str(e).removeprefix(f"group {spec.name!r}: ")
            location = source.location[source.path_key]
            is_of_the_data = os.path.dirname(location) in message
            at = lines.text_of(os.path.basename(location)) if is_of_the_data else line
            place = Place(at, f"{lines.file}:{at}", f"{source.dataset}: {message}")
            found.append(("missing_source" if is_of_the_data else "bad_key", spec.name, Found(1, [place])))
            if not is_of_the_data:
                return None
            continue
        parts.append(part)
        found += [("short_source", spec.name, Found(1, [Place(line, where, said)])) for said in warnings]
    if len(parts) < 2:
        return parts[0] if parts else None
    return replace(parts[0], source=ConcatSource([part.source for part in parts]))


class YamlLines:
    """On which line of a YAML file a key stands."""

    def __init__(self, file: Path):
        self.file = file
        self._text = file.read_text(encoding="utf-8").splitlines()
        self._lines: dict[str, int] = {}
        self._walk(yaml.compose("\n".join(self._text), yaml.SafeLoader), "")

    def of(self, path: str) -> int:
        """Line of the longest beginning of a dotted path that the file has."""
        while path and path not in self._lines:
            path = path.rpartition(".")[0]
        return self._lines.get(path, 1)

    def place(self, group: str) -> tuple[str, int]:
        """File and line of a group; of `vqa_part`, those of the part in `vqa`."""
        parts = [f"{group[:i]}.dataset_names.{group[i + 1 :]}" for i, c in enumerate(group) if c == "_"]
        line = next((self._lines[path] for path in (group, *parts) if path in self._lines), 1)
        return f"{self.file}:{line}", line

    def text_of(self, text: str) -> int:
        """First line that contains a text; 1 if none does."""
        return next((n for n, line in enumerate(self._text, 1) if text in line), 1)

    def _walk(self, node: yaml.Node | None, path: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            place = f"{path}.{key.value}" if path else str(key.value)
            self._lines[place] = key.start_mark.line + 1
            self._walk(value, place)


# ------------------------------------------------------------------------------------ faults of a whole group


def _group_faults(
    group: Group, scan: Scan, plan: StreamPlan, lines: YamlLines
) -> Iterator[tuple[str, Found]]:
    where, line = lines.place(group.name)

    def one(message: str) -> Found:
        return Found(1, [Place(line, where, f"{group.name}: {message}")])

    if group.weight == 0 and not group.is_mandatory:
        yield "never_drawn", one("weight 0")
        return
    if scan.records < plan.num_lanes:
        yield "tiny_group", one(f"{scan.records:,} records on {plan.num_lanes} lanes")
    unusable = scan.looked_at - scan.usable
    if unusable > int(plan.max_reject_fraction * scan.looked_at):
        share = f"{unusable:,} of {scan.looked_at:,} records looked at ({unusable / scan.looked_at:.2%})"
        yield (
            "too_many_rejects",
            one(f"{share} are unusable, --max_reject_fraction is {plan.max_reject_fraction}"),
        )


def _copies(group: Group, scan: Scan, keep: int) -> Iterator[tuple[str, Found]]:
    for kind, hashes, what in (
        ("duplicate_row", scan.hashes("rows"), "texts and pictures"),
        ("repeated_text", scan.hashes("texts"), "texts"),
    ):
        pairs = _equal_pairs(hashes)
        if pairs:
            places = [
                Place(later, _where(group, later), f"the same {what} as {_where(group, first)}")
                for first, later in pairs[:keep]
            ]
            yield kind, Found(len(pairs), places)


def _equal_pairs(hashes: np.ndarray) -> list[tuple[int, int]]:
    """(first record, later record) of every record that has the hash of an earlier one."""
    # A record that is read several times because num_used_data asks for it is no copy.
    hashes = hashes[np.sort(np.unique(hashes[:, 2], return_index=True)[1])]
    _, first, back = np.unique(hashes[:, 1], return_index=True, return_inverse=True)
    later = np.flatnonzero(first[back] != np.arange(len(hashes)))
    return [(int(hashes[first[back[i]], 0]), int(hashes[i, 0])) for i in later]


def _leaks(
    plan: StreamPlan, scans: Mapping[str, Scan], args: argparse.Namespace, tokenizer: Tokenizer
) -> list[tuple[str, str, Found]]:
    """Pictures, and texts without pictures, that the mixture `--against` has as well."""
    others = build_groups(load_mixture(args.against), tokenizer, args.index_cache_dir)
    progress = _Progress(args.against)
    theirs = scan_groups(
        replace(plan, groups=others),
        tokenizer,
        samples=None,
        keep=0,
        num_workers=args.num_workers,
        progress=progress,
    )
    result = []
    for kind, field, what in (
        ("leaked_picture", "pictures", "a picture of"),
        ("leaked_text", "texts", "the same texts as"),
    ):
        known = {
            int(digest): (group, int(index))
            for group in reversed(others)
            for index, digest, _ in reversed(theirs[group.name].hashes(field))
        }
        digests = np.array(list(known), np.uint64)
        for group in plan.groups:
            hashes = scans[group.name].hashes(field)
            shared = hashes[np.isin(hashes[:, 1], digests)]
            # A record with two shared pictures is one record.
            shared = shared[np.unique(shared[:, 0], return_index=True)[1]]
            if len(shared):
                places = [
                    Place(int(index), _where(group, int(index)), f"{what} {_where(*known[int(digest)])}")
                    for index, digest, _ in shared[: args.show]
                ]
                result.append((kind, group.name, Found(len(shared), places)))
    return result


def _where(group: Group, index: int) -> str:
    return group.source.read(index).where


# ---------------------------------------------------------------------------------------------------- reports


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
            for group in report.plan.groups
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
    for kind, of_kind in by_kind(report.faults):
        yield ""
        check, severity = CHECKS[kind], of_kind[0].severity
        yield f"{severity.upper()} {kind}: {check.title}"
        yield f"  do: {check.remedy}"
        width = max((len(place.where) for fault in of_kind for place in fault.first), default=0)
        for fault in of_kind:
            named = fault.first[:show]
            yield from (f"  {place.where.ljust(width)}  {place.message}" for place in named)
            if more := fault.count - len(named):
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
    verdict = f"{counts['error']:,} errors and {counts['warning']:,} warnings of {kinds} kinds"
    verdict = verdict if kinds else "no fault"
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
    for group in report.plan.groups:
        scan, tokens, p = report.scans[group.name], token_counts(report.scans[group.name]), report.prediction
        share = f"{p.share.get(group.name, 0):.1%}" if p else "-"
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


class _Progress:
    """How far the scan is, on stderr: a line that is written over on a terminal, else a line every 10 s."""

    def __init__(self, file: Path):
        self._file, self._told = file, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        terminal, now = sys.stderr.isatty(), time.monotonic()
        if now - self._told < (0.2 if terminal else 10) and not (terminal and done == total):
            return
        self._told = now
        line = f"{self._file}: {done:,} of {total:,} records ({done / total:.0%})"
        end = "\n" if not terminal or done == total else ""
        sys.stderr.write(f"\r{line}{end}" if terminal else f"{line}{end}")
        sys.stderr.flush()


def _require_numbers(args: argparse.Namespace) -> None:
    for name, low in (
        ("samples", 1),
        ("packs_per_step", 1),
        ("show", 0),
        ("num_workers", 0),
        ("num_lanes", 1),
    ):
        if getattr(args, name) < low:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least {low}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.check",
        description="Check a mixture before a run. Exit code: 0 clean, 1 faults, 2 unreadable.",
    )
    add_plan_flags(parser)
    parser.set_defaults(**TRAINER_LIMITS)
    parser.add_argument("--samples", type=int, default=1000, help="records to look at per group")
    parser.add_argument("--scan", action="store_true", help="look at every record instead")
    parser.add_argument(
        "--against",
        type=Path,
        help="a mixture that must share no picture and no text with this one (validation data)",
    )
    parser.add_argument(
        "--packs_per_step", type=int, default=1, help="ranks times accumulation steps, for steps per epoch"
    )
    parser.add_argument(
        "--accept",
        nargs="*",
        default=[],
        choices=CHECKS,
        metavar="KIND",
        help="kinds of fault that are told and not counted",
    )
    parser.add_argument(
        "--show", type=int, default=20, help="how many records are named per fault (default: %(default)s)"
    )
    parser.add_argument(
        "--num_workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="processes that scan; 0: this one",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--html", type=Path, help="write a page that shows samples as the model gets them")
    return parser


if __name__ == "__main__":
    sys.exit(main())
