"""One self-contained HTML page about a run: figures against targets, timings, training curves, and what the model did.

In: a run directory (`timings.json`, `results_dir/train_log.jsonl`) and an evaluation directory (`statistics.json`,
`results.jsonl`, `images/`). Out: one file that needs no network and no other file.

    python -m inference_pipeline.report --run_dir runs/quickstart --output runs/quickstart/report.html
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from data.page import page
from inference_pipeline.curves import charts, read_log
from inference_pipeline.figures import FIGURES
from inference_pipeline.galleries import GALLERIES, Row, gallery_section
from inference_pipeline.parse_statistics_to_csv import read_statistics
from train.files import replace_text

LOG_PLACES = ("results_dir/train_log.jsonl", "results/train_log.jsonl", "train_log.jsonl")
"""Where a run's training log may lie, tried in this order."""

STAGE_COLOURS = ("#9aa7ba", "#6f8fc9", "#4b74cf", "#2457c5", "#173a86", "#5d6878", "#8d97a6")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; 1 and one clear line if the evaluation cannot be read."""
    parser = argparse.ArgumentParser(description="write a self-contained HTML report of a run")
    parser.add_argument("--run_dir", type=Path, required=True, help="holds timings.json and the training log")
    parser.add_argument(
        "--eval_dir", type=Path, help="output directory of the evaluation; default: --run_dir"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--title", default="Weft quickstart")
    args = parser.parse_args(argv)
    eval_dir = args.eval_dir or args.run_dir
    try:
        text = render(
            title=args.title,
            statistics=read_statistics(eval_dir),
            rows=_read_results(eval_dir / "results.jsonl"),
            eval_dir=eval_dir,
            log=_read_training_log(args.run_dir),
            stages=_read_stages(args.run_dir / "timings.json"),
        )
        args.output.parent.mkdir(parents=True, exist_ok=True)
        replace_text(args.output, text)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {len(text.encode()) / 2**20:.1f} MiB, one file")
    return 0


def render(
    *,
    title: str,
    statistics: Mapping[str, Any],
    rows: Sequence[Row],
    eval_dir: Path,
    log: Mapping[str, Sequence[tuple[float, float]]],
    stages: Mapping[str, float],
) -> str:
    """The page."""
    tasks = [task for task in GALLERIES if any(row["task"] == task for row in rows)]
    links = [("figures", "Figures"), ("timings", "Time"), ("curves", "Training")]
    links += [(task, GALLERIES[task].title) for task in tasks]
    galleries = "".join(
        gallery_section(
            task, [row for row in rows if row["task"] == task], eval_dir, _named_figures(task, statistics)
        )
        for task in tasks
    )
    body = (
        f"{_opening(title, statistics, stages)}{_tiles(statistics)}{_small_print(statistics)}"
        f"{_timings(stages)}{_curves(log)}{galleries}"
    )
    return page(title, links, body, Path(__file__).with_name("report.css"))


# ------------------------------------------------------------------------------------------------------------ the opening


def _opening(title: str, statistics: Mapping[str, Any], stages: Mapping[str, float]) -> str:
    aims = {name: figure.target for name, figure in FIGURES.items() if figure.target is not None}
    reached = sum(statistics.get(name) is not None and statistics[name] >= aim for name, aim in aims.items())
    training = f", trained in {_minutes(stages['training'])}," if "training" in stages else ""
    return (
        f'<header id="figures"><h1>{escape(title)}</h1><p class="lead">One model that answers, draws, edits, points and '
        f"segments{training} on scenes of real handwritten digits; here on held-out scenes with digits it never saw. "
        f"<b>{reached} of {len(aims)} targets reached.</b></p></header>"
    )


def _tiles(statistics: Mapping[str, Any]) -> str:
    tiles = []
    for name, figure in FIGURES.items():
        if figure.target is None:
            continue
        value, size = statistics.get(name), statistics.get("n", {}).get(name, 0)
        if value is None:
            mark, shown, fill = '<span class="mark none">not measured</span>', "–", ""
        else:
            passed = value >= figure.target
            kind, word = ("pass", "✓ reached") if passed else ("fail", "✗ missed")
            mark = f'<span class="mark {kind}">{word}</span>'
            short = "" if passed else ' class="short"'
            shown, fill = f"{value:.3f}", f'<i{short} style="width:{100 * value:.2f}%"></i>'
        tiles.append(
            f'<div class="tile"><div class="top"><span class="name">{figure.title}</span>{mark}</div>'
            f'<div class="value">{shown}</div>'
            f'<div class="bar">{fill}<u style="left:{100 * figure.target:.2f}%"></u></div>'
            f'<div class="top of"><span>target {figure.target:.2f}, n = {size:,}</span><code>{name}</code></div></div>'
        )
    return f"""<div class="tiles">{"".join(tiles)}</div>"""


def _small_print(statistics: Mapping[str, Any]) -> str:
    facts = []
    if (value := statistics.get("text_exact")) is not None:
        facts.append(f"text-only answers exact {value:.3f} (n = {statistics['n'].get('text_exact', 0):,})")
    if (value := statistics.get("judge_accuracy_on_real_test_digits")) is not None:
        facts.append(f"the judge reads {100 * value:.1f}% of real test digits correctly")
    perfect = [statistics.get(f"judge_on_true_pictures_{what}") for what in ("digit", "colour", "edit")]
    if all(value is not None for value in perfect):
        shown = ", ".join(f"{value:.3f}" for value in perfect)
        facts.append(
            f"on the true pictures it gives {shown} (digit, colour, edit): what a perfect model would get"
        )
    if (missing := statistics.get("overall", {}).get("missing_outputs")) is not None:
        facts.append(f"{missing} samples without output, counted as failures")
    settings = (
        "model_id",
        "weights",
        "split",
        "seed",
        "num_timesteps",
        "cfg_text_scale",
        "cfg_img_scale",
        "timestamp",
    )
    made = ", ".join(f"{name} {statistics[name]}" for name in settings if name in statistics)
    judged = f"{'; '.join(facts)}." if facts else ""
    return f'<p class="note">{escape(judged[:1].upper() + judged[1:])}</p><p class="note">{escape(made)}</p>'


def _named_figures(task: str, statistics: Mapping[str, Any]) -> str:
    named = []
    for name in GALLERIES[task].figures:
        value, size = statistics.get(name), statistics.get("n", {}).get(name, 0)
        if value is not None:
            named.append(f"<b>{FIGURES[name].title}: {value:.3f}</b> (n = {size:,})")
    return ", ".join(named)


# ---------------------------------------------------------------------------------------------------- timings and curves


def _timings(stages: Mapping[str, float]) -> str:
    if not stages:
        return '<section id="timings"><h2>Time</h2><p class="note">No timings.json in the run directory.</p></section>'
    total = sum(stages.values()) or 1.0
    strip, heads, cells, at = "", "", "", 0.0
    for (name, seconds), colour in zip(stages.items(), STAGE_COLOURS * len(stages), strict=False):
        share = seconds / total
        strip += f'<rect x="{1000 * at:.1f}" width="{max(1000 * share - 1.5, 0.5):.1f}" height="30" fill="{colour}"/>'
        heads += f'<th><i class="swatch" style="background:{colour}"></i>{escape(name)}</th>'
        cells += f"<td>{_minutes(seconds)} <small>{100 * share:.0f}%</small></td>"
        at += share
    label = escape("; ".join(f"{name} {_minutes(seconds)}" for name, seconds in stages.items()))
    return (
        '<section id="timings"><h2>Time</h2><p class="note">Wall time of each stage of the command that made this page.</p>'
        f'<svg class="stages" viewBox="0 0 1000 30" preserveAspectRatio="none" role="img" aria-label="{label}">{strip}</svg>'
        f'<table class="times"><tr>{heads}<th>together</th></tr><tr>{cells}<td>{_minutes(total)}</td></tr></table></section>'
    )


def _curves(log: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    drawn = charts(log)
    note = "Over training steps: the range of the logged values faint, their running mean over it; the number is the last mean."
    if not drawn:
        note = "No training log with two steps or more was found."
    return f'<section id="curves"><h2>Training</h2><p class="note">{note}</p><div class="curves">{drawn}</div></section>'


def _minutes(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{seconds:.1f} s"


# ---------------------------------------------------------------------------------------------------------------- reading


def _read_results(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{number + 1}: not valid JSON ({error}); run the evaluation's --merge again"
            ) from None
    return rows


def _read_training_log(run_dir: Path) -> dict[str, list[tuple[float, float]]]:
    path = next((run_dir / place for place in LOG_PLACES if (run_dir / place).is_file()), None)
    return read_log(path) if path else {}


def _read_stages(path: Path) -> dict[str, float]:
    """Seconds by stage; empty if the file is absent, since a report of an evaluation alone is still one."""
    if not path.is_file():
        return {}
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
        return {str(name): float(seconds) for name, seconds in stages.items() if seconds is not None}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: does not hold {{'stages': {{name: seconds}}}} ({error})") from None


if __name__ == "__main__":
    sys.exit(main())
