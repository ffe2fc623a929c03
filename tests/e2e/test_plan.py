"""What a run will take (`python -m train.plan`), and what a made-up one takes (`train/main_benchmark.py`)."""

import json
import re
import subprocess
import sys

import pytest

from tests.e2e.conftest import Quickstart
from tests.e2e.trainer import ROOT
from train.plan import main

FLAGS = (
    "--from_scratch", "--expected_num_tokens", "500", "--max_num_tokens", "700", "--max_num_tokens_per_sample", "400",
    "--num_lanes", "4", "--num_workers", "0", "--total_steps", "1000", "--records", "20",
)  # fmt: skip


def plan(quickstart: Quickstart, *more: str) -> int:
    return main(
        [
            "--dataset_config_file",
            str(quickstart.mixture),
            "--model_path",
            str(quickstart.model),
            *FLAGS,
            *more,
        ]
    )


def number(output: str, pattern: str) -> float:
    found = re.search(pattern, output)
    assert found, output
    return float(found[1].replace(",", ""))


def test_a_plan_for_gpus(quickstart: Quickstart, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(quickstart, "--gpus", "4", "--memory", "24", "--device", "A100", "--mfu", "0.5") == 0
    output = capsys.readouterr().out
    assert "of 24 GiB, which fits" in output and "if 50% of 312 TFLOP/s are used" in output
    tokens, per_second = (
        number(output, r"a step: ([\d,]+) tokens in 4 packs"),
        number(output, r"speed: ([\d,]+)"),
    )
    assert 4 * 500 <= tokens <= 4 * 700
    seconds = number(output, r"tokens/s, ([\d.e-]+) s a step")
    assert tokens / per_second == pytest.approx(seconds, rel=0.01)
    assert plan(quickstart, "--gpus", "8", "--device", "A100", "--mfu", "0.25") == 0
    twice = capsys.readouterr().out
    # Twice as many devices, each half as well used, on twice as many packs: twice the time of a step.
    assert number(twice, r"tokens/s, ([\d.e-]+) s a step") == pytest.approx(2 * seconds, rel=0.01)


def test_a_plan_that_does_not_fit(quickstart: Quickstart, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(quickstart, "--device", "cpu", "--memory", "0.001", "--recompute", "False") == 1
    output = capsys.readouterr().out
    assert "GiB too much" in output and "may help: smaller pictures to draw" in output
    assert "speed: not known" in output and "no tensors" not in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--device", "TPU"), "--device TPU: its peak is not known; known are MI300X, H200"),
        (("--gpus", "0"), "--gpus 0 must be above 0"),
        (("--tokens", "3"), "unknown argument --tokens"),
    ],
)
def test_a_plan_that_cannot_be_made(
    flags: tuple[str, ...], message: str, quickstart: Quickstart, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(quickstart, *flags) == 2
    assert message in capsys.readouterr().err


def test_a_made_up_batch_is_measured() -> None:
    command = [
        sys.executable,
        str(ROOT / "train" / "main_benchmark.py"),
        "--json",
        "--steps",
        "1",
        "--warm_up",
        "1",
    ]
    command += [
        "--texts",
        "2x40",
        "--see",
        "1x56x70",
        "--draw",
        "1x64x64",
        "--param_dtype",
        "fp32",
        "--reduce_dtype",
        "fp32",
    ]
    command += [
        "--set",
        "llm.num_hidden_layers=1",
        "--set",
        "ae.ch_mult=1,1,1,1",
        "--peak_device_tflops",
        "0.2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    # A text of 40 has two segments with two markers each; 20 patches, 16 latent tokens and their markers, texts of 32 and theirs.
    assert figures["tokens_per_step"] == 2 * (40 + 4) + (20 + 2 + 2 * (32 + 2)) + (32 + 2 + 16 + 2)
    assert figures["total_samples"] == 4 and 0 < figures["mfu"] < 1
    assert figures["total_ce_tokens"] == 2 * (20 + 1) + 33 and figures["total_mse_tokens"] == 16
    assert 0 < figures["time/forward"] + figures["time/backward"] < figures["time/step"]
    assert figures["memory/peak"] > 0.5 * figures["memory/predicted"] > 0
