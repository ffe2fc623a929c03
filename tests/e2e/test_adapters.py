"""Adapters as a person trains them: beside a base in 4 bits, stopped and continued, merged."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling.build import build_model, fill_model, initial_values, load_model
from modeling.source import read_source
from scripts.convert.export import main as export
from tests.e2e.conftest import Quickstart
from tests.e2e.trainer import run_trainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


def test_adapters_are_trained_continued_and_merged(quickstart: Quickstart, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in quickstart.model.iterdir():
        (base / file.name).symlink_to(file)
    model = build_model(read_source(base).config)
    fill_model(model, initial_values(model.config, 0))
    save_file(model.state_dict(), base / "model.safetensors")
    flags = {
        "dataset_config_file": quickstart.mixture,
        "from_scratch": False,
        "model_path": base,
        "lora_enable": True,
        "lora_target": "llm_all",
        "lora_r": 4,
        "load_in_4bit": True,
        "results_dir": "run",
        "save_every": 2,
        "validate_freezing": True,
    }
    # A rank imports PEFT and bitsandbytes: slow where other tests run beside.
    done = run_trainer(tmp_path, **flags, total_steps=2, num_ranks=1, time_limit_s=200)
    assert done.code == 0, done.output
    assert done.lines("(base)")[0].endswith("frozen (in 4 bits, whole on every rank)")
    step = tmp_path / "run" / "checkpoints" / "0000002"
    first = load_file(step / "adapter" / "model" / "adapter_model.safetensors")
    again = run_trainer(tmp_path, **flags, total_steps=3, auto_resume=True, num_ranks=1, time_limit_s=200)
    assert again.code == 0, again.output
    assert again.lines("step 3/3") and not again.lines("step 2/3")
    last = load_file(tmp_path / "run" / "adapter" / "model" / "adapter_model.safetensors")
    assert last.keys() == first.keys()
    assert any(not torch.equal(x, first[name]) for name, x in last.items())

    for source in (tmp_path / "run" / "adapter", tmp_path / "run" / "checkpoints" / "0000003"):
        export([str(source), str(tmp_path / "merged"), "--merge"])
        merged = load_model(tmp_path / "merged").state_dict()
        added = load_model(base, adapter=tmp_path / "run" / "adapter").state_dict()
        assert all(torch.equal(x, added[name]) for name, x in merged.items())
    q_proj = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged[q_proj], model.state_dict()[q_proj])
