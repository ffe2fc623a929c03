"""The vision tower's training entry as a person runs it, and the trainer that starts from what it leaves."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling.build import build_model, starting_values
from modeling.source import read_source
from tests.e2e.conftest import Quickstart

ROOT = Path(__file__).parents[2]


def run(*flags: str, cwd: Path, processes: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [
        sys.executable,
        *(launcher if processes > 1 else []),
        str(ROOT / "train" / "main_siglip.py"),
        *flags,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env=env, check=False)


@pytest.fixture(scope="module")
def base(quickstart: Quickstart, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory that one process has trained a tower into."""
    folder = tmp_path_factory.mktemp("tower") / "base"
    shutil.copytree(quickstart.model, folder)
    done = run(*flags_for(quickstart, folder), cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert "named right" in done.stdout
    return folder


def flags_for(quickstart: Quickstart, output: Path) -> list[str]:
    data = quickstart.data
    return [
        "--coco_path", str(data / "refer_train.json"), "--data_dir", str(data), "--output_dir", str(output),
        "--total_steps", "6", "--batch_size", "4", "--log_every", "2", "--matmul_precision", "highest",
    ]  # fmt: skip


def test_it_learns_and_leaves_a_tower_that_the_trainer_starts_from(base: Path) -> None:
    rows = [json.loads(line) for line in (base / "vit_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows[:-1]] == [2, 4, 6]
    assert rows[2]["loss"] < rows[0]["loss"]
    assert 0 <= rows[-1]["named_right"] <= 1
    source = read_source(base, vit_path=base, from_scratch=True)
    model = build_model(source.config)
    values = starting_values(source, model, weights="model", seed=0)
    stored = load_file(base / "vit_model.safetensors")
    for name, p in model.named_parameters():
        if name.startswith("vit_model."):
            torch.testing.assert_close(values(name, p.shape), stored[name.removeprefix("vit_model.")])


def test_two_processes_train_the_same(base: Path, quickstart: Quickstart, tmp_path: Path) -> None:
    other = tmp_path / "base"
    shutil.copytree(quickstart.model, other)
    done = run(*flags_for(quickstart, other), cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    one, two = load_file(base / "vit_model.safetensors"), load_file(other / "vit_model.safetensors")
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=2e-4, msg=name)


def test_another_tower_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "vit_model.safetensors")
    tensors.pop("vision_model.post_layernorm.bias")
    save_file(tensors, tmp_path / "vit_model.safetensors")
    (tmp_path / "nothing").mkdir()
    for place, message in (
        (
            tmp_path,
            r"vit_model.safetensors: 1 tensors missing, .*: lacks vit_model.vision_model.post_layernorm.bias$",
        ),
        (tmp_path / "nothing", "--vit_path .*nothing/vit_model.safetensors: cannot be read as safetensors"),
    ):
        source = read_source(base, vit_path=place, from_scratch=True)
        with pytest.raises(ValueError, match=message):
            starting_values(source, build_model(source.config), weights="model", seed=0)


def test_a_missing_file_is_one_line(quickstart: Quickstart, tmp_path: Path) -> None:
    flags = flags_for(quickstart, tmp_path)
    flags[1] = str(tmp_path / "none.json")
    done = run(*flags, "--model_path", str(quickstart.model), cwd=tmp_path)
    assert done.returncode == 1
    assert "none.json" in done.stderr and "Traceback" not in done.stderr
