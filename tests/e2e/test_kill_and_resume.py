"""Killed at any moment, a run that is started again by the same command ends as if nothing had happened, bit for bit."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data import ledger, replay
from tests.e2e.conftest import Quickstart
from tests.e2e.trainer import Done, run_trainer

TOTAL_STEPS, SAVE_EVERY = 12, 3
RATES = ("time", "tokens_per_sec", "samples_per_sec", "phases", "mem_rss")


@pytest.fixture
def flags(quickstart: Quickstart) -> dict[str, object]:
    return {
        "dataset_config_file": quickstart.mixture,
        "model_path": quickstart.model,
        "results_dir": "results",
        "total_steps": TOTAL_STEPS,
        "save_every": SAVE_EVERY,
        "max_checkpoints": 2,
        "auto_resume": True,
    }


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_run_ends_as_one_that_was_not(flags: dict[str, object], tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert_finished(run_trainer(whole, **flags))

    # First while a checkpoint is being written, then at a moment that chance chooses.
    checkpoints = killed / "results" / "checkpoints"
    run_trainer(killed, stop=lambda: _saving(checkpoints, killed), **flags)
    newest = complete(checkpoints)[-1]
    # As if killed right before the rename: whole, but it does not bear a step's name and must not be taken.
    shutil.copytree(checkpoints / newest, checkpoints / f"{TOTAL_STEPS - 1:07d}.tmp", dirs_exist_ok=True)

    chance = np.random.default_rng()
    last_step, rest_s = (
        int(chance.integers(len(losses(killed)) + 1, TOTAL_STEPS)),
        float(chance.uniform(0, 0.5)),
    )
    print(f"resumes from {newest}, killed {rest_s:.3f} s after step {last_step}")  # noqa: T201 - seen if it fails

    def moment() -> bool:
        if len(losses(killed)) < last_step:
            return False
        time.sleep(rest_s)
        return True

    second = run_trainer(killed, stop=moment, **flags)
    assert second.lines(f"continuing from {Path('results') / 'checkpoints' / newest}")
    last = run_trainer(killed, **flags)
    assert_finished(last)
    assert not list(checkpoints.glob("*.tmp"))

    assert losses(killed) == losses(whole)
    assert accounts(killed) == accounts(whole)
    assert ledger.main([str(killed / "results")]) == 0
    for step in range(1, TOTAL_STEPS + 1):
        assert replay.main([str(killed / "results"), "--step", str(step)]) == 0, (
            "not the tensors that were trained on"
        )
    assert journal(killed) == journal(whole)
    for name in ("model.safetensors", "ema.safetensors"):
        found, expected = (load_file(run / "results" / "model" / name) for run in (killed, whole))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


def _saving(checkpoints: Path, run: Path) -> bool:
    """A checkpoint after the first, and before the last, is being written."""
    return (
        bool(complete(checkpoints)) and any(checkpoints.glob("*.tmp")) and len(losses(run)) < TOTAL_STEPS - 1
    )


def assert_finished(done: Done) -> None:
    assert done.code == 0, done.output


def complete(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.glob("*") if path.name.isdigit())


def losses(run: Path) -> list[dict[str, float]]:
    """Everything logged about every step but how fast it was, and how much memory it took."""
    file = run / "results" / "train_log.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in RATES} for line in lines]


def journal(run: Path) -> list[list[dict[str, object]]]:
    """What every rank noted about every step."""
    lines = [file.read_text().splitlines() for file in sorted((run / "results").glob("journal.*.jsonl"))]
    return [[entry for entry in map(json.loads, rank) if "packs" in entry] for rank in lines]


def accounts(run: Path) -> list[str]:
    """The last ledger line, in which reading and training add up (or the run would have stopped)."""
    text = (run / "results" / "log.txt").read_text()
    line = [line for line in text.splitlines() if "read = trained + waiting + rejected" in line][-1]
    entries = line.partition("rejected: ")[2].split(" | ")
    for entry in entries:
        read, _, parts = entry.partition(" = ")
        assert int(read.split()[-1]) == sum(int(part) for part in parts.split(" + "))
    assert len(entries) == 5
    return entries
