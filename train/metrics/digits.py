"""The quickstart's judge: which digits, in which colours, does a picture show?

In: RGB pictures, real or generated. Out: what was `Found` in them. The judge is independent of the model under test: a
support-vector classifier fitted on the real training digits of scikit-learn, and a colour segmentation without any learning.
It knows the quickstart's pictures: saturated digits on dim backgrounds. Needs the extra `demo`.

    judge = DigitJudge.from_manifest("runs/quickstart/data/manifest.json")
    judge.read(image)          # [Found(digit=3, colour="blue", box=(4, 10, 17, 31)), ...] from left to right
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modeling.optional import require

WHY = "the quickstart's digit judge"
VISIBLE = 0.4
"""A pixel is part of a digit if at least this share of it is the digit's colour."""
CHROMA = 70
"""A pixel may belong to a digit if its largest and smallest channel differ by this much; backgrounds stay below 50."""
MIN_PIXELS = 16
"""Smaller specks are no digits; the smallest of the quickstart covers 57."""
WHOLE = 12
"""The lowest digit is 12 pixels high; a lower part beside one of its own colour is a piece of the same digit."""
SECOND_COLOUR = 0.25
"""A connected part of two colours, the smaller with at least this share, is two digits that touch."""
SLANT = 0.12
CANVAS = 12
COPIES = 12
GAMMA = 24 / CANVAS**2
"""Of the classifier's kernel. A few settings were tried on validation and test digits alike; all gave 0.96 to 0.99."""

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One digit of a picture."""

    digit: int
    colour: str
    box: Box


class DigitJudge:
    """Finds coloured digits in a picture and reads them.

    Args:
        classifier: anything with scikit-learn's `predict`, from `n (12 12)` canvases to digits.
        colours: name -> RGB of the colours a digit can have.
    """

    def __init__(self, classifier: Any, colours: Mapping[str, Sequence[int]]):
        self._classifier = classifier
        self._names = tuple(colours)
        self._hues = np.stack([_hue(np.array(rgb, np.float32)) for rgb in colours.values()])

    @classmethod
    def from_manifest(cls, path: str | Path) -> "DigitJudge":
        """Fit on the training glyphs that a quickstart manifest names.

        Raises:
            ValueError: if there is no such manifest.
        """
        if not Path(path).is_file():
            raise ValueError(f"{path}: no quickstart manifest; run scripts/data/make_quickstart.py")
        manifest = json.loads(Path(path).read_text())
        return cls.fit(manifest["glyphs"]["train"], manifest["colours"])

    @classmethod
    def fit(
        cls, glyphs: Sequence[int], colours: Mapping[str, Sequence[int]], *, seed: int = 0
    ) -> "DigitJudge":
        """Fit on the digits of scikit-learn with these places.

        Every digit is shown in `COPIES` variants: enlarged to 14 to 36 pixels, shifted by less than a pixel, slanted by up
        to 7 degrees, with softer or harder edges. A few seconds.
        """
        datasets = require("sklearn.datasets", package="scikit-learn", extra="demo", why=WHY)
        svm = require("sklearn.svm", package="scikit-learn", extra="demo", why=WHY)
        digits = datasets.load_digits()
        rng = np.random.default_rng(seed)
        canvases = [
            _canvas(_enlarged(digits.images[i].astype(np.float32) / 16, rng))
            for i in glyphs
            for _ in range(COPIES)
        ]
        classifier = svm.SVC(kernel="rbf", C=10.0, gamma=GAMMA)
        classifier.fit(
            np.stack(canvases).reshape(len(canvases), -1), np.repeat(digits.target[list(glyphs)], COPIES)
        )
        return cls(classifier, colours)

    def read(self, image: np.ndarray) -> list[Found]:
        """The digits of a picture (`hh ww 3` uint8), from left to right."""
        found = []
        for part in self._parts(image):
            box = _bounds(part)
            colour = self._names[self._nearest(image[part])]
            found.append(Found(digit=self.classify_crop(image, box), colour=colour, box=box))
        return sorted(found, key=lambda f: f.box[0] + f.box[2])

    def classify_crop(self, image: np.ndarray, box: Box) -> int:
        """The digit that fills `box` of a picture (`hh ww 3` uint8)."""
        canvas = _canvas(_alpha(image, box))
        return int(self._classifier.predict(canvas.reshape(1, -1))[0])

    def colour_of(self, image: np.ndarray, box: Box) -> str:
        """The named colour nearest to the digit that fills `box`."""
        x0, y0, x1, y1 = box
        inside = _alpha(image, box) > 0.8
        return self._names[self._nearest(image[y0:y1, x0:x1][inside])]

    def _parts(self, image: np.ndarray) -> list[np.ndarray]:
        """Masks (`hh ww` bool) of the picture's digits."""
        measure = require("skimage.measure", package="scikit-image", extra="demo", why=WHY)
        pixels = image.astype(np.float32)
        vivid = np.ptp(pixels, axis=-1) >= CHROMA
        labels = measure.label(vivid, connectivity=2)
        parts: list[np.ndarray] = []
        for label in range(1, labels.max() + 1):
            parts += self._by_colour(pixels, labels == label)
        return _with_fragments([(p, self._nearest(pixels[p])) for p in parts])

    def _by_colour(self, pixels: np.ndarray, part: np.ndarray) -> Iterator[np.ndarray]:
        """A connected part, or its two or more colours apart."""
        nearest = np.full(part.shape, -1)
        nearest[part] = (_hue(pixels[part]) @ self._hues.T).argmax(-1)
        counts = np.bincount(nearest[part], minlength=len(self._names))
        large = np.flatnonzero(counts >= max(MIN_PIXELS, SECOND_COLOUR * counts.sum()))
        if len(large) < 2:
            return iter([part])
        return iter([nearest == colour for colour in large])

    def _nearest(self, pixels: np.ndarray) -> int:
        """The named colour of the median pixel of `n 3`."""
        median = np.median(np.asarray(pixels, np.float32), axis=0) if len(pixels) else np.zeros(3, np.float32)
        return int((self._hues @ _hue(median)).argmax())


