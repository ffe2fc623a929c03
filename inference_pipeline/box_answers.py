"""What a model wrote about boxes -> boxes and labels: strict JSON first, then ever looser, also where the answer was cut off."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "empty_list", "recovered_truncated", "recovered_loose", "failed"]

BOX_KEYS = ("bbox_2d", "bbox", "box", "position")
LABEL_KEYS = ("label", "desc", "description", "name", "category")
SCORE_KEYS = ("score", "confidence")

_FENCE = re.compile(r"```[a-zA-Z]*\s*(.*?)(?:```|\Z)", re.DOTALL)
_SPECIAL = re.compile(
    r"(?:<\|object_ref_start\|>|<ref>)(.*?)(?:<\|object_ref_end\|>|</ref>)"
    r"((?:\s*(?:<\|box_start\|>|<box>).*?(?:<\|box_end\|>|</box>))+)",
    re.DOTALL,
)
_PAIR = re.compile(r"\(\s*(-?\d+(?:\.\d+)?)\s*,\s*(-?\d+(?:\.\d+)?)\s*\)")
_FOUR = re.compile(r"[\[(]\s*" + r"\s*,\s*".join([r"(-?\d+(?:\.\d+)?)"] * 4) + r"\s*[\])]")
_NAMED = re.compile(r"[\"']?(?:label|desc|description|name|category)[\"']?\s*[:：]\s*[\"']([^\"']+)[\"']")
_TRAILING_COMMA = re.compile(r",\s*(?=[\]}])")
_BARE_KEY = re.compile(r"([{,]\s*)([A-Za-z_]\w*)(\s*:)")
_FULL_WIDTH = str.maketrans("，：［］｛｝“”", ',:[]{}""')


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One object: xyxy as it was written, and how sure the model says it is, if it does."""

    box: tuple[float, float, float, float]
    label: str
    score: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """An answer's objects.

    Attributes:
        objects: in the order written.
        status: how they were read; `[]` is an answer.
        dropped: what was left out or mended, and why.
    """

    objects: tuple[Found, ...] = ()
    status: Status = "failed"
    dropped: tuple[str, ...] = field(default=())


def parse_boxes(
    text: str, size: tuple[float, float], *, yxyx: bool = False, tolerance: float = 0.02
) -> Parsed:
    """The objects of an answer.

    Args:
        text: as the model wrote it.
        size: width and height of the coordinates' space: what is outside is cut (1000, 1000 for thousandths).
        yxyx: `box_2d` counts too, as [y1, x1, y2, x2].
        tolerance: a box may stand so far over an edge, in parts of the side, before that is told.
    """
    entries, status = _entries(text)
    if status in ("failed", "empty_list"):
        return Parsed(status=status)
    objects: list[Found] = []
    dropped: list[str] = []
    repeats = 0
    for number, entry in enumerate(entries):
        for found in _objects(entry, f"object {number}", size, yxyx, tolerance, dropped):
            if any(found.box == o.box and found.label == o.label for o in objects):
                repeats += 1
                continue
            objects.append(found)
    if repeats:
        dropped.append(f"{repeats} exact repeats" + (": the model runs in circles" if repeats > 2 else ""))
    return Parsed(objects=tuple(objects), status=status, dropped=tuple(dropped))


def _entries(text: str) -> tuple[list[Any], Status]:
    """Whatever objects the text holds, and how it had to be read."""
    body = text.strip()
    if fence := _FENCE.search(body):
        body = fence[1].strip()
    if body.startswith(("<|object_ref", "<ref>")) or _SPECIAL.search(body):
        return _special(body)
    start = min((i for i in (body.find("["), body.find("{")) if i >= 0), default=-1)
    if start >= 0:
        body = body[start:]
        forms, cut = (body, _normalised(body)), False
        for attempt in forms:
            try:
                value, _ = json.JSONDecoder().raw_decode(attempt)
            except json.JSONDecodeError as e:
                cut |= e.pos >= len(attempt.rstrip()) or e.msg.startswith("Unterminated")
                continue
            except RecursionError:
                continue
            entries = _as_list(value)
            if entries is not None:
                return entries, "ok" if entries else "empty_list"
        for attempt in forms:
            if complete := list(_complete_objects(attempt)):
                return complete, "recovered_truncated"
        if cut:
            return [], "failed"  # nothing is whole: what numbers there are may be half of what they should be
    loose = [
        {"bbox_2d": [float(v) for v in m.groups()], "label": _label_near(body, m.start(), m.end())}
        for m in _FOUR.finditer(body)
    ]
    return (loose, "recovered_loose") if loose else ([], "failed")


