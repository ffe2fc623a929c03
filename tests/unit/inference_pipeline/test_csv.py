"""statistics.json files to one CSV."""

import csv
import json

import pytest

from inference_pipeline.figures import FIGURES, compute_statistics
from inference_pipeline.parse_statistics_to_csv import COLUMNS, main
from tests.unit.inference_pipeline.synthetic_results import make_rows


def _write(directory, **settings):
    directory.mkdir(parents=True)
    statistics = compute_statistics(
        make_rows(), {"split": "test", "timestamp": "2026-01-01T00:00:00+00:00", **settings}
    )
    (directory / "statistics.json").write_text(json.dumps(statistics))
    return str(directory)


def test_three_seeds_become_three_rows(tmp_path, capsys):
    runs = [_write(tmp_path / f"seed{i}", model_id=f"m{i}", seed=i) for i in range(3)]
    assert main(["-d", *runs, "-o", str(tmp_path / "out" / "summary.csv"), "-v"]) == 0
    with (tmp_path / "out" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["model_id"] for row in rows] == ["m0", "m1", "m2"]
    assert tuple(rows[0]) == COLUMNS and set(FIGURES) <= set(COLUMNS)
    assert float(rows[0]["vqa_exact"]) == 0.75 and rows[0]["n_vqa_exact"] == "20"
    assert "vqa_exact" in capsys.readouterr().out


def test_a_figure_that_was_not_measured_stays_empty(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "statistics.json").write_text(json.dumps(compute_statistics([], {})))
    assert main(["-d", str(run), "-o", str(tmp_path / "s.csv")]) == 0
    row = next(csv.DictReader((tmp_path / "s.csv").read_text().splitlines()))
    assert row["vqa_exact"] == "" and row["n_vqa_exact"] == "0" and row["model_id"] == "run"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "not found"),
        ("{", "not valid JSON"),
        ("[]", "lacks vqa_exact"),
        ('{"vqa_exact": 1}', "lacks generation_digit"),
    ],
)
def test_unusable_statistics_stop_with_the_files_name(tmp_path, capsys, content, said):
    good, bad = _write(tmp_path / "good"), tmp_path / "bad"
    bad.mkdir()
    if content is not None:
        (bad / "statistics.json").write_text(content)
    assert main(["-d", good, str(bad), "-o", str(tmp_path / "s.csv")]) == 1
    message = capsys.readouterr().err
    assert str(bad / "statistics.json") in message and said in message and message.count("\n") == 1
    assert not (tmp_path / "s.csv").exists()
