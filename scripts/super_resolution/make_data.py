"""Make the 4x super-resolution task from the photographs that come with scikit-image, and the model directory it starts from.

Out, under `--output_dir`:

    data/train.jsonl, data/test.jsonl    rows of `edit_jsonl`: the enlarged small picture, the photograph
    data/train/, data/test/              `NNNNN_low.png`, `NNNNN_high.png`, 32x32 pixels each
    base/                                tokenizer and configurations, no weights

The small picture has a quarter of the sides: the photograph blurred by `--blur` pixels (the optics), sampled at the middle of
every 4x4 block and rounded to 8 bits. It goes into the model enlarged by bicubic interpolation, which is what the model is
compared with. The left three quarters of every photograph are for training, the right quarter is for the test; nothing overlaps.

    python scripts/super_resolution/make_data.py --output_dir runs/super_resolution
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from modeling.optional import require
from scripts.data import make_quickstart_model as quickstart

PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "coffee",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "stereo_motorcycle",
)
"""Of those that are installed with scikit-image: photographs with detail. The others of `skimage.data` would be downloaded."""
SCALE, SIDE = 4, 32
MIN_CONTRAST = 8.0
"""Standard deviation, of 255, below which a crop is nearly of one colour and not held out: its PSNR would say nothing."""
INSTRUCTION = "Sharpen."

LLM: dict[str, Any] = {
    **quickstart.LLM, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 384,
}  # fmt: skip
VIT: dict[str, Any] = {
    **quickstart.VIT, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": SIDE // SCALE, "stem_width": 0,
}  # fmt: skip
BAGEL: dict[str, Any] = {
    **quickstart.BAGEL, "latent_patch_size": 2, "max_latent_size": SIDE // 8, "vit_max_num_patch_per_side": 1, "heads": {},
}  # fmt: skip
PREPROCESSOR: dict[str, Any] = {
    # The vision tower is shown the small picture at its own size.
    "vit": {"max_image_size": SIDE // SCALE, "min_image_size": SIDE // SCALE, "stride": 8},
    "vae": {"max_image_size": SIDE, "min_image_size": SIDE, "stride": 8},
}

Pixels = NDArray[np.uint8]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--crops", type=int, default=4000, help="training crops over all photographs")
    parser.add_argument("--blur", type=float, default=2.0, help="standard deviation in pixels; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    halves = [split(photograph) for photograph in read_photographs()]
    train = [(degrade(left, args.blur), left) for left, _ in halves]
    test = [(degrade(right, args.blur), right) for _, right in halves]
    counts = {
        "train": write(args.output_dir / "data", "train", random_crops(train, args.crops, rng)),
        "test": write(args.output_dir / "data", "test", grid_of_crops(test)),
    }
    tokenizer = quickstart.train_tokenizer(iter([INSTRUCTION]), 0)
    base = args.output_dir / "base"
    quickstart.write_model(base, tokenizer, llm=LLM, vit=VIT, bagel=BAGEL, preprocessor=PREPROCESSOR)
    print(f"{args.output_dir}: {counts['train']} crops to train on, {counts['test']} held out")


def read_photographs() -> Iterator[Pixels]:
    """`hh ww 3` each, from the installed package."""
    data = require("skimage.data", package="scikit-image", extra="demo", why="the super-resolution recipe")
    for name in PHOTOGRAPHS:
        loaded = getattr(data, name)()
        pixels = np.asarray(loaded[0] if isinstance(loaded, tuple) else loaded)
        yield pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)


def split(pixels: Pixels) -> tuple[Pixels, Pixels]:
    """The left three quarters and the right quarter, sides whole numbers of blocks."""
    height, width = (side // SCALE * SCALE for side in pixels.shape[:2])
    border = width * 3 // 4 // SCALE * SCALE
    return pixels[:height, :border], pixels[:height, border:width]


def degrade(pixels: Pixels, blur: float) -> Pixels:
    """What is known of a photograph: blurred, one pixel kept of every block, enlarged again to the same size."""
    height, width = pixels.shape[:2]
    soft = pixels.astype(np.float64)
    if blur > 0:
        place = np.arange(-int(4 * blur), int(4 * blur) + 1)
        line = np.exp(-(place**2) / (2 * blur**2))
        for axis in (0, 1):
            reach = [(len(place) // 2,) * 2 if a == axis else (0, 0) for a in range(3)]
            padded = np.pad(soft, reach, mode="edge")
            window = np.lib.stride_tricks.sliding_window_view(padded, len(line), axis=axis)
            soft = window @ (line / line.sum())
    blocks = soft.reshape(height // SCALE, SCALE, width // SCALE, SCALE, 3)
    middle = slice(SCALE // 2 - 1, SCALE // 2 + 1)
    small = np.clip(np.rint(blocks[:, middle, :, middle].mean((1, 3))), 0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def random_crops(
    pairs: Sequence[tuple[Pixels, Pixels]], count: int, rng: np.random.Generator
) -> Iterator[tuple[Pixels, Pixels]]:
    """Crops of the photographs in turn, anywhere on the grid of blocks, half of them mirrored."""
    for number in range(count):
        low, high = pairs[number % len(pairs)]
        top, left = (int(rng.integers((side - SIDE) // SCALE + 1)) * SCALE for side in high.shape[:2])
        step = 1 if rng.random() < 0.5 else -1
        yield tuple(x[top : top + SIDE, left : left + SIDE][:, ::step] for x in (low, high))  # type: ignore[misc]


def grid_of_crops(pairs: Sequence[tuple[Pixels, Pixels]]) -> Iterator[tuple[Pixels, Pixels]]:
    """Every whole crop side by side, if there is something on it."""
    for low, high in pairs:
        height, width = high.shape[:2]
        for top in range(0, height - SIDE + 1, SIDE):
            for left in range(0, width - SIDE + 1, SIDE):
                place = slice(top, top + SIDE), slice(left, left + SIDE)
                if high[place].std() >= MIN_CONTRAST:
                    yield low[place], high[place]


def write(folder: Path, part: str, crops: Iterator[tuple[Pixels, Pixels]]) -> int:
    """Write pictures and rows; returns how many."""
    (folder / part).mkdir(parents=True, exist_ok=True)
    rows = []
    for number, crop in enumerate(crops):
        names = [f"{part}/{number:05d}_{what}.png" for what in ("low", "high")]
        for name, pixels in zip(names, crop, strict=True):
            Image.fromarray(np.ascontiguousarray(pixels)).save(folder / name)
        turns = [{"from": "human", "value": INSTRUCTION}, {"from": "gpt", "value": ""}]
        low, high = ([{"path": name}] for name in names)
        rows.append({"input_img": low, "output_img": high, "message": turns})
    (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


if __name__ == "__main__":
    main()
