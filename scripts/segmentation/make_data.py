"""Scenes for the segmentation recipes: digits on photographs, and questions whose answer is one mask, several, or none.

In: the glyphs and photographs of the quickstart (scikit-learn, scikit-image). Out, under `--output_dir`: `data/` with pictures,
`refer_{train,test}.json` (COCO, names of digits), `reason_{train,test}.jsonl` (messages with `<SEG>`; what is meant has to be
worked out from the picture) and `base/`, an untrained model with its tokenizer for each recipe.

    python scripts/segmentation/make_data.py --output_dir runs/segmentation
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from modeling.autoencoder import AutoEncoder, AutoEncoderConfig, save_autoencoder
from scripts.data import quickstart_scenes as scenes
from scripts.data.make_quickstart import (
    annotation,
    load_glyphs,
    load_photographs,
    run_lengths,
    split_glyphs,
)
from scripts.data.make_quickstart_model import LLM, VIT, train_tokenizer, write_model

SPLITS = ("train", "test")
SAM_DECODER = {"hidden_size": 64, "num_attention_heads": 4, "mlp_dim": 128, "iou_head_hidden_dim": 64}
HEADS: dict[str, dict[str, Any]] = {
    "sam": {
        "box": {"width": 96},
        "mask": {"type": "sam", "vision_sharing": "vlm", "fine_channels": 16, "decoder": SAM_DECODER},
    },
    "codes": {"box": {"type": "embedding", "width": 256}, "mask": {"type": "autoencoder", "width": 256}},
}
"""Recipe -> its heads."""
PREPROCESSOR = {
    "vit": {"max_image_size": 64, "min_image_size": 64, "stride": 8},
    "vae": {"max_image_size": 64, "min_image_size": 64, "stride": 16},
}

Digits = Sequence[scenes.Digit]
QUESTIONS: dict[str, Callable[[scenes.Digit], float]] = {
    "Which digit is the largest number?": lambda d: d.value,
    "Which digit is the smallest number?": lambda d: -d.value,
    "Which digit stands furthest to the left?": lambda d: -d.centre[0],
    "Which digit stands furthest to the right?": lambda d: d.centre[0],
    "Which digit stands highest in the picture?": lambda d: -d.centre[1],
    "Which digit stands lowest in the picture?": lambda d: d.centre[1],
}
"""Question -> what its answer has most of; asked only where one digit has it alone."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "segmentation")
    parser.add_argument("--train_scenes", type=int, default=8000)
    parser.add_argument("--test_scenes", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    sizes = {"train": args.train_scenes, "test": args.test_scenes}
    if min(sizes.values()) < 1:
        parser.error("every split needs at least one scene")
    texts = make(args.output_dir / "data", sizes, args.seed)
    for recipe, heads in HEADS.items():
        write_base(args.output_dir / "base" / recipe, heads, texts)
    print(f"written to {args.output_dir}")


def make(root: Path, sizes: dict[str, int], seed: int) -> list[str]:
    """Write pictures and rows of every split; returns the texts of the training split."""
    glyphs, photographs = load_glyphs(), load_photographs()
    places, texts = split_glyphs(glyphs.labels, seed), []
    for number, split in enumerate(SPLITS):
        folder = root / split
        folder.mkdir(parents=True, exist_ok=True)
        own = glyphs.take(places[split], jitter=split == "train")
        images, annotations, rows = [], [], []
        for index in range(sizes[split]):
            rng = np.random.default_rng([seed, number, index])
            scene = scenes.compose(rng, own, photographs)
            name = f"{split}/{index:06d}.png"
            Image.fromarray(scenes.draw(scene)).save(root / name)
            images.append({"id": index, "file_name": name, "width": scenes.SIDE, "height": scenes.SIDE})
            annotations += [annotation(index, digit, scene) for digit in scene.digits]
            rows.append(reasoning_row(name, scene.digits, rng))
        coco = {
            "images": images,
            "annotations": [{**a, "id": i} for i, a in enumerate(annotations, start=1)],
            "categories": [{"id": value, "name": str(value)} for value in range(10)],
        }
        (root / f"refer_{split}.json").write_text(json.dumps(coco), encoding="utf-8")
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (root / f"reason_{split}.jsonl").write_text(lines, encoding="utf-8")
        if split == "train":
            texts = [turn["value"] for row in rows for turn in row["message"]]
            texts += [f"Segment {name}. Where is {name}?" for a in annotations for name in a["expressions"]]
    return texts


def reasoning_row(name: str, digits: Digits, rng: np.random.Generator) -> dict[str, Any]:
    """A conversation about one picture: questions with one answer, and the digits of one colour, of which there may be none."""
    message: list[dict[str, str]] = []
    objects: dict[str, list[Any]] = {"ref": [], "mask": []}
    asked = [*_single(digits), _colour(digits, str(rng.choice(sorted(scenes.COLOURS))))]
    for number, at in enumerate(rng.permutation(len(asked))):
        question, answer, meant = asked[at]
        start = "<image>\n" if number == 0 else ""
        message += [{"from": "human", "value": start + question}, {"from": "gpt", "value": answer}]
        objects["ref"] += [f"the {digit.name}" for digit in meant]
        objects["mask"] += [run_lengths(scenes.mask_of(digit)) for digit in meant]
    return {
        "main_task_type": "understanding",
        "input_img": [{"path": name, "height": scenes.SIDE, "width": scenes.SIDE}],
        "output_img": [],
        "message": message,
        "objects": objects,
    }


def _single(digits: Digits) -> Iterator[tuple[str, str, list[scenes.Digit]]]:
    for question, rank in QUESTIONS.items():
        ranked = sorted(digits, key=rank, reverse=True)
        if len(ranked) < 2 or rank(ranked[0]) - rank(ranked[1]) >= 1:
            yield question, f"The {ranked[0].value}: <SEG>", [ranked[0]]


def _colour(digits: Digits, colour: str) -> tuple[str, str, list[scenes.Digit]]:
    meant = [d for d in digits if d.colour == colour]
    said = ", ".join(f"the {d.value}: <SEG>" for d in meant)
    return f"Segment every {colour} digit.", said or "There is none.", meant


def write_base(folder: Path, heads: dict[str, Any], texts: Sequence[str]) -> None:
    """An untrained model directory: tokenizer, configurations, and an autoencoder that nothing uses (`--visual_gen False`)."""
    bagel = {
        "latent_patch_size": 2,
        "max_latent_size": 4,
        "vit_max_num_patch_per_side": 8,
        "head_reads": "self",
        "heads": heads,
    }
    tokenizer = train_tokenizer(iter([t.replace("<image>", "").strip() for t in texts]), 300)
    write_model(folder, tokenizer, llm=LLM, vit=VIT, bagel=bagel, preprocessor=PREPROCESSOR)
    torch.manual_seed(0)
    small = AutoEncoderConfig(ch=8, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=4, num_groups=4)
    save_autoencoder(AutoEncoder(small), folder)


if __name__ == "__main__":
    main()
