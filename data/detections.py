"""Rows of detection: pictures with named boxes. What such a row may look like, what is wrong with one, how an answer is written.

A sample `S` is `{"images": [path], "objects": [{"bbox_2d": [x1, y1, x2, y2], "label": text}]}`, boxes in pixels of the picture as
it lies in its file; a row is `S`, or `{"teachers": [S, …], "student": S}`, or the older `{"examples": [S, …], "target": S}`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.sources.record import SkipSample

BOX_KEYS = ("bbox_2d", "bbox")
LABEL_KEYS = ("label", "desc", "description")
SHAPES = "{teachers, student}, {examples, target} or {images, objects}"

Corners = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """A named box: xyxy in pixels of its picture."""

    box: Corners
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A picture and everything in it.

    Attributes:
        pictures: files; the last one is looked through, those before are shown.
        things: may be none.
        size: width and height, if the row says them.
        name: the row's own id, or the last picture.
    """

    pictures: tuple[str, ...]
    things: tuple[Thing, ...]
    size: tuple[int, int] | None = None
    name: str = ""

    @property
    def labels(self) -> frozenset[str]:
        """What is in it."""
        return frozenset(t.label for t in self.things)


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionRow:
    """A scene to be answered, and scenes that are shown with their answers before it."""

    student: Scene
    teachers: tuple[Scene, ...] = ()


def read_detection(row: Any) -> DetectionRow:
    """A row in any of its shapes.

    Raises:
        SkipSample: saying where in the row, what is wrong and what must be.
    """
    if not isinstance(row, dict):
        raise SkipSample("bad_row", f"the row is {row!r:.60}, not an object; it must be {SHAPES}")
    for several, one in (("teachers", "student"), ("examples", "target")):
        if several in row or one in row:
            teachers = row.get(several, [])
            if not isinstance(teachers, list):
                raise SkipSample("bad_row", f"{several}: is {teachers!r:.60}; it must be a list of samples")
            return DetectionRow(
                student=read_scene(row.get(one), f"{one}."),
                teachers=tuple(read_scene(t, f"{several}[{i}].") for i, t in enumerate(teachers)),
            )
    if "images" in row or "objects" in row:
        return DetectionRow(student=read_scene(row, ""))
    raise SkipSample("bad_row", f"the row has the keys {', '.join(map(str, row))!s:.80}; it must be {SHAPES}")


def read_scene(scene: Any, at: str) -> Scene:
    """One sample; `at` is its place in the row, with a point behind.

    Raises:
        SkipSample: as `read_detection`.
    """
    if not isinstance(scene, dict):
        raise SkipSample("bad_row", f"{at.rstrip('.')}: is {scene!r:.60}; it must be {{images, objects}}")
    files = scene.get("images")
    if not isinstance(files, list) or not files or not all(isinstance(f, str) and f for f in files):
        raise SkipSample("bad_image_list", f"{at}images: is {files!r:.60}; it must be a list of paths")
    objects = scene.get("objects")
    if not isinstance(objects, list):
        raise SkipSample(
            "bad_objects", f"{at}objects: is {objects!r:.60}; it must be a list ([] for nothing)"
        )
    size = _size(scene, at)
    things = tuple(_thing(o, f"{at}objects[{i}]", size) for i, o in enumerate(objects))
    name = scene.get("id")
    return Scene(
        pictures=tuple(map(require_text, files)),
        things=things,
        size=size,
        name=str(name) if isinstance(name, (str, int)) else files[-1],
    )


def _size(scene: Mapping[str, Any], at: str) -> tuple[int, int] | None:
    if scene.get("width") is None and scene.get("height") is None:
        return None
    for key in ("width", "height"):
        if type(scene.get(key)) is not int or not 0 < scene[key] < 10**6:
            raise SkipSample(
                "bad_size", f"{at}{key}: is {scene.get(key)!r:.60}; it must be a number of pixels"
            )
    return scene["width"], scene["height"]


def _thing(entry: Any, at: str, size: tuple[int, int] | None) -> Thing:
    if not isinstance(entry, dict):
        raise SkipSample("bad_objects", f"{at}: is {entry!r:.60}; it must be {{bbox_2d, label}}")
    key = next((k for k in BOX_KEYS if k in entry), None)
    if key is None:
        raise SkipSample("bad_box", f"{at}: has no bbox_2d; it must be [x1, y1, x2, y2]")
    box = require_box(entry[key], f"{at}.{key}", size)
    key = next((k for k in LABEL_KEYS if k in entry), None)
    label = entry.get(key) if key else None
    if not isinstance(label, str) or not label.strip():
        raise SkipSample("no_label", f"{at}.{key or 'label'}: is {label!r:.60}; it must be a text")
    return Thing(box=box, label=require_text(label).strip())


