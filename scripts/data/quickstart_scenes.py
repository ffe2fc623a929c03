"""Small scenes of coloured handwritten digits: what they are, how they are drawn, what can be asked about them.

In: glyphs (8x8 handwritten digits of scikit-learn), photographs (of scikit-image) and a random generator. Out: a
`Scene`, its 64x64 RGB picture, and the questions, captions, edits and expressions that are true of it. Pure functions.

A digit's mask is where its alpha is at least `VISIBLE`; its box is the tight bounds of that mask, and nothing of the digit
is drawn outside that box, so that a changed digit changes no pixel outside its box.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from PIL import Image

SIDE = 64
MARGIN = 2
"""Smallest gap between two digits' boxes, in pixels."""
VISIBLE = 0.4
MIN_STEP = 4
"""Smallest horizontal distance between two digits' centres, so that "left to right" is always clear."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 40, 40),
    "yellow": (245, 230, 45),
    "green": (45, 205, 70),
    "blue": (50, 105, 255),
}
BRIGHTNESS = (0.85, 1.0)
PLAIN: dict[str, tuple[int, int, int]] = {
    "black": (14, 14, 16),
    "gray": (66, 66, 66),
    "navy": (18, 24, 66),
    "brown": (62, 40, 22),
    "teal": (14, 60, 60),
}
"""The backgrounds that a caption names."""
PHOTOGRAPHS = (
    "astronaut",
    "camera",
    "chelsea",
    "coffee",
    "rocket",
    "brick",
    "coins",
    "grass",
    "gravel",
    "moon",
)
"""Those that are installed with scikit-image; the others of `skimage.data` would be downloaded."""
PLACES = (
    "at the top left",
    "at the top",
    "at the top right",
    "at the left",
    "in the centre",
    "at the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)
"""What captions call the nine points at a quarter, half and three quarters of each side, row by row."""
NEAR = 1
"""The middle of a digit is at most so many pixels off its place in either direction, unless it would be cut off."""
SIZES = {"small": (23, 25), "large": (31, 33)}
"""What captions call a digit whose glyph is enlarged to so many pixels."""
SQUARES = 8
"""A side is divided into so many, to say where something is."""
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

Pixels = np.ndarray
"""`64 64 3` uint8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Glyphs:
    """Handwritten digits: `images` is `n 8 8` float32 in [0, 1], `labels` is `n`, `index` their place in `load_digits`.

    With `jitter` each is written a little differently each time (`Hand`): twelve hundred glyphs are few to learn from.
    """

    images: np.ndarray
    labels: np.ndarray
    index: np.ndarray
    jitter: bool = False

    def take(self, places: np.ndarray, *, jitter: bool = False) -> "Glyphs":
        return Glyphs(
            images=self.images[places], labels=self.labels[places], index=self.index[places], jitter=jitter
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Digit:
    """One digit of a scene. `alpha` is `h w` float32, exactly as large as `box` (x0, y0, x1, y1 in pixels)."""

    value: int
    colour: str
    box: tuple[int, int, int, int]
    brightness: float
    glyph: int
    alpha: np.ndarray

    @property
    def centre(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2

    @property
    def name(self) -> str:
        return f"{self.colour} {self.value}"

    def facts(self) -> dict[str, Any]:
        """What evaluation has to know, JSON-able."""
        return {"digit": self.value, "colour": self.colour, "box": list(self.box), "glyph": self.glyph}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Digits from left to right on a background (`64 64 3` float32 in [0, 255])."""

    digits: tuple[Digit, ...]
    background: np.ndarray
    background_name: str

    def facts(self) -> dict[str, Any]:
        return {"digits": [d.facts() for d in self.digits], "background": self.background_name}


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A question, its one right answer and what kind of question it is."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """An instruction, where it applies (`square_of`), what is true afterwards, and the scene that it leads to."""

    instruction: str
    square: str
    report: str
    after: Scene
    facts: dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------- drawing


def draw(scene: Scene) -> Pixels:
    """The scene's picture."""
    canvas = scene.background.copy()
    for digit in scene.digits:
        x0, y0, x1, y1 = digit.box
        paint = np.array(COLOURS[digit.colour], np.float32) * digit.brightness
        alpha = digit.alpha[..., None]
        canvas[y0:y1, x0:x1] = canvas[y0:y1, x0:x1] * (1 - alpha) + paint * alpha
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def mask_of(digit: Digit) -> np.ndarray:
    """`64 64` uint8 0/1."""
    x0, y0, x1, y1 = digit.box
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[y0:y1, x0:x1] = digit.alpha >= VISIBLE
    return mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Hand:
    """How a glyph is written.

    Attributes:
        turn: in degrees.
        stretch: how much wider for its height than it was; the area stays.
        slant: how far it leans, as a share of the height.
        ink: from which gray level to which the stroke's edge runs; lower ones make a bolder stroke.
    """

    turn: float = 0.0
    stretch: float = 1.0
    slant: float = 0.0
    ink: tuple[float, float] = (0.2, 0.85)

    @staticmethod
    def any(rng: np.random.Generator) -> "Hand":
        """A little different each time."""
        low = rng.uniform(0.1, 0.3)
        return Hand(
            turn=rng.uniform(-12, 12),
            stretch=rng.uniform(0.8, 1.25),
            slant=rng.uniform(-0.15, 0.15),
            ink=(low, low + rng.uniform(0.5, 0.8)),
        )


AS_WRITTEN = Hand()


def glyph_alpha(image: np.ndarray, size: int, hand: Hand = AS_WRITTEN) -> np.ndarray:
    """An 8x8 glyph enlarged to a tile of `size` pixels and cut to the bounds of what is visible: `h w` float32 in [0, 1]."""
    padded = Image.fromarray(np.pad(image, 1).astype(np.float32))  # the strokes reach the tile's edge
    side = size * 10 / 8
    w, h = round(side * hand.stretch**0.5), round(side / hand.stretch**0.5)
    large = padded.resize((w, h), Image.Resampling.BICUBIC)
    if hand.turn:
        large = large.rotate(hand.turn, Image.Resampling.BICUBIC)
    if hand.slant:
        lean = (1, hand.slant, -hand.slant * h / 2, 0, 1, 0)
        large = large.transform((w, h), Image.Transform.AFFINE, lean, Image.Resampling.BICUBIC)
    low, high = hand.ink
    alpha = np.clip((np.asarray(large) - low) / (high - low), 0.0, 1.0)
    rows, columns = np.nonzero((alpha >= VISIBLE).any(1))[0], np.nonzero((alpha >= VISIBLE).any(0))[0]
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def plain_background(rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """One of the colours that a caption may name, a little lighter or darker from picture to picture."""
    name = str(rng.choice(list(PLAIN)))
    tint = np.array(PLAIN[name], np.float32) * rng.uniform(0.85, 1.15)
    return np.broadcast_to(tint, (SIDE, SIDE, 3)).astype(np.float32), name


def flat_background(rng: np.random.Generator) -> np.ndarray:
    return np.broadcast_to(_dim_tint(rng), (SIDE, SIDE, 3)).astype(np.float32)


def gradient_background(rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / (SIDE - 1) - 0.5
    ramp = np.clip((x * np.cos(angle) + y * np.sin(angle)) / 1.2 + 0.5, 0, 1)[..., None]
    return (_dim_tint(rng) * (1 - ramp) + _dim_tint(rng) * ramp).astype(np.float32)


def noise_background(rng: np.random.Generator) -> np.ndarray:
    """Noise with a grain of 1 to 16 pixels."""
    cells = int(rng.choice([4, 8, 16, 32, 64]))
    grain = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    smooth = np.asarray(Image.fromarray(grain).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return np.clip(_dim_tint(rng) + rng.uniform(8, 22) * smooth[..., None], 0, 110).astype(np.float32)


def photograph_background(
    rng: np.random.Generator, photographs: dict[str, np.ndarray]
) -> tuple[np.ndarray, str]:
    """A crop of a photograph, darkened and half robbed of its colour so that the digits stay readable."""
    name = str(rng.choice(list(photographs)))
    photograph = photographs[name]
    side = int(rng.integers(SIDE, min(photograph.shape[:2]) + 1))
    y, x = (int(rng.integers(0, n - side + 1)) for n in photograph.shape[:2])
    crop = Image.fromarray(photograph[y : y + side, x : x + side]).resize((SIDE, SIDE), Image.Resampling.BOX)
    pixels = np.asarray(crop, np.float32)
    gray = pixels.mean(-1, keepdims=True)
    pixels = gray + 0.5 * (pixels - gray)
    return np.clip(pixels * rng.uniform(0.22, 0.38) + rng.uniform(0, 12), 0, 110), f"photograph:{name}"


def _dim_tint(rng: np.random.Generator) -> np.ndarray:
    level = rng.uniform(8, 75)
    return np.clip(level + rng.uniform(-0.35, 0.35, 3) * level, 0, 95).astype(np.float32)


def any_background(rng: np.random.Generator, photographs: dict[str, np.ndarray]) -> tuple[np.ndarray, str]:
    """A flat tint, a gradient, noise or, four times in ten, a photograph."""
    kind = rng.choice(["flat", "gradient", "noise", "photograph"], p=[0.2, 0.2, 0.2, 0.4])
    if kind == "photograph":
        return photograph_background(rng, photographs)
    makers = {"flat": flat_background, "gradient": gradient_background, "noise": noise_background}
    return makers[str(kind)](rng), str(kind)


# -------------------------------------------------------------------------------------------------------------- composing


def compose(rng: np.random.Generator, glyphs: Glyphs, photographs: dict[str, np.ndarray]) -> Scene:
    """A scene of one to three digits, 16 to 26 pixels, on any background."""
    background, name = any_background(rng, photographs)
    count = int(rng.choice([1, 2, 3], p=[0.25, 0.4, 0.35]))
    return Scene(digits=place(rng, glyphs, count, (16, 26)), background=background, background_name=name)


def compose_for_caption(rng: np.random.Generator, glyphs: Glyphs) -> tuple[Scene, str, list[str]]:
    """A scene to be drawn from its caption: (scene, caption, where each digit stands).

    Three in four show one digit, the others two; the caption says how large they are and where they stand. The background is
    plain or a gradient; a plain one is named by three captions in four.
    """
    if rng.random() < 0.8:
        background, name = plain_background(rng)
        suffix = f" on {name}" if rng.random() < 0.75 else ""
    else:
        background, name, suffix = gradient_background(rng), "gradient", ""
    placed = place_by_name(rng, glyphs, 1 if rng.random() < 0.75 else 2)
    caption = " and ".join(f"a {size} {digit.name} {where}" for digit, size, where in placed)
    digits = tuple(sorted((d for d, _, _ in placed), key=lambda d: d.centre[0]))
    scene = Scene(digits=digits, background=background, background_name=name)
    return scene, caption + suffix, [where for _, _, where in placed]


def place_by_name(rng: np.random.Generator, glyphs: Glyphs, count: int) -> list[tuple[Digit, str, str]]:
    """`count` digits without overlap, each with its size and its place in words, in the order of a caption."""
    while True:
        placed: list[tuple[Digit, str, str]] = []
        for cell in rng.choice(len(PLACES), count, replace=False).tolist():
            size = str(rng.choice(list(SIZES)))
            digit = _random_digit(rng, glyphs, SIZES[size], at=(cell % 3, cell // 3))
            if all(_apart(digit, d, step=0) for d, _, _ in placed):
                placed.append((digit, size, PLACES[cell]))
        if len(placed) == count:
            return placed


def place(rng: np.random.Generator, glyphs: Glyphs, count: int, sizes: tuple[int, int]) -> tuple[Digit, ...]:
    """`count` digits without overlap, no two of the same colour and value, from left to right."""
    while True:
        digits: list[Digit] = []
        for _ in range(40):
            candidate = _random_digit(rng, glyphs, sizes)
            if all(_apart(candidate, d) for d in digits):
                digits.append(candidate)
            if len(digits) == count:
                return tuple(sorted(digits, key=lambda d: d.centre[0]))


def _random_digit(
    rng: np.random.Generator, glyphs: Glyphs, sizes: tuple[int, int], at: tuple[int, int] | None = None
) -> Digit:
    """Anywhere, or within `NEAR` pixels of column and row `at` of `PLACES`."""
    value = int(rng.integers(10))
    glyph = int(rng.choice(np.flatnonzero(glyphs.labels == value)))
    size = int(rng.integers(sizes[0], sizes[1] + 1))
    alpha = glyph_alpha(glyphs.images[glyph], size, Hand.any(rng) if glyphs.jitter else AS_WRITTEN)
    h, w = alpha.shape
    x, y = int(rng.integers(0, SIDE - w + 1)), int(rng.integers(0, SIDE - h + 1))
    if at is not None:
        x, y = (
            int(np.clip(SIDE / 4 * (1 + cell) - n / 2 + rng.integers(-NEAR, NEAR + 1), 0, SIDE - n))
            for cell, n in zip(at, (w, h), strict=True)
        )
    return Digit(
        value=value,
        colour=str(rng.choice(list(COLOURS))),
        box=(x, y, x + w, y + h),
        brightness=round(float(rng.uniform(*BRIGHTNESS)), 3),
        glyph=int(glyphs.index[glyph]),
        alpha=alpha,
    )


def _apart(a: Digit, b: Digit, step: float = MIN_STEP) -> bool:
    if (a.value, a.colour) == (b.value, b.colour) or abs(a.centre[0] - b.centre[0]) < step:
        return False
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a.box, b.box
    gap = max(bx0 - ax1, ax0 - bx1, by0 - ay1, ay0 - by1)
    return gap >= MARGIN


# ------------------------------------------------------------------------------------------------------- what can be said


def questions(rng: np.random.Generator, digits: Sequence[Digit]) -> list[Turn]:
    """Every question about a scene that has one right answer, in random order."""
    values, colours = Counter(d.value for d in digits), Counter(d.colour for d in digits)
    turns = [
        Turn(kind="count", question="How many digits are there?", answer=str(len(digits))),
        Turn(
            kind="digits", question="Which digits are there?", answer=" ".join(str(d.value) for d in digits)
        ),
        Turn(
            kind="colours",
            question="Which colours are there?",
            answer=" ".join(dict.fromkeys(d.colour for d in digits)),
        ),
    ]
    for d in digits:
        if values[d.value] == 1:
            turns.append(Turn(kind="colour_of", question=f"What colour is the {d.value}?", answer=d.colour))
        if colours[d.colour] == 1:
            turns.append(Turn(kind="digit_of", question=f"Which digit is {d.colour}?", answer=str(d.value)))
    return [turns[i] for i in rng.permutation(len(turns))]


def expressions(digit: Digit, digits: Sequence[Digit]) -> list[str]:
    """How a digit can be called without doubt; the first names its colour and its value."""
    names = [f"the {digit.name}"]
    if sum(d.value == digit.value for d in digits) == 1:
        names.append(f"the {digit.value}")
    if sum(d.colour == digit.colour for d in digits) == 1:
        names.append(f"the {digit.colour} digit")
    return names


def square_of(digit: Digit) -> str:
    """Where its middle is, as on a chessboard: columns a to h from the left, rows 1 to 8 from the top."""
    column, row = (int(middle * SQUARES / SIDE) for middle in digit.centre)
    return f"{'abcdefgh'[column]}{row + 1}"


def edit(rng: np.random.Generator, scene: Scene) -> Edit:
    """Recolour (three in five) or remove one digit."""
    at = int(rng.integers(len(scene.digits)))
    target, others = scene.digits[at], scene.digits[:at] + scene.digits[at + 1 :]
    facts = {"index": at, "digit": target.value, "from": target.colour, "box": list(target.box)}
    kind: Literal["recolour", "remove"] = "recolour" if rng.random() < 0.6 else "remove"
    if kind == "remove":
        return Edit(
            instruction=f"Remove the {target.name}.",
            square=square_of(target),
            report=f"the {target.name} is gone.",
            after=replace(scene, digits=others),
            facts={"kind": kind, **facts, "to": ""},
        )
    taken = {target.colour} | {d.colour for d in others if d.value == target.value}
    colour = str(rng.choice([c for c in COLOURS if c not in taken]))
    recoloured = replace(target, colour=colour)
    return Edit(
        instruction=f"Paint the {target.name} {colour}.",
        square=square_of(target),
        report=f"the {target.value} is {colour}.",
        after=replace(scene, digits=scene.digits[:at] + (recoloured,) + scene.digits[at + 1 :]),
        facts={"kind": kind, **facts, "to": colour},
    )


def text_turns(rng: np.random.Generator, count: int) -> list[Turn]:
    """Questions without a picture: sums, neighbours, comparisons, number words and mixed colours."""
    mixes = {("red", "yellow"): "orange", ("blue", "yellow"): "green", ("red", "blue"): "purple"}
    turns = []
    for kind in rng.choice(["sum", "after", "before", "larger", "word", "mix"], count):
        a, b = (int(n) for n in rng.choice(10, 2, replace=False))
        if kind == "sum":
            turns.append(Turn(kind="sum", question=f"What is {a} plus {b}?", answer=str(a + b)))
        elif kind == "after":
            turns.append(Turn(kind="after", question=f"What comes after {a}?", answer=str(a + 1)))
        elif kind == "before":
            turns.append(Turn(kind="before", question=f"What comes before {a + 1}?", answer=str(a)))
        elif kind == "larger":
            turns.append(Turn(kind="larger", question=f"Which is larger, {a} or {b}?", answer=str(max(a, b))))
        elif kind == "word":
            turns.append(Turn(kind="word", question=f"How is {a} written?", answer=NUMBER_WORDS[a]))
        else:
            (first, second), made = list(mixes.items())[int(rng.integers(len(mixes)))]
            turns.append(Turn(kind="mix", question=f"What do {first} and {second} make?", answer=made))
    return turns
