"""Paired augmentation: one draw per sample moves its pictures, boxes, masks and the coordinates in its texts together.

    my_group:
      augment: {flip: 0.5, crop: [0.6, 1.0], scale: [0.8, 1.25], rotate: true}

A dataset class whose samples can be moved says so (`TaskDataset.moves`). Groups under `val:` do not take it over.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data.box_text import BoxText
from data.motion import WHOLE, Motion
from data.sources.record import Record, SkipSample

TEXT_KEYS = frozenset(
    ("message", "conversations", "value", "expression", "expressions", "question", "answer", "cot_with_ans", "caption",
     "captions", "sentence", "text", "txt", "label", "labels", "desc", "description", "ref", "name", "instruction_list",
     "multiple_choice_answer")
)  # fmt: skip
"""Fields of rows that hold what is said; others (names of files above all) stay as they are."""

SIDES = re.compile(r"\b(left|right)(?=\b|most|ward|hand)|左|右", re.IGNORECASE)
DIRECTIONS = re.compile(
    r"\b(left|right|top|bottom|upper|lower|above|below|beneath|under|over|up|down|north|south|east|west|vertical|horizontal"
    r"|clockwise|anticlockwise|counterclockwise)(?=\b|most|ward|hand|ly|s\b)|[左右上下东西南北]",
    re.IGNORECASE,
)
OTHER_SIDE = {"left": "right", "right": "left", "左": "右", "右": "左"}

CROPPED = "cropped"
"""Reason of a sample that would lose an object; it is then made of the whole picture."""

LEAST_LEFT = 0.5
"""An object of which less than this share is left in the cut-out part is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Augment:
    """What may happen to the samples of a group.

    Attributes:
        flip: how often left and right change places.
        crop: shares of the picture's sides, from and to, that the cut-out part has; a part that loses an object is not used.
        scale: factors, from and to, of the picture's sides. The group's transform has the last word: between its smallest and
            largest side, a scaled picture keeps its size.
        rotate: turned by 0, 90, 180 or 270 degrees, each as often.
        flip_words: "left" and "right" change places with the picture. Else one whose texts name a side is not mirrored. A
            picture whose texts name any direction is never turned.
        text_boxes: `fraction` or `thousandths` (`BoxText`): boxes of that form in the row's texts move too, to within a pixel of
            the picture's (whole ones are cut out).
    """

    flip: float = 0.0
    crop: tuple[float, float] = (1.0, 1.0)
    scale: tuple[float, float] = (1.0, 1.0)
    rotate: bool = False
    flip_words: bool = False
    text_boxes: str = ""

    @staticmethod
    def of(options: Mapping[str, Any]) -> "Augment":
        """The YAML's block.

        Raises:
            ValueError: naming the key that is wrong.
        """
        known = {
            "flip": 0.0,
            "crop": None,
            "scale": None,
            "rotate": False,
            "flip_words": False,
            "text_boxes": "",
        }
        for key, value in options.items():
            if key not in known:
                raise ValueError(f"augment: unknown key {key!r}; known: {', '.join(known)}")
            if key in ("rotate", "flip_words") and not isinstance(value, bool):
                raise ValueError(f"augment.{key} must be true or false, not {value!r}")
        flip = options.get("flip", 0.0)
        if isinstance(flip, bool) or not isinstance(flip, (int, float)) or not 0 <= flip <= 1:
            raise ValueError(f"augment.flip is how often pictures are mirrored, from 0 to 1, not {flip!r}")
        text_boxes = options.get("text_boxes", "")
        if text_boxes not in ("", "fraction", "thousandths"):
            raise ValueError(f"augment.text_boxes must be fraction or thousandths, not {text_boxes!r}")
        return Augment(
            flip=float(flip),
            crop=_range(options, "crop", 0.05, 1.0),
            scale=_range(options, "scale", 0.05, 20.0),
            rotate=options.get("rotate", False),
            flip_words=options.get("flip_words", False),
            text_boxes=text_boxes,
        )

    def draw(self, data: Mapping[str, Any], rng: np.random.Generator) -> Motion:
        """What happens to a record's pictures; takes the same number of draws whatever the record says."""
        sides = rng.uniform(*self.crop, 2)
        corner = rng.random(2) * (1 - sides)
        scale = float(np.exp(rng.uniform(*np.log(self.scale))))
        quarters, mirrored = int(rng.integers(4)), bool(rng.random() < self.flip)
        texts = list(texts_in(data))
        if any(map(DIRECTIONS.search, texts)):
            quarters = 0
        if not self.flip_words and any(map(SIDES.search, texts)):
            mirrored = False
        x, y, width, height = (float(v) for v in (*corner, *sides))
        window = WHOLE if self.crop == (1.0, 1.0) else (x, y, x + width, y + height)
        return Motion(window=window, scale=scale, quarters=quarters if self.rotate else 0, mirrored=mirrored)

    def moved(self, record: Record, motion: Motion) -> Record:
        """The record whose pictures and texts are as after the motion."""
        changes: list[Callable[[str], str]] = []
        if motion.mirrored and self.flip_words:
            changes.append(lambda text: SIDES.sub(_other_side, text))
        if self.text_boxes:
            form = BoxText(self.text_boxes)
            changes.append(lambda text: form.replace(text, lambda box: _moved_box(box, motion)))
        data = record.data
        for change in changes:
            data = _changed(data, change)
        return replace(record, data=data, motion=motion)


def texts_in(value: Any, said: bool = False) -> Iterator[str]:
    """What a row says, wherever it stands."""
    if isinstance(value, str) and said:
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from texts_in(part, said=key in TEXT_KEYS or (said and not isinstance(part, str)))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from texts_in(part, said)


def _changed(value: Any, change: Callable[[str], str], said: bool = False) -> Any:
    """A copy of a row in which what is said is changed."""
    if isinstance(value, str):
        return change(value) if said else value
    if isinstance(value, dict):
        return {
            key: _changed(part, change, said=key in TEXT_KEYS or (said and not isinstance(part, str)))
            for key, part in value.items()
        }
    return [_changed(part, change, said) for part in value] if isinstance(value, (list, tuple)) else value


def _other_side(match: re.Match[str]) -> str:
    word = match.group()
    other = OTHER_SIDE[word.lower()]
    return (
        other.upper()
        if word.isupper() and len(word) > 1
        else other.capitalize()
        if word[:1].isupper()
        else other
    )


def _moved_box(box: Sequence[float], motion: Motion) -> Sequence[float]:
    # Not of pixels: a picture so large that a window's border can lie anywhere.
    moved, share = motion.place((1 << 20, 1 << 20)).box(box)
    return require_left(moved, share, f"box {list(box)} in a text")


def require_left(moved: Sequence[float], share: float, what: str) -> Sequence[float]:
    """A moved box.

    Raises:
        SkipSample: `CROPPED` if too little of it is left.
    """
    if share < LEAST_LEFT:
        raise SkipSample(CROPPED, f"{what}: {share:.0%} of it is left in the cut-out part")
    return moved


def _range(options: Mapping[str, Any], key: str, low: float, high: float) -> tuple[float, float]:
    value = options.get(key, [1.0, 1.0])
    numbers = isinstance(value, list) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) for v in value
    )
    if not numbers or len(value) != 2 or not low <= value[0] <= value[1] <= high:
        raise ValueError(f"augment.{key} must be [from, to] between {low:g} and {high:g}, not {value!r}")
    return float(value[0]), float(value[1])
