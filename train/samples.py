"""What the model says and draws of a few samples that stay the same: sheets to look at, figures, and a guard against collapse.

In: samples and the model's continuations. Out: one picture per group (a row per sample: what was seen, what was asked for, what
was drawn; true regions green, the model's red), the texts, and figures by name.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data.types import Region, Sample
from modeling.bagel.continuation import Continuation
from modeling.bagel.regions import Box, regions_of
from train.metrics.boxes import box_iou
from train.metrics.image import psnr
from train.metrics.text import normalise

Picture = NDArray[np.uint8]
"""`hh ww 3`."""

TRUE, FOUND = (0, 170, 60), (220, 30, 30)
SIDE, GAP, LINE, FONT_SIZE = 256, 8, 16, 12
LETTERS_PER_LINE = 44

COLOUR_SHIFT, FLAT, NOISY, PSNR_DROP = 0.2, 0.35, 2.0, 3.0
"""When pictures have collapsed: their mean colour is this far (of 0 to 1) from the true ones'; their contrast is less or more
than these multiples of the true ones'; their PSNR is so many dB below the best of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One sample and what the model made of it.

    Attributes:
        where: its record, for people.
        text, target_text: what was written, and what should have been; None where nothing is asked for.
        prompt: the texts before.
        seen: the last picture that it was shown.
        boxes, masks: found in `seen`; `true_boxes`, `true_masks` likewise.
        drawn, target: the picture that was drawn, and the one that should have been.
    """

    where: str
    prompt: str
    text: str | None = None
    target_text: str | None = None
    seen: Picture | None = None
    boxes: Sequence[Box] = ()
    true_boxes: Sequence[Box] = ()
    masks: Sequence[NDArray[np.bool_]] = ()
    true_masks: Sequence[NDArray[np.bool_]] = ()
    drawn: Picture | None = None
    target: Picture | None = None

    def to_json(self) -> dict[str, Any]:
        """All but the pictures."""
        return {
            "where": self.where,
            "prompt": self.prompt,
            "answer": self.text,
            "expected": self.target_text,
            "boxes": [[round(v, 2) for v in box] for box in self.boxes],
            "expected_boxes": [[round(v, 2) for v in box] for box in self.true_boxes],
        }


def shown(sample: Sample, made: Continuation, decode: Callable[[list[int]], str]) -> Shown:
    """A sample and its continuation as people see them; `decode` gives the text of token ids."""
    pictures = [s for s in sample.segments if s.kind in ("und_image", "cond_image") and not s.dropped]
    writes = bool(made.target_ids)
    first = next((i for i, s in enumerate(sample.segments) if s.supervised or s.kind == "gen_image"), None)
    seen = _picture(pictures[-1].pixels) if pictures else None
    boxes, masks = regions_of(made.heads, (seen.shape[1], seen.shape[0])) if seen is not None else ([], [])
    regions = [r for r in sample.regions if writes and r.segment == first]
    return Shown(
        where=sample.origin.where,
        prompt=" | ".join(decode(s.ids.tolist()) for s in sample.segments[:first] if s.kind == "text"),
        text=decode(made.ids) if writes else None,
        target_text=decode(made.target_ids) if writes else None,
        seen=seen,
        boxes=boxes,
        masks=masks,
        true_boxes=[_box(r, seen) for r in regions if r.head == "box" and seen is not None],
        true_masks=[r.mask.bool().numpy() for r in regions if r.head == "mask"],
        drawn=None if made.drawn is None else _picture(made.drawn),
        target=None if made.target is None else _picture(made.target),
    )


# -------------------------------------------------------------------------------------------------------------- figures


def sample_figures(rows: Sequence[Shown]) -> dict[str, float]:
    """What can be counted of some samples; a figure without a sample is left out.

    Returns:
        `text_exact`, share of answers as expected; `box_iou`, mean over expected boxes (one that is not there counts 0); `giou`
        and `ciou` of masks, as referring segmentation calls them: the mean of the IoUs, and all intersections over all unions;
        of pictures `psnr` (dB, mean), `colour_shift` (0 to 1, between the mean colours, worst channel) and `contrast` (standard
        deviation over that of the expected pictures).
    """
    figures: dict[str, float] = {}
    answers = [row for row in rows if row.target_text is not None]
    if answers:
        same = [normalise(row.text or "") == normalise(row.target_text or "") for row in answers]
        figures["text_exact"] = sum(same) / len(same)
    boxes = [(_nth(row.boxes, i), true) for row in rows for i, true in enumerate(row.true_boxes)]
    if boxes:
        figures["box_iou"] = sum(0.0 if box is None else box_iou(box, true) for box, true in boxes) / len(
            boxes
        )
    masks = [(_nth(row.masks, i), true) for row in rows for i, true in enumerate(row.true_masks)]
    if masks:
        both = [_overlap(mask, true) for mask, true in masks]
        figures["giou"] = sum(i / u if u else 1.0 for i, u in both) / len(both)
        figures["ciou"] = sum(i for i, _ in both) / max(1, sum(u for _, u in both))
    pairs = [(row.drawn, row.target) for row in rows if row.drawn is not None and row.target is not None]
    if pairs:
        figures["psnr"] = sum(psnr(drawn, target) for drawn, target in pairs) / len(pairs)
        means = [_mean([picture.mean((0, 1)) for picture in side]) for side in zip(*pairs, strict=True)]
        figures["colour_shift"] = float(np.abs(means[0] - means[1]).max()) / 255
        spread = [
            sum(float(picture.std((0, 1)).mean()) for picture in side) for side in zip(*pairs, strict=True)
        ]
        figures["contrast"] = spread[0] / max(spread[1], 1e-6)
    return figures


def collapse(figures: Mapping[str, float], best_psnr: float | None) -> list[str]:
    """What looks wrong with drawn pictures, in words for people; none if they look like the expected ones, or none were drawn.

    Args:
        figures: of `sample_figures`.
        best_psnr: the best one of the run so far.
    """
    if "psnr" not in figures:
        return []
    found = []
    if figures["colour_shift"] > COLOUR_SHIFT:
        found.append(
            f"their mean colour is {figures['colour_shift']:.0%} of the range away from the true pictures'"
        )
    if figures["contrast"] < FLAT:
        found.append(f"they are flat: their contrast is {figures['contrast']:.2f} of the true pictures'")
    if figures["contrast"] > NOISY:
        found.append(f"they are noisy: their contrast is {figures['contrast']:.2f} times the true pictures'")
    if best_psnr is not None and figures["psnr"] < best_psnr - PSNR_DROP:
        found.append(f"their PSNR is {figures['psnr']:.1f} dB, it has been {best_psnr:.1f} dB")
    return found


class Guard:
    """Remembers how pictures of every group have been, so that what is said of them is news."""

    def __init__(self) -> None:
        self._best_psnr: dict[str, float] = {}
        self._was_well: dict[str, bool] = {}

    def judge(self, group: str, figures: Mapping[str, float]) -> list[str]:
        """What to say of a group's pictures: each time if they have been well, once if they never were (a new model)."""
        if "psnr" not in figures:
            return []
        wrong = collapse(figures, self._best_psnr.get(group))
        is_news = self._was_well.get(group, True)
        self._was_well[group] = not wrong or self._was_well.get(group, False)
        self._best_psnr[group] = max(figures["psnr"], self._best_psnr.get(group, -math.inf))
        return wrong if is_news else []


