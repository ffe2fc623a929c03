"""The detection recipe in one command: scenes, a model directory, a run, and what its detector finds in held-out scenes.

    python scripts/detection/run.py [--output_dir runs/detection] [--seed 0]

Needs scikit-learn and scikit-image for the scenes, scipy to train (`pip install -e ".[demo,detection]"`), faster-coco-eval or
pycocotools to count (`".[metrics]"`), and no network. Prints average precision and writes it to `result.json`. What is there
already is not made again. `--total_steps`, `--scenes` and `--test_scenes` are for trying it out.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from data.detection_tools import read_lines
from inference_pipeline.detection import predict_detection
from inference_pipeline.inferencer import Inferencer
from scripts.detection.make_scenes import PROMPT
from train.metrics.detection import BoxAp, Found

LEAST = 0.02
"""Score from which a detection counts for average precision: what is below it moves nothing."""
# Nothing is drawn; a model directory has an autoencoder all the same.
AUTOENCODER = ("--resolution", "32", "--ch", "8", "--ch_mult", "1", "2", "2", "2", "--total_steps", "5")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "detection")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--total_steps", type=int, help="default: as in configs/detection_run.yaml")
    parser.add_argument("--scenes", type=int, default=20000)
    parser.add_argument("--test_scenes", type=int, default=300)
    args = parser.parse_args(argv)
    folder, seed = args.output_dir.resolve(), ("--seed", str(args.seed))
    base, data, model = folder / "base", folder / "data", folder / "run" / "model"
    if not (base / "bagel_config.json").exists():
        _python(
            "scripts/detection/make_scenes.py", "--output_dir", str(folder), "--scenes", str(args.scenes),
            "--test_scenes", str(args.test_scenes), *seed,
        )  # fmt: skip
    if not (base / "ae.safetensors").exists():
        _python(
            "train/main_autoencoder.py", "--image_dir", str(data / "train"), "--val_dir", str(data / "test"),
            "--output_dir", str(base), *AUTOENCODER, *seed,
        )  # fmt: skip
    if not model.exists():
        steps: tuple[str, ...] = ()
        if (total := args.total_steps) is not None:
            steps = ("--total_steps", str(total), "--warmup_steps", str(min(100, total // 2)))
        _python(
            "train/main.py", "--config", "configs/detection_run.yaml", "--dataset_config_file", "configs/detection.yaml",
            "--model_path", str(base), "--results_dir", str(folder / "run"), "--global_seed", str(args.seed), *steps,
            place=folder,
        )  # fmt: skip
    found = evaluate(data, model)
    (folder / "result.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(f"{name:<20} {value:6.3f}" for name, value in found.items()))


def evaluate(data: Path, path: Path) -> dict[str, float]:
    """Average precision over the held-out scenes."""
    model, score = Inferencer.from_model_dir(path), BoxAp()
    for line in read_lines(data / "test.jsonl"):
        assert line.row is not None, line.error
        student = line.row.student
        with Image.open(data / student.pictures[-1]) as opened:
            image = opened.convert("RGB")
        (found,) = predict_detection(model, [image], prompt=PROMPT, score_threshold=LEAST)
        predicted = [Found(box=d.bbox_2d, label=d.label, score=d.score) for d in found.detections]
        score.update(predicted, [Found(box=t.box, label=t.label) for t in student.things])
    return score.compute()


def _python(*command: str, place: Path | None = None) -> None:
    where = {} if place is None else {"WEFT_DETECTION": str(place)}
    print("$", *command, flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, env={**os.environ, **where}, check=True)


if __name__ == "__main__":
    main()
