"""The autoencoder's training entry as a person runs it: the files it leaves and what it says about bad input."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from modeling.autoencoder import AutoEncoder, load_autoencoder

ROOT = Path(__file__).parents[2]
ENTRY = str(ROOT / "train" / "main_autoencoder.py")
SMALL = "--resolution 16 --ch 4 --ch_mult 1 2 --num_groups 2 --z_channels 4 --total_steps 5 --batch_size 4 --log_every 2".split()


def run(*flags: str, cwd: Path, processes: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = (
        ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        if processes > 1
        else []
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, ENTRY, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env=env, check=False)


def make_pictures(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((16, 16) if i else (24, 18), Image.Resampling.BILINEAR).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return make_pictures(tmp_path / "pictures")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process leaves after five steps, beside the pictures it was given."""
    root = tmp_path_factory.mktemp("autoencoder")
    folder, out = str(make_pictures(root / "pictures")), str(root / "base")
    done = run("--image_dir", folder, "--val_dir", folder, "--output_dir", out, *SMALL, cwd=root)
    assert done.returncode == 0, done.stderr
    assert re.search(r"PSNR \d+\.\d\d dB .* 8 held-out pictures", done.stdout)
    return root


def test_five_steps(trained: Path) -> None:
    out = trained / "base"
    rows = [json.loads(line) for line in (out / "ae_log.jsonl").read_text().splitlines()]
    assert [row.get("step") for row in rows] == [2, 4, 5, None]
    assert rows[-1]["psnr_db"] > 5
    model = load_autoencoder(out)
    assert rows[-1]["autoencoder"] == model.config.to_json()
    assert sorted(f.name for f in out.iterdir()) == ["ae.safetensors", "ae_config.json", "ae_log.jsonl"]


def test_latents_have_mean_0_and_variance_1(trained: Path) -> None:
    from train.main_autoencoder import read_images, to_pixels

    pixels = to_pixels(read_images([trained / "pictures"], 16), torch.device("cpu"))
    latents = load_autoencoder(trained / "base").encode(pixels)
    assert abs(float(latents.mean())) < 1e-3
    assert float(latents.std(correction=0)) == pytest.approx(1, abs=1e-3)
    stds = latents.std(dim=(0, 2, 3), correction=0)
    assert float(stds.max() / stds.min()) == pytest.approx(1, abs=1e-3)


def test_two_processes_train_the_same_weights(trained: Path, tmp_path: Path) -> None:
    folder = str(trained / "pictures")
    done = run("--image_dir", folder, "--output_dir", str(tmp_path), *SMALL, cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("PSNR") == 1
    one, two = (load_file(str(base / "ae.safetensors")) for base in (trained / "base", tmp_path))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4, msg=f"{name} differs")


def test_minutes_end_the_run(trained: Path) -> None:
    from train.distributed.session import World
    from train.main_autoencoder import Recipe, config_of, parse_args, read_images, train

    args = parse_args(
        ["--image_dir", "x", "--output_dir", "y", *SMALL, "--minutes", "0.01", "--log_every", "1000000"]
    )
    recipe = Recipe(**{name: getattr(args, name) for name in Recipe.__dataclass_fields__})
    images = read_images([trained / "pictures"], 16)
    world = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    torch.manual_seed(0)
    (row,) = train(AutoEncoder(config_of(args)), images, recipe, world)
    assert row["step"] > 1
    assert 0.6 <= row["seconds"] < 10
    assert row["left_s"] == 0


def test_bad_input_is_one_line(pictures: Path, tmp_path: Path) -> None:
    """One bad thing per run would cost an import each, so the functions that the entry calls first are called here."""
    from train.main_autoencoder import config_of, parse_args, read_images, require_writable

    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no picture here"):
        read_images([tmp_path / "empty"], 16)
    with pytest.raises(ValueError, match="nowhere: no such directory"):
        read_images([tmp_path / "nowhere"], 16)
    whole = (pictures / "3.png").read_bytes()
    (pictures / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"3\.png: not a readable picture"):
        read_images([pictures], 16)
    with pytest.raises(ValueError, match="--output_dir .*: cannot write there"):
        require_writable(pictures / "3.png" / "below")
    with pytest.raises(ValueError, match="--resolution 20 is not a multiple of the 8"):
        config_of(parse_args(["--image_dir", "x", "--output_dir", "y", "--resolution", "20"]))


def test_a_bad_picture_ends_all_processes(pictures: Path, tmp_path: Path) -> None:
    (pictures / "3.png").write_bytes(b"not a picture")
    done = run(
        "--image_dir", str(pictures), "--output_dir", str(tmp_path / "out"), *SMALL, cwd=tmp_path, processes=2
    )
    assert done.returncode != 0
    assert f"error: {pictures / '3.png'}: not a readable picture" in done.stderr
