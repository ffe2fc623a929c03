"""A launch line as published scripts write them, on two ranks: every flag is taken, meant, or answered."""

import json
import re
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.e2e.conftest import Quickstart
from tests.e2e.trainer import run_trainer

FLAGS = {
    "visual-und": False,
    "freeze_mot_und": True,
    "validate_freezing": True,
    "zero_stage": 3,
    "num-worker": 1,  # half a name, with a dash
    "num_workers": None,
    "use_flex": True,
    "backward-prefetch": "BACKWARD_POST",
    "wandb_name": "mine",
    "peak_device_tflops": 0.01,
    "finetune_from_ema": "True",
    "pixel_loss_weight": 0.05,
    "pixel_loss_max_t": 1.0,
    "pixel_loss_paired_only": False,
    "ssim_loss_weight": 0.1,
    "ssim_loss_max_t": 1.0,
    "gradient_share_every": 2,
    "vit_lr": "None",
}


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_published_launch_line_trains(quickstart: Quickstart, tmp_path: Path) -> None:
    content = yaml.safe_load(quickstart.mixture.read_text())
    mixture = tmp_path / "drawing.yaml"
    mixture.write_text(yaml.safe_dump({key: content[key] for key in ("dataset_info", "t2i")}))
    done = run_trainer(
        tmp_path / "run",
        dataset_config_file=mixture,
        model_path=quickstart.model,
        results_dir="results",
        **FLAGS,
    )
    assert done.code == 0, done.output
    answered = [line.partition("--")[2] for line in done.lines(" --") if re.search(r" --\w+ \S+: ", line)]
    assert [line.split(": ")[0] for line in answered] == [
        "zero_stage 3",
        "wandb_name mine",
        "backward_prefetch BACKWARD_POST",
        "use_flex True",
    ]
    assert "taken as --sharding_strategy FULL_SHARD" in answered[0]
    assert re.search(r"\| MFU \d+\.\d% \|", done.lines("step 2/2")[0])
    log, curves = (
        [json.loads(line) for line in (tmp_path / "run" / "results" / name).read_text().splitlines()]
        for name in ("train_log.jsonl", "curves.jsonl")
    )
    assert all(0 < line["pixel"] < 1 and 0 < line["ssim"] < 2 for line in log)
    assert any(
        "grad_trunk/pixel" in line for line in curves
    )  # 0 as yet: the projection that the flow leaves by starts at 0
    assert any(line.get("group/t2i/ssim", 0) > 0 for line in curves)
    stored = load_file(tmp_path / "run" / "results" / "model" / "model.safetensors")
    parts = {name.split(".")[0] for name in stored}
    assert "vae2llm" in parts and not parts & {"vit_model", "connector", "vit_pos_embed"}
