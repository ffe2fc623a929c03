"""The super-resolution recipe in one command: data, autoencoder, a run with the pixel loss and one without, and what they reach.

    python scripts/super_resolution/run.py [--output_dir runs/super_resolution] [--seed 0]

Needs scikit-image (`pip install -e ".[demo]"`), whose photographs it uses, and no network. Prints mean PSNR over the held-out
crops of bicubic interpolation and of both runs, and writes it to `result.json`. What is there already is not made again.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from inference_pipeline.inferencer import Inferencer, Prompt
from train.metrics.image import PictureFidelity

BATCH = 32
RUNS = {"with_pixel_loss": (), "without_pixel_loss": ("--pixel_loss_weight", "0")}
AUTOENCODER = ("--resolution", "32", "--ch", "8", "--ch_mult", "1", "4", "8", "--total_steps", "500")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "super_resolution")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    folder, seed = args.output_dir.resolve(), ("--seed", str(args.seed))
    base, data = folder / "base", folder / "data"
    if not (data / "test.jsonl").exists():
        _python("scripts/super_resolution/make_data.py", "--output_dir", str(folder), *seed)
    if not (base / "ae.safetensors").exists():
        _python(
            "train/main_autoencoder.py", "--image_dir", str(data / "train"), "--val_dir", str(data / "test"),
            "--output_dir", str(base), *AUTOENCODER, *seed,
        )  # fmt: skip
    for name, flags in RUNS.items():
        if not (folder / name / "model").exists():
            _python(
                "train/main.py", "--config", "configs/super_resolution_run.yaml", "--dataset_config_file",
                "configs/super_resolution.yaml", "--model_path", str(base), "--results_dir",
                str(folder / name), "--global_seed", str(args.seed), *flags,
                sr=folder,
            )  # fmt: skip
    found = evaluate(data, {name: folder / name / "model" for name in RUNS})
    (folder / "result.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(f"{name:<20} {value:6.2f} dB" for name, value in found.items()))


def evaluate(data: Path, models: dict[str, Path]) -> dict[str, float]:
    """Mean PSNR in dB over the held-out crops."""
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    low, high = ([_read(data / row[key][0]["path"]) for row in rows] for key in ("input_img", "output_img"))
    found = {"bicubic": _psnr(low, high)}
    for name, path in models.items():
        model = Inferencer.from_model_dir(path)
        drawn = []
        for start in range(0, len(low), BATCH):
            of_batch, row = low[start : start + BATCH], rows[start]
            text = row["message"][0]["value"]
            asked = [Prompt(text=text, images=(Image.fromarray(x),)) for x in of_batch]
            made = model.generate(asked, num_timesteps=2, cfg_text_scale=1.0, seed=start)
            drawn += [np.asarray(picture.image) for picture in made]
        found[name] = _psnr(drawn, high)
    return found


def _read(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB"))


def _psnr(pictures: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> float:
    score = PictureFidelity()
    for picture, true in zip(pictures, truth, strict=True):
        score.update(picture, true)
    return score.compute()["psnr"]


def _python(*command: str, sr: Path | None = None) -> None:
    place = {} if sr is None else {"WEFT_SR": str(sr)}
    print("$", *command, flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, env={**os.environ, **place}, check=True)


if __name__ == "__main__":
    main()
