"""Make the detection task from handwritten digits and photographs that come with Python packages, and the model to start from.

Out, under `--output_dir`:

    data/train.jsonl, data/test.jsonl    rows of `detection_jsonl` (data/detections.py)
    data/train/, data/test/              pictures, 64x64 pixels
    data/labels.txt                      the labels, one a line
    base/                                tokenizer and configurations with a `detr` head, no weights

A scene has none to six digits of 12 to 20 pixels, none over another, three times in four on a photograph; labels are the digits'
names. Glyphs of the test are in no scene of the training set.

    python scripts/detection/make_scenes.py --output_dir runs/detection
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.detection_tools import write_rows
from scripts.data import make_quickstart_model as model_files
from scripts.data import quickstart_scenes as scenes
from scripts.data.make_quickstart import load_glyphs, load_photographs, split_glyphs
from scripts.detection.classes import give_classes

MOST, SIZES = 6, (12, 20)
PROMPT = "Find all digits."
LABELS = scenes.NUMBER_WORDS[:10]

LLM: dict[str, Any] = {
    **model_files.LLM, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 128,
}  # fmt: skip
VIT: dict[str, Any] = {
    **model_files.VIT,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 384,
}
DETR: dict[str, Any] = {
    "width": 128, "num_heads": 4, "num_layers": 3, "feed_forward": 256, "num_queries": 20, "adapter_ratio": 0,
}  # fmt: skip
BAGEL: dict[str, Any] = {**model_files.BAGEL, "heads": {"detr": DETR}}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=20000, help="to train on")
    parser.add_argument("--test_scenes", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    data = args.output_dir / "data"
    glyphs, photographs = load_glyphs(), load_photographs()
    parts = split_glyphs(glyphs.labels, args.seed)
    for part, count in (("train", args.scenes), ("test", args.test_scenes)):
        own = glyphs.take(parts[part], jitter=part == "train")
        write_rows(data / f"{part}.jsonl", rows(data, part, count, own, photographs, args.seed))
    (data / "labels.txt").write_text("\n".join(LABELS) + "\n", encoding="utf-8")
    tokenizer = model_files.train_tokenizer(iter([PROMPT, " ".join(LABELS)] * 2), 40)
    base = args.output_dir / "base"
    model_files.write_model(
        base, tokenizer, llm=LLM, vit=VIT, bagel=BAGEL, preprocessor=model_files.PREPROCESSOR
    )
    give_classes(base, LABELS)
    print(f"{args.output_dir}: {args.scenes} scenes to train on, {args.test_scenes} held out")


def rows(
    folder: Path,
    part: str,
    count: int,
    glyphs: scenes.Glyphs,
    photographs: dict[str, np.ndarray],
    seed: int,
) -> Iterator[dict[str, Any]]:
    """The row of each scene; its picture is written."""
    (folder / part).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        rng = np.random.default_rng([seed, part == "test", number])
        scene = compose(rng, glyphs, photographs)
        name = f"{part}/{number:05d}.png"
        Image.fromarray(scenes.draw(scene)).save(folder / name)
        objects = [{"bbox_2d": list(d.box), "label": LABELS[d.value]} for d in scene.digits]
        yield {"images": [name], "objects": objects, "width": scenes.SIDE, "height": scenes.SIDE}


def compose(
    rng: np.random.Generator, glyphs: scenes.Glyphs, photographs: dict[str, np.ndarray]
) -> scenes.Scene:
    """One scene."""
    if rng.random() < 0.75:
        background, name = scenes.photograph_background(rng, photographs)
    else:
        background, name = scenes.any_background(rng, photographs)
    count = int(rng.integers(MOST + 1))
    digits = scenes.place(rng, glyphs, count, SIZES) if count else ()
    return scenes.Scene(digits=digits, background=background, background_name=name)


if __name__ == "__main__":
    main()
