"""Draw docs/quickstart.png: what a trained quickstart answered on its test scenes, one card per task.

    python scripts/make_readme_picture.py --run_dir runs/quickstart --output docs/quickstart.png

In: an evaluated run (`results.jsonl`, `images/`). The samples are the first of their task, right or wrong; `--skip N` takes
later ones.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Row = Mapping[str, Any]

SIDE, GAP, PAD, TOP = 264, 36, 28, 74
INK, PALE, SAID, LINE, MARK = (28, 32, 40), (110, 118, 130), (196, 30, 120), (222, 226, 232), (255, 79, 216)
TITLE, BODY = ImageFont.load_default(25), ImageFont.load_default(19)


class Sheet:
    """The picture, filled card by card."""

    def __init__(self, columns: int):
        self.image = Image.new("RGB", (2 * PAD + columns * SIDE + (columns - 1) * GAP, 470), "white")
        self.draw = ImageDraw.Draw(self.image)

    def place(self, column: int) -> int:
        """Left edge of a column in pixels."""
        return PAD + column * (SIDE + GAP)

    def title(self, column: int, verb: str, span: int = 1) -> None:
        """A heading over `span` columns."""
        x = self.place(column)
        self.draw.text((x, 22), verb, font=TITLE, fill=INK)
        self.draw.line([x, 60, x + span * SIDE + (span - 1) * GAP, 60], fill=LINE, width=2)

    def card(self, column: int, picture: Image.Image, asked: str = "", said: str = "") -> None:
        """A picture, the prompt in gray and the answer in colour below it."""
        self.image.paste(picture, (self.place(column), TOP))
        y = TOP + SIDE + 14
        for text, fill in [(line, PALE) for line in _wrapped(self.draw, asked)] + [(said, SAID)]:
            self.draw.text((self.place(column), y), text, font=BODY, fill=fill)
            y += 29 if text else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Draw and write; 1 and one clear line if the run has no results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--skip", type=int, default=0, help="so many samples of each task")
    args = parser.parse_args(argv)
    try:
        rows = [json.loads(line) for line in (args.run_dir / "results.jsonl").read_text().splitlines()]
        if short := [t for _, _, t, _ in CARDS if sum(r["task"] == t for r in rows) <= args.skip]:
            raise ValueError(f"no more than {args.skip} samples of {', '.join(short)}; lower --skip")
        sheet = Sheet(6)
        column = 0
        for verb, span, task, fill in CARDS:
            sheet.title(column, verb, span)
            fill(sheet, column, [r for r in rows if r["task"] == task][args.skip], args.run_dir)
            column += span
        sheet.image.save(args.output, optimize=True)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except (ValueError, KeyError) as error:
        print(f"error: {args.run_dir / 'results.jsonl'}: {error}; evaluate the run first", file=sys.stderr)
        return 1
    print(args.output)
    return 0


def answered(sheet: Sheet, column: int, row: Row, root: Path) -> None:
    sheet.card(column, _scene(row, root), row["question"], row["answer"])


def pointed(sheet: Sheet, column: int, row: Row, root: Path) -> None:
    picture = _scene(row, root)
    if row["pred_box"]:
        k = SIDE / Image.open(root / row["input_images"][0]).width
        ImageDraw.Draw(picture).rectangle([v * k for v in row["pred_box"]], outline=MARK, width=4)
    sheet.card(column, picture, row["question"], row["answer"])


def segmented(sheet: Sheet, column: int, row: Row, root: Path) -> None:
    pixels = np.asarray(_scene(row, root)).astype(float)
    if row.get("pred_mask"):
        mask = Image.open(root / row["pred_mask"]).convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        on = (np.asarray(mask) > 127)[..., None]
        pixels = np.where(on, 0.35 * pixels + 0.65 * np.array(MARK), 0.6 * pixels)
    sheet.card(column, Image.fromarray(pixels.astype(np.uint8)), row["question"], row["answer"])


def edited(sheet: Sheet, column: int, row: Row, root: Path) -> None:
    sheet.card(column, _scene(row, root), row["question"], row["answer"].strip())
    sheet.card(column + 1, _enlarged(root / row["image"]))
    x, y = sheet.place(column + 1) - GAP + 7, TOP + SIDE // 2
    sheet.draw.line([x, y, x + 16, y], fill=INK, width=3)
    sheet.draw.polygon([(x + 14, y - 7), (x + 24, y), (x + 14, y + 7)], fill=INK)


def drawn(sheet: Sheet, column: int, row: Row, root: Path) -> None:
    sheet.card(column, _enlarged(root / row["image"]), row["question"])


CARDS: tuple[tuple[str, int, str, Callable[[Sheet, int, Row, Path], None]], ...] = (
    ("answers", 1, "vqa", answered),
    ("points", 1, "box", pointed),
    ("segments", 1, "mask", segmented),
    ("edits", 2, "edit", edited),
    ("draws", 1, "t2i", drawn),
)
"""Heading, columns, task and how its card is filled."""


def _scene(row: Row, root: Path) -> Image.Image:
    return _enlarged(root / row["input_images"][0])


def _enlarged(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _wrapped(draw: ImageDraw.ImageDraw, text: str) -> list[str]:
    """Lines no wider than a card."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if draw.textlength(longer, BODY) <= SIDE else [*lines, word]
    return lines


if __name__ == "__main__":
    sys.exit(main())
