"""The two segmentation recipes in one command: data, vision tower, mask autoencoder, training, and what held-out scenes give.

    python scripts/segmentation/run.py [--recipes sam codes] [--output_dir runs/segmentation] [--seed 0]

`sam`: configs/reasoning_segmentation.yaml, <SEG> through SAM's decoder on the shared grid. `codes`: configs/perception_gpt.yaml,
masks and boxes by embedding. Needs scikit-image and scikit-learn (`pip install -e ".[demo]"`), and no network. The model writes
its <SEG> itself; what it does not segment counts as an empty mask. Writes `result.json`. What is there already is not made again.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from data.transforms.boxes import read_mask
from inference_pipeline.inferencer import Answer, Inferencer, Prompt
from train.metrics.boxes import box_iou
from train.metrics.masks import overlap_counts

BATCH = 32
SCENES = {"train": 8000, "test": 300}
SMOKE = {"train": 24, "test": 3}
CONFIGS = {"sam": "reasoning_segmentation", "codes": "perception_gpt"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", choices=sorted(CONFIGS), default=sorted(CONFIGS))
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "segmentation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="a few scenes and steps: whether it runs")
    args = parser.parse_args(argv)
    run, seed = args.output_dir.resolve(), str(args.seed)
    data, sizes = run / "data", SMOKE if args.smoke else SCENES
    few = ("--total_steps", "2") if args.smoke else ()
    if not (run / "base" / "codes" / "ae.safetensors").exists():
        _run(
            1, run, "scripts/segmentation/make_data.py", "--output_dir", str(run), "--seed", seed,
            "--train_scenes", str(sizes["train"]), "--test_scenes", str(sizes["test"]),
        )  # fmt: skip
    found = {}
    for recipe in args.recipes:
        base, folder, config = run / "base" / recipe, run / recipe, CONFIGS[recipe]
        if not (base / "vit_model.safetensors").exists():
            _run(
                args.nproc, run, "train/main_siglip.py", "--coco_path", str(data / "refer_train.json"), "--val_coco_path",
                str(data / "refer_test.json"), "--data_dir", str(data), "--output_dir", str(base), "--seed", seed, *few,
            )  # fmt: skip
        start: tuple[str, ...] = ()
        if recipe == "codes":
            start = ("--mask_path", str(run / "codes_autoencoder"))
            if not (run / "codes_autoencoder" / "mask_autoencoder.json").exists():
                _run(
                    args.nproc, run, "train/main_mask_autoencoder.py", "--dataset_config_file", f"configs/{config}.yaml",
                    "--model_path", str(base), "--output_dir", start[1], "--seed", seed, *few,
                )  # fmt: skip
        if not (folder / "model").exists():
            _run(
                args.nproc, run, "train/main.py", "--config", f"configs/{config}_run.yaml", "--dataset_config_file",
                f"configs/{config}.yaml", "--model_path", str(base), "--vit_path", str(base), "--results_dir", str(folder),
                "--global_seed", seed, *start, *few, *(("--warmup_steps", "1") if args.smoke else ()),
            )  # fmt: skip
        found[recipe] = evaluate(Inferencer.from_model_dir(folder / "model"), data)
        print(recipe, " ".join(f"{name} {value:.4f}" for name, value in found[recipe].items()), flush=True)
    (run / "result.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def evaluate(model: Inferencer, data: Path) -> dict[str, float]:
    """Mean and cumulative overlap of named digits and of answers that take thought (their masks together); Acc@0.5 of boxes."""
    named, boxes = list(refer_questions(data)), list(refer_questions(data, "Where is {}?"))
    thought = list(reason_questions(data))
    masks = _ious(model, [q[:2] for q in named], [q[2] for q in named])
    reasoned = _ious(model, [q[:2] for q in thought], [q[2] for q in thought])
    hits = [
        bool(answer.boxes) and box_iou(answer.boxes[0], box) > 0.5
        for answer, (*_, box) in zip(_answers(model, [q[:2] for q in boxes]), boxes, strict=True)
    ]
    return {
        "refer_giou": masks[0], "refer_ciou": masks[1], "reason_giou": reasoned[0], "reason_ciou": reasoned[1],
        "box_acc_50": float(np.mean(hits)),
    }  # fmt: skip


def refer_questions(data: Path, template: str = "Segment {}.") -> Iterator[tuple[Path, str, np.ndarray, Any]]:
    """Picture, question, true mask, true box of the first name of every digit."""
    coco = json.loads((data / "refer_test.json").read_text(encoding="utf-8"))
    files = {image["id"]: image for image in coco["images"]}
    for thing in coco["annotations"]:
        image = files[thing["image_id"]]
        size = (image["width"], image["height"])
        mask = read_mask(thing["segmentation"], size, str(thing["id"])) > 0
        x, y, width, height = thing["bbox"]
        question = template.format(thing["expressions"][0])
        yield data / image["file_name"], question, mask, (x, y, x + width, y + height)


def reason_questions(data: Path) -> Iterator[tuple[Path, str, np.ndarray]]:
    """Picture, question, the union of the true masks of its answer (nothing where there is none)."""
    for line in (data / "reason_test.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        picture, rest = row["input_img"][0], iter(row["objects"]["mask"])
        size = (picture["width"], picture["height"])
        turns = [turn["value"].replace("<image>", "").strip() for turn in row["message"]]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            union = np.zeros(size[::-1], bool)
            for _ in range(answer.count("<SEG>")):
                union |= read_mask(next(rest), size, question) > 0
            yield data / picture["path"], question, union


def _ious(
    model: Inferencer, asked: Sequence[tuple[Path, str]], truth: Sequence[np.ndarray]
) -> tuple[float, float]:
    """Mean overlap (nothing said and nothing there is 1) and cumulative overlap."""
    each, both, either = [], 0, 0
    for answer, true in zip(_answers(model, asked), truth, strict=True):
        mask = np.any(answer.masks, axis=0) if answer.masks else np.zeros_like(true)
        inside, union = overlap_counts(mask, true)
        each.append(inside / union if union else 1.0)
        both, either = both + inside, either + union
    return float(np.mean(each)), both / max(1, either)


def _answers(model: Inferencer, asked: Sequence[tuple[Path, str]]) -> Iterator[Answer]:
    for start in range(0, len(asked), BATCH):
        prompts = [Prompt(images=(picture,), text=text) for picture, text in asked[start : start + BATCH]]
        yield from model.answer(prompts, max_new_tokens=24)


def _run(nproc: int, run: Path, script: str, *words: str) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    print("$", script, *words, flush=True)
    place = {**os.environ, "WEFT_SEG": str(run)}
    subprocess.run([sys.executable, *launch, script, *words], cwd=ROOT, env=place, check=True)


if __name__ == "__main__":
    main()