def _as_list(value: Any) -> list[Any] | None:
    """A list of objects; one object; or an object around a list of them."""
    if isinstance(value, list):
        return value if all(isinstance(v, dict) for v in value) else None
    if not isinstance(value, dict):
        return None
    lists = [v for k, v in value.items() if isinstance(v, list) and k not in (*BOX_KEYS, "box_2d")]
    if (
        len(lists) == 1
        and not any(k in value for k in BOX_KEYS)
        and all(isinstance(v, dict) for v in lists[0])
    ):
        return lists[0]
    return [value]


def _normalised(text: str) -> str:
    text = text.translate(_FULL_WIDTH)
    text = _BARE_KEY.sub(r'\1"\2"\3', _TRAILING_COMMA.sub("", text))
    return re.sub(r"'([^'\"]*)'", r'"\1"', text)


def _complete_objects(text: str) -> Iterator[Mapping[str, Any]]:
    """Every object that is whole and has a box, from the left; what was cut is left out."""
    return (value for value, _ in _placed_objects(text))


def object_spans(text: str) -> list[tuple[int, int]]:
    """Where in a text its whole JSON objects with a box stand, from and to."""
    return [span for _, span in _placed_objects(text)]


def _placed_objects(text: str) -> Iterator[tuple[Mapping[str, Any], tuple[int, int]]]:
    decoder, at = json.JSONDecoder(), 0
    while (start := text.find("{", at)) >= 0:
        try:
            value, at = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            at = start + 1
            continue
        if isinstance(value, dict) and any(k in value for k in (*BOX_KEYS, "box_2d")):
            yield value, (start, at)


def _special(text: str) -> tuple[list[Any], Status]:
    """`<|object_ref_start|>nut<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>`, several boxes per name."""
    entries = []
    for name, boxes in _SPECIAL.findall(text):
        numbers = [float(v) for pair in _PAIR.findall(boxes) for v in pair]
        for i in range(0, len(numbers) - 3, 4):
            entries.append({"bbox_2d": numbers[i : i + 4], "label": name.strip()})
    whole = text.rstrip().endswith(("<|box_end|>", "</box>"))
    return entries, ("ok" if whole else "recovered_truncated") if entries else "failed"


def _label_near(text: str, start: int, end: int) -> str:
    """The label written next to four numbers: after them, before the next ones; else before them."""
    following = _FOUR.search(text, end)
    after = _NAMED.search(text, end, following.start() if following else len(text))
    if after:
        return after[1]
    before = list(_NAMED.finditer(text, 0, start))
    return before[-1][1] if before else ""


def _objects(
    entry: Any,
    what: str,
    size: tuple[float, float],
    yxyx: bool,
    tolerance: float,
    dropped: list[str],
) -> Iterator[Found]:
    keys = (*BOX_KEYS, "box_2d") if yxyx else BOX_KEYS
    key = next((k for k in keys if k in entry), None)
    if key is None:
        dropped.append(f"{what}: no box")
        return
    value = entry[key]
    boxes = (
        value if isinstance(value, list) and value and all(isinstance(v, list) for v in value) else [value]
    )
    label = next((entry[k] for k in LABEL_KEYS if k in entry), "")
    score = next((entry[k] for k in SCORE_KEYS if k in entry), None)
    for box in boxes:
        mended = _inside(box, what, size, key == "box_2d", tolerance, dropped)
        if mended is not None:
            sure = score if isinstance(score, (int, float)) and math.isfinite(score) else None
            yield Found(box=mended, label=str(label).strip(), score=sure)


def _inside(
    box: Any, what: str, size: tuple[float, float], turned: bool, tolerance: float, dropped: list[str]
) -> tuple[float, float, float, float] | None:
    numbers: Sequence[Any] = box if isinstance(box, list) else []
    if len(numbers) != 4 or any(type(v) not in (int, float) or not math.isfinite(v) for v in numbers):
        dropped.append(f"{what}: {box!r:.40} is not four finite numbers")
        return None
    x1, y1, x2, y2 = (numbers[i] for i in ((1, 0, 3, 2) if turned else (0, 1, 2, 3)))
    if x1 > x2 or y1 > y2:
        dropped.append(f"{what}: corners changed places")
        x1, x2, y1, y2 = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
    width, height = size
    over = max(-x1 / width, -y1 / height, x2 / width - 1, y2 / height - 1)
    if over > tolerance:
        dropped.append(f"{what}: stands {over:.0%} over the edge, and is cut")
    x1, x2 = (min(max(float(v), 0.0), width) for v in (x1, x2))
    y1, y2 = (min(max(float(v), 0.0), height) for v in (y1, y2))
    if x1 >= x2 or y1 >= y2:
        dropped.append(f"{what}: has no area inside the picture")
        return None
    return x1, y1, x2, y2
