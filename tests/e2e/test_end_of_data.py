"""A mixture that ends, through the real trainer: every record once, then a checkpoint, an export and exit code 0."""

import json
from pathlib import Path

import pytest
import yaml

from data import ledger
from tests.e2e.conftest import Quickstart
from tests.e2e.test_kill_and_resume import assert_finished, journal, losses
from tests.e2e.trainer import run_trainer


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_ends_when_its_data_do(quickstart: Quickstart, tmp_path: Path, capsys) -> None:
    mixture = yaml.safe_load(quickstart.mixture.read_text())
    for name, entry in mixture.items():
        if name != "dataset_info":
            entry.update(when_exhausted="drop")
    mixture["val"] = {"text": {"dataset_names": mixture["text"]["dataset_names"]}}
    file = tmp_path / "mixture.yaml"
    file.write_text(yaml.safe_dump(mixture))
    flags = {
        "dataset_config_file": file,
        "model_path": quickstart.model,
        "results_dir": "results",
        "total_steps": 500,
        "val_every": 400,
        "val_steps": 1,
        "val_samples": 0,
    }
    done = run_trainer(tmp_path, **flags)
    assert_finished(done)
    steps = len(losses(tmp_path))
    assert done.lines(f"the data has ended (when_exhausted): stopping after step {steps} of 500")
    assert (tmp_path / "results" / "model" / "ema.safetensors").is_file()
    validated = (tmp_path / "results" / "val_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in validated] == [steps]  # the last one, although nobody knew
    assert ledger.main([str(tmp_path / "results"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == steps < 500
    for name, account in found["groups"].items():
        assert account["read"] == account["trained"] and found["shares"][name]["epochs"] == 1, name
    assert sum(len(step["packs"]) for rank in journal(tmp_path) for step in rank) <= 2 * steps