def _nth(values: Sequence[Any], index: int) -> Any:
    return values[index] if index < len(values) else None


def _overlap(mask: NDArray[np.bool_] | None, true: NDArray[np.bool_]) -> tuple[int, int]:
    if mask is None or mask.shape != true.shape:
        return 0, int(true.sum())
    return int((mask & true).sum()), int((mask | true).sum())


def _mean(values: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.stack(values).mean(0)


# --------------------------------------------------------------------------------------------------------------- sheets


def sheet(rows: Sequence[Shown]) -> Picture:
    """One picture of some samples, a row each."""
    strips = [_row(row) for row in rows]
    height, width = sum(s.shape[0] + GAP for s in strips), max(s.shape[1] for s in strips)
    page = np.full((height, width, 3), 255, dtype=np.uint8)
    top = 0
    for strip in strips:
        page[top : top + strip.shape[0], : strip.shape[1]] = strip
        top += strip.shape[0] + GAP
    return page


def _row(row: Shown) -> Picture:
    places = (("seen", _marked(row)), ("asked for", row.target), ("drawn", row.drawn))
    tiles = [(name, picture) for name, picture in places if picture is not None]
    lines = [*_wrapped("prompt: ", row.prompt, len(tiles))]
    if row.target_text is not None:
        lines += _wrapped("expected: ", row.target_text, len(tiles)) + _wrapped(
            "answer: ", row.text or "", len(tiles)
        )
    width, side = max(1, len(tiles)) * (SIDE + GAP), SIDE + LINE if tiles else 0
    page = Image.new("RGB", (width, side + LINE * len(lines)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(FONT_SIZE)
    for number, (name, picture) in enumerate(tiles):
        image = Image.fromarray(picture)
        scale = SIDE / max(image.size)
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        page.paste(image, (number * (SIDE + GAP), LINE))
        draw.text((number * (SIDE + GAP), 0), name, fill="black", font=font)
    for number, line in enumerate(lines):
        draw.text((0, side + LINE * number), line, fill="black", font=font)
    return np.asarray(page)


def _marked(row: Shown) -> Picture | None:
    if row.seen is None:
        return None
    shaded = row.seen.astype(np.float32)
    for masks, colour in ((row.true_masks, TRUE), (row.masks, FOUND)):
        for mask in masks:
            if mask.shape == shaded.shape[:2]:
                shaded[mask] = shaded[mask] * 0.6 + np.array(colour) * 0.4
    image = Image.fromarray(shaded.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for boxes, colour in ((row.true_boxes, TRUE), (row.boxes, FOUND)):
        for x0, y0, x1, y1 in boxes:
            if all(math.isfinite(v) for v in (x0, y0, x1, y1)):
                draw.rectangle((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), outline=colour)
    return np.asarray(image)


def _wrapped(label: str, text: str, tiles: int) -> list[str]:
    """The text in lines as wide as the tiles, four at most."""
    width = LETTERS_PER_LINE * max(1, tiles)
    text = label + " ".join(text.split())
    # The built-in font may know no other letters than these; answers.json has them all.
    text = "".join(c if c.isprintable() and ord(c) < 256 else "?" for c in text)
    return [text[i : i + width] for i in range(0, len(text), width)][:4]


def _picture(pixels: Tensor) -> Picture:
    return np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy())


def _box(region: Region, seen: Picture) -> Box:
    x0, y0, x1, y1 = region.boxes[0].tolist()
    return x0 * seen.shape[1], y0 * seen.shape[0], x1 * seen.shape[1], y1 * seen.shape[0]
