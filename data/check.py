"""Check a mixture before a run: what would be rejected, what would be trained although it is wrong, how full packs will be.

    python -m data.check --dataset_config_file configs/quickstart.yaml --html check.html

Reads the YAML and the records with the trainer's own code; needs the tokenizer and the configurations of a model directory, no
weights. What is looked for is the table in `data/checks.py`. Exit code: 0 clean, 1 faults found, 2 nothing could be checked.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from data.check_groups import (
    GroupFault,
    YamlLines,
    copies,
    group_faults,
    leaks,
    open_mixture,
    open_validation,
)
from data.check_page import render
from data.check_report import Report, as_json, in_order, text_lines
from data.checks import CHECKS
from data.inspect import add_plan_flags, parse_plan_args, stream_plan
from data.mixture import Group, GroupSpec, build_groups, load_mixture
from data.prediction import predict
from data.scan import scan_groups
from data.stdout import nobody_reads
from data.tokens import Tokenizer

TRAINER_LIMITS = {
    "expected_num_tokens": 32768,
    "max_num_tokens": 36864,
    "max_num_tokens_per_sample": 16384,
    "text_cond_dropout_prob": 0.1,
    "vit_cond_dropout_prob": 0.3,
    "vae_cond_dropout_prob": 0.3,
}
"""Defaults of the trainer's flags; `tests/unit/data/test_check.py` holds them against `train/args/data.py`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check; returns the exit code."""
    try:
        args = parse_plan_args(_parser(), argv)
        _require_numbers(args)
        tokenizer = Tokenizer(args.model_path)
        report = check(args, tokenizer)
        if args.html:
            args.html.parent.mkdir(parents=True, exist_ok=True)
            args.html.write_text(render(report, tokenizer), encoding="utf-8", errors="backslashreplace")
    except (ValueError, OSError, RuntimeError) as e:
        sys.stderr.write(f"error: {' '.join(str(e).split())}\n")
        return 2
    try:
        lines = [json.dumps(as_json(report), indent=1)] if args.json else text_lines(report, args.show)
        sys.stdout.writelines(f"{line}\n" for line in lines)
        sys.stdout.flush()
    except BrokenPipeError:
        nobody_reads()
    return 1 if report.counted else 0


def check(args: argparse.Namespace, tokenizer: Tokenizer) -> Report:
    """Look at everything.

    Raises:
        ValueError: if the mixture cannot be read, or no group of it.
    """
    started = time.monotonic()
    found: list[GroupFault] = []

    def build(spec: GroupSpec) -> Group:
        return build_groups((spec,), tokenizer, args.index_cache_dir)[0]

    groups = open_mixture(args.dataset_config_file, build, found)
    validation = open_validation(args.dataset_config_file, build, found)
    plan = stream_plan(args, groups, tokenizer)
    scan = partial(scan_groups, tokenizer=tokenizer, num_workers=args.num_workers)
    samples = None if args.scan else args.samples
    whole = replace(plan, groups=(*groups, *validation))
    scans = scan(whole, samples=samples, keep=args.show, progress=_Progress(args.dataset_config_file))
    lines = YamlLines(args.dataset_config_file)
    for group in whole.groups:
        found += [(kind, group.name, faults) for kind, faults in scans[group.name].faults.items()]
        found += copies(group, scans[group.name], args.show)
    for group in groups:
        found += group_faults(group, scans[group.name], plan, lines)
    found += leaks(groups, scans, validation, scans, args.show)
    if args.against:
        others = build_groups(load_mixture(args.against), tokenizer, args.index_cache_dir)
        their_scans = scan(
            replace(plan, groups=others), samples=None, keep=0, progress=_Progress(args.against)
        )
        found += leaks(groups, scans, others, their_scans, args.show)
    prediction, no_prediction = None, ""
    try:
        prediction = predict(plan, scans, args.packs_per_step)
    except ValueError as e:
        no_prediction = str(e)
    return Report(
        file=args.dataset_config_file,
        plan=plan,
        scans=scans,
        faults=tuple(in_order(found, args.accept)),
        prediction=prediction,
        no_prediction=no_prediction,
        seconds=time.monotonic() - started,
        validation=validation,
    )


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