def require_text(text: str) -> str:
    """A text, unless it cannot be one.

    Raises:
        SkipSample: `bad_text`.
    """
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON may hold half of a pair of code units
        raise SkipSample("bad_text", f"{text!r:.60} has a character that is none; correct the row") from None
    return text


def require_box(value: Any, at: str, size: tuple[int, int] | None) -> Corners:
    """A box in pixels.

    Args:
        value: as it stands in the file.
        at: where, for the message.
        size: width and height of the picture, if known.

    Raises:
        SkipSample: `bad_box`.
    """
    numbers = value if isinstance(value, (list, tuple)) else ()
    if len(numbers) != 4 or any(type(v) not in (int, float) for v in numbers):
        raise SkipSample("bad_box", f"{at}: is {value!r:.60}; it must be four numbers [x1, y1, x2, y2]")
    try:
        x1, y1, x2, y2 = map(float, numbers)
    except OverflowError:
        x1 = y1 = x2 = y2 = math.inf
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        raise SkipSample("bad_box", f"{at}: is {value!r:.60}; the numbers must be finite")
    for low, high, a, b in (("x1", "x2", x1, x2), ("y1", "y2", y1, y2)):
        if a >= b:
            raise SkipSample("bad_box", f"{at}: {high} ({b:g}) must be greater than {low} ({a:g})")
        if a < 0:
            raise SkipSample("bad_box", f"{at}: {low} ({a:g}) must not be negative")
    for name, edge, side in (("x2", x2, 0), ("y2", y2, 1)):
        if size is not None and edge > size[side]:
            raise SkipSample(
                "bad_box", f"{at}: {name} ({edge:g}) lies outside the picture of {size[0]}x{size[1]} px"
            )
    return x1, y1, x2, y2


def require_size(scene: Scene, size: tuple[int, int]) -> None:
    """A picture's own width and height against what the row says, and against its boxes.

    Raises:
        SkipSample: `bad_size` or `bad_box`.
    """
    if scene.size is not None and scene.size != size:
        raise SkipSample(
            "bad_size",
            f"{scene.pictures[-1]}: the row says {scene.size[0]}x{scene.size[1]} px, the picture has {size[0]}x{size[1]} px "
            "(as stored: turn it by its EXIF orientation first); make the row again",
        )
    for i, thing in enumerate(scene.things):
        require_box(list(thing.box), f"{scene.name}: objects[{i}].bbox_2d", size)


# ------------------------------------------------------------------------------------------------------------- answers

COORDINATES = ("pixels", "thousandths", "fraction")


def written_box(box: Sequence[float], size: tuple[int, int], coordinates: str) -> list[float]:
    """A box as the answer has it.

    Args:
        box: xyxy in [0, 1].
        size: width and height of the picture that the model sees.
        coordinates: `pixels` of that picture, `thousandths` of its sides, or a `fraction` with three digits.
    """
    sides = (*size, *size)
    if coordinates == "fraction":
        return [round(v, 3) for v in box]
    scale = sides if coordinates == "pixels" else (1000,) * 4
    return [min(max(round(v * s), 0), s) for v, s in zip(box, scale, strict=True)]


def reading_order(boxes: Sequence[Sequence[float]], labels: Sequence[str]) -> list[int]:
    """Places of the objects from top to bottom, then from left to right."""
    return sorted(
        range(len(boxes)), key=lambda i: (boxes[i][1], boxes[i][0], boxes[i][3], boxes[i][2], labels[i])
    )


def answer_text(boxes: Sequence[Sequence[float]], labels: Sequence[str]) -> str:
    """`[{"bbox_2d":[x1,y1,x2,y2],"label":"..."}]`, without spaces; `[]` for nothing."""
    rows = [{"bbox_2d": list(b), "label": name} for b, name in zip(boxes, labels, strict=True)]
    return json.dumps(rows, ensure_ascii=False, separators=(",", ":"))


PROMPTS = {
    "english": "Find every object in the picture. Answer with a JSON list of bbox_2d and label, from top to bottom.",
    "chinese": "找出图中的所有物体，用JSON列表回答，每项包含bbox_2d和label，按自上而下的顺序排列。",
}
CANDIDATES = {"english": "Labels: {}", "chinese": "可用标签：{}"}
SEPARATORS = {"english": ", ", "chinese": "、"}


def instruction(language: str, prompt: str = "", candidates: Sequence[str] = ()) -> str:
    """What is asked before each picture.

    Args:
        language: `english` or `chinese`.
        prompt: in place of the usual words.
        candidates: labels to choose from.
    """
    words = prompt or PROMPTS[language]
    if not candidates:
        return words
    return words + "\n" + CANDIDATES[language].format(SEPARATORS[language].join(candidates))
