"""The whole of `make demo`, as small as it gets: every real stage runs, and leaves what the README says."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIGURES = ("vqa_exact", "generation_digit", "generation_colour", "edit_success", "box_acc_50", "mask_miou")


@pytest.mark.timeout(300)
def test_every_stage_runs_and_a_second_call_has_nothing_to_do(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/quickstart.py", "--smoke", "--output_dir", str(tmp_path / "run")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def demo() -> str:
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    first = demo()
    run = tmp_path / "run"
    statistics = json.loads((run / "statistics.json").read_text())
    assert all(0 <= statistics[figure] <= 1 for figure in FIGURES)
    assert all(figure in first for figure in FIGURES)
    stages = json.loads((run / "timings.json").read_text())["stages"]
    assert set(stages) >= {"data", "autoencoder", "vision_tower", "training", "evaluation"}
    with (run / "summary.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 1
    page = (run / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org/", "") and "https://" not in page
    assert (run / "results_dir" / "model" / "ema.safetensors").is_file()
    assert demo().count("done before") == 5

    # One pack of the quickstart, as README shows it, holds samples of at least four tasks.
    shown = subprocess.run(
        [
            *(sys.executable, "-m", "data.inspect", "--dataset_config_file", str(ROOT / "configs/quickstart.yaml")),
            *("--packs", "1", "--model_path", str(run / "base")),
        ],
        cwd=tmp_path, env={**env, "WEFT_DATA": str(run / "data"), "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    tasks = re.search(r"samples of (\d+) tasks", shown.stdout)
    assert tasks is not None and int(tasks[1]) >= 4
    assert (tmp_path / "pack.png").stat().st_size > 1000

    # What was trained says the same through the KV cache as in the training forward, for every kind of prediction.
    checked = subprocess.run(
        [
            *(sys.executable, "-m", "inference_pipeline.check_cache"),
            *("--model_path", str(run / "results_dir" / "model")),
            *("--dataset_config_file", "configs/quickstart.yaml", "--expected_num_tokens", "2000"),
        ],
        cwd=ROOT, env={**env, "WEFT_DATA": str(run / "data")}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert [line.split()[0] for line in checked.stdout.splitlines()[1:]] == [
        "box",
        "logits",
        "mask",
        "velocity",
    ]