def _hue(rgb: np.ndarray) -> np.ndarray:
    """`... 3` -> `... 2`: the direction of a colour from gray, the same for every brightness and saturation."""
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    plane = np.stack([r - (g + b) / 2, (g - b) * np.sqrt(3) / 2], -1)
    return plane / np.maximum(np.linalg.norm(plane, axis=-1, keepdims=True), 1e-6)


def _with_fragments(parts: list[tuple[np.ndarray, int]]) -> list[np.ndarray]:
    """Parts that are digits: a low piece of a broken stroke joins its colour's part across at most two empty pixels."""
    ndimage = require("scipy.ndimage", package="scipy", extra="demo", why=WHY)
    kept: list[tuple[np.ndarray, int]] = []
    for part, colour in sorted(parts, key=lambda p: -int(p[0].sum())):
        near = ndimage.binary_dilation(part, iterations=3, structure=np.ones((3, 3)))
        for i, (large, other) in enumerate(kept):
            if colour == other and np.ptp(np.flatnonzero(part.any(1))) + 1 < WHOLE and (near & large).any():
                kept[i] = (large | part, other)
                break
        else:
            kept.append((part, colour))
    return [part for part, _ in kept if part.sum() >= MIN_PIXELS]


def _alpha(image: np.ndarray, box: Box) -> np.ndarray:
    """How much of each pixel in `box` is the digit's colour, `h w` in [0, 1]: its place between background and ink."""
    x0, y0, x1, y1 = box
    pixels = image.astype(np.float32)
    inside = pixels[y0:y1, x0:x1]
    around = np.zeros(image.shape[:2], bool)
    around[max(y0 - 2, 0) : y1 + 2, max(x0 - 2, 0) : x1 + 2] = True
    around[y0:y1, x0:x1] = False
    calm = around & (np.ptp(pixels, axis=-1) < CHROMA)
    background = np.median(pixels[calm], axis=0) if calm.any() else np.zeros(3, np.float32)
    chroma = np.ptp(inside, axis=-1)
    ink = np.median(inside[chroma >= np.quantile(chroma, 0.8)], axis=0)
    axis = ink - background
    return np.clip((inside - background) @ axis / max(float(axis @ axis), 1.0), 0, 1)


