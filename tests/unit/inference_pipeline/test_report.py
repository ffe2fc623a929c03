"""The report: one file, complete, safe, and readable when parts are missing."""

import json
import re

import pytest

from inference_pipeline import curves
from inference_pipeline.figures import compute_statistics
from inference_pipeline.galleries import GALLERIES
from inference_pipeline.report import main
from tests.unit.html_page import Page
from tests.unit.inference_pipeline.synthetic_results import NASTY, make_rows, write_evaluation


@pytest.fixture
def run_dir(tmp_path):
    statistics = compute_statistics(
        make_rows(), {"seed": 0, "timestamp": "now", "judge_accuracy_on_real_test_digits": 0.99}
    )
    write_evaluation(tmp_path, statistics)
    (tmp_path / "results_dir").mkdir()
    entries = [
        {"step": i, "ce": 3 / (i + 1), "lr": 1e-3, "losses": {"mse": 1.0}, "note": "x"} for i in range(900)
    ]
    log = "".join(json.dumps(entry) + "\n" for entry in entries) + '{"step": 90'
    (tmp_path / "results_dir" / "train_log.jsonl").write_text(log)
    (tmp_path / "timings.json").write_text(json.dumps({"stages": {"setup": 61.0, "training": 600}}))
    return tmp_path


def _report(run_dir):
    assert main(["--run_dir", str(run_dir), "--output", str(run_dir / "report.html")]) == 0
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_every_section_is_there_and_nothing_is_loaded(run_dir):
    text, page = _report(run_dir)
    assert set(page.ids) >= {"figures", "timings", "curves", *GALLERIES}
    assert page.loads and all(load.startswith(("#", "data:image/png;base64,")) for load in page.loads)
    assert not re.search(r"https?://|@import|url\(", text)
    assert all(image["alt"] for image in page.images)
    assert text.count('<figure class="curve">') == 3
    assert "1 min 01 s" in text and "vqa_exact" in text and "✗ missed" in text


def test_what_the_model_said_is_escaped(run_dir):
    text, _ = _report(run_dir)
    assert "<script" not in text and NASTY not in text
    assert "&lt;script&gt;" in text


def test_failures_are_shown_and_how_they_were_chosen_is_said(run_dir):
    text, _ = _report(run_dir)
    box = text[text.index('<section id="box">') : text.index('<section id="mask">')]
    assert "The first 12 samples by id, as they came: 3 with a failure" in box
    assert "All 2 failures among the other 8 samples, by id" in box
    assert box.count("card wrong") == 5


def test_a_report_without_log_timings_or_pictures_is_still_one(run_dir):
    (run_dir / "results_dir" / "train_log.jsonl").unlink()
    (run_dir / "timings.json").unlink()
    (run_dir / "images" / "input.png").write_bytes(b"no picture")
    text, _ = _report(run_dir)
    assert "No training log" in text and "No timings.json" in text and "cannot be read" in text


@pytest.mark.parametrize(
    ("name", "content"), [("results.jsonl", "{\n"), ("statistics.json", "{"), ("timings.json", "[]")]
)
def test_an_unreadable_file_is_named(run_dir, capsys, name, content):
    (run_dir / name).write_text(content)
    assert main(["--run_dir", str(run_dir), "--output", str(run_dir / "r.html")]) == 1
    assert str(run_dir / name) in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------- curves


def test_a_step_logged_again_after_a_resume_counts_once(tmp_path):
    lines = [
        {"step": 1, "ce": 9.0},
        {"step": 2, "ce": 8.0},
        {"step": 2, "ce": 7.0},
        {"step": 3, "ce": float("nan")},
    ]
    (tmp_path / "log").write_text("\n".join(map(json.dumps, lines)))
    assert curves.read_log(tmp_path / "log") == {"ce": [(1, 9.0), (2, 7.0)]}


def test_thinning_keeps_the_extremes_and_smoothing_the_mean():
    points = [(float(i), 1.0 + (i == 777)) for i in range(5000)]
    assert max(y for _, y in curves.envelope(points)) == 2.0
    assert len(curves.envelope(points)) <= curves.MAX_POINTS
    smoothed = curves.smooth(points)
    assert len(smoothed) <= curves.MAX_POINTS and smoothed[-1] == (4999.0, 1.0)


@pytest.mark.parametrize(
    "values", [[1.0, 1.0], [0.0, 0.0], [-3.0, 5.0], [1e-6, 10.0], [5.0, 5.0001], [-2.0, -2.0]]
)
def test_any_range_can_be_drawn(values):
    drawn = curves.chart("ce", list(enumerate(values)))
    numbers = [float(n) for n in re.findall(r"[ML ](-?\d+\.\d)", drawn)]
    assert numbers and all(-1 <= n <= curves.WIDTH for n in numbers) and "nan" not in drawn


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (12345, "12.3k"), (0.05, "0.05"), (2e-4, "2e-4"), (1.5e-3, "1.5e-3"), (9005, "9005")],
)
def test_axis_numbers_are_short(value, shown):
    assert curves.format_value(value) == shown


def test_ticks_are_round_and_inside():
    assert curves.nice_ticks(0, 2400) == [0, 1000, 2000]
    assert curves.nice_ticks(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert all(0.01 <= t <= 3 for t in curves.log_ticks(0.01, 3))