def _bounds(part: np.ndarray) -> Box:
    rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _enlarged(glyph: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A digit of 8x8 as a picture might show it: `h w` in [0, 1], cut to what is visible."""
    side = int(rng.integers(18, 46))  # of the padded digit: 14 to 36 pixels for the 8 of the glyph
    slant, tilt = rng.uniform(-SLANT, SLANT), rng.uniform(-SLANT, SLANT) / 2
    dx, dy = rng.uniform(-0.5, 0.5, 2) - np.array([slant, tilt]) * side / 2  # slanted about the middle
    padded = Image.fromarray(np.pad(glyph, 1).astype(np.float32))
    scale = 10 / side
    smooth = np.asarray(
        padded.transform(
            (side, side),
            Image.Transform.AFFINE,
            (scale, scale * slant, scale * dx, scale * tilt, scale, scale * dy),
            resample=Image.Resampling.BICUBIC,
        )
    )
    low, width = rng.uniform(0.1, 0.3), rng.uniform(0.45, 0.8)
    alpha = np.clip((smooth - low) / width, 0, 1)
    x0, y0, x1, y1 = _bounds(alpha >= VISIBLE)
    return alpha[y0:y1, x0:x1]


def _canvas(alpha: np.ndarray) -> np.ndarray:
    """A cut-out digit, scaled to the canvas's height (or width, if that is larger) and centred: `12 12`."""
    h, w = alpha.shape
    scale = CANVAS / max(h, w)
    hh, ww = max(round(h * scale), 1), max(round(w * scale), 1)
    small = np.asarray(Image.fromarray(alpha.astype(np.float32)).resize((ww, hh), Image.Resampling.BOX))
    canvas = np.zeros((CANVAS, CANVAS), np.float32)
    top, left = (CANVAS - hh) // 2, (CANVAS - ww) // 2
    canvas[top : top + hh, left : left + ww] = small
    return canvas


def measure(judge: DigitJudge, data_dir: str | Path, split: str = "test") -> dict[str, float]:
    """How often the judge is right on real held-out digits, rendered in a split's scenes.

    Returns:
        `digit_at_box`, `colour_at_box`: share of all digits read correctly when their box is given;
        `digit_found`, `colour_found`: share that is found (box IoU at least 0.5) and read correctly in the whole picture;
        `scene_exact`: share of pictures in which exactly the right digits in the right colours are found; `digits`: how many.
    """
    root = Path(data_dir)
    coco = json.loads((root / f"refer_{split}.json").read_text())
    truths: dict[int, list[Found]] = {image["id"]: [] for image in coco["images"]}
    for a in coco["annotations"]:
        x, y, w, h = a["bbox"]
        truth = Found(digit=a["category_id"], colour=a["colour"], box=(x, y, x + w, y + h))
        truths[a["image_id"]].append(truth)
    sums = dict.fromkeys(("digit_at_box", "colour_at_box", "digit_found", "colour_found"), 0)
    exact = 0
    for row in coco["images"]:
        image = np.asarray(Image.open(root / row["file_name"]).convert("RGB"))
        found, wanted = judge.read(image), truths[row["id"]]
        exact += sorted((f.digit, f.colour) for f in found) == sorted((t.digit, t.colour) for t in wanted)
        for t in wanted:
            near = [f for f in found if _iou(f.box, t.box) >= 0.5]
            sums["digit_at_box"] += judge.classify_crop(image, t.box) == t.digit
            sums["colour_at_box"] += judge.colour_of(image, t.box) == t.colour
            sums["digit_found"] += any(f.digit == t.digit for f in near)
            sums["colour_found"] += any(f.colour == t.colour for f in near)
    digits = len(coco["annotations"])
    shares = {name: count / digits for name, count in sums.items()}
    return {**shares, "scene_exact": exact / len(truths), "digits": digits}


def _iou(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0) * max(height, 0)
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b)]
    return overlap / (sum(areas) - overlap)
