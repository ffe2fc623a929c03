"""Annotation tools' JSON -> detection rows: `X.json` beside `X.jpeg`, `X.jpg` or `X.png`.

Two forms: `dataList[]`, each two points and `properties`; and `markResult.features[]`, each a polygon and `properties`. Texts are
read in Chinese (`contentZh`, whose entry with the label is "type/property/…") or in English (`label`, `question`,
`question_ex`, through a table of tokens). A label is `object_type/property/extra_info`, of these the levels asked for, in
that order.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from data.detections import reading_order
from data.sources.record import IMAGE_ERRORS, brief

LEVELS = ("object_type", "property", "extra_info")
SUFFIXES = (".jpeg", ".jpg", ".png")
LABEL_WORD = "标签"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """How files are read.

    Attributes:
        language: `chinese` or `english`.
        levels: of LEVELS, those that make the label.
        tokens: of English: what stands in the files -> what is to stand in the label.
        hierarchy: object type -> its properties; other types and properties are left out. None: all stay.
        resize: (factor, least pixels, most pixels) of `smart_size`; None: pictures stay as they are.
        min_box_size: a box with a shorter side after the resize is left out.
    """

    language: str = "chinese"
    levels: Sequence[str] = LEVELS
    tokens: Mapping[str, str] = field(default_factory=dict)
    hierarchy: Mapping[str, frozenset[str]] | None = None
    resize: tuple[int, int, int] | None = None
    min_box_size: int = 1

    def __post_init__(self) -> None:
        if self.language not in ("chinese", "english"):
            raise ValueError(f"language must be chinese or english, not {self.language!r}")
        if unknown := [level for level in self.levels if level not in LEVELS]:
            raise ValueError(f"response_types: {unknown[0]!r} is none of {', '.join(LEVELS)}")
        if not self.levels:
            raise ValueError(f"response_types is empty; give some of {', '.join(LEVELS)}")


@dataclass(slots=True)
class Report:
    """What became of everything."""

    files: int = 0
    objects: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    missing_tokens: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "files": self.files,
            "objects": self.objects,
            "labels": dict(self.labels.most_common()),
            "dropped": dict(self.dropped.most_common()),
            "sizes": dict(self.sizes.most_common()),
            "missing_tokens": sorted(self.missing_tokens),
            "errors": self.errors,
        }


def smart_size(width: int, height: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Sides that are multiples of `factor` and whose area is from `least` to `most`, near the picture's own.

    Raises:
        ValueError: if one side is more than 200 times the other.

    Source: the resize rule of Qwen2.5-VL's processor (transformers 5.17); a size it gives, it leaves alone.
    """
    if max(width, height) > 200 * min(width, height):
        raise ValueError(f"a picture of {width}x{height} px is more than 200 times as long as it is wide")
    w, h = (round(side / factor) * factor for side in (width, height))
    if w * h > most:
        scale = math.sqrt(width * height / most)
        w, h = (max(factor, math.floor(side / scale / factor) * factor) for side in (width, height))
    elif w * h < least:
        scale = math.sqrt(least / (width * height))
        w, h = (math.ceil(side * scale / factor) * factor for side in (width, height))
    return w, h


def convert(
    folder: Path, images: Path, how: Conversion, report: Report, names: Sequence[Path] | None = None
) -> Iterator[dict[str, Any]]:
    """A row per annotation file; pictures are written, upright, under `images` by the same relative names.

    Args:
        folder: looked through with all that is in it.
        images: where pictures go.
        how: what is read.
        report: filled while the rows are taken.
        names: annotation files, if not all.
    """
    for path in names if names is not None else sorted(folder.rglob("*.json")):
        where = str(path.relative_to(folder))
        try:
            yield _convert_one(path, folder, images, how, report)
            report.files += 1
        except (ValueError, KeyError, TypeError, *IMAGE_ERRORS) as e:
            report.errors.append(f"{where}: {brief(e)}")


def _convert_one(path: Path, folder: Path, images: Path, how: Conversion, report: Report) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    picture = next((p for s in SUFFIXES if (p := path.with_suffix(s)).is_file()), None)
    if picture is None:
        raise ValueError(f"no picture beside it ({', '.join(path.stem + s for s in SUFFIXES)})")
    info = content.get("info") if isinstance(content, dict) else None
    if not isinstance(info, dict) or not all(type(info.get(k)) is int for k in ("width", "height")):
        raise ValueError("info.width and info.height are needed: the size that the boxes count in")
    with Image.open(picture) as opened:
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    if upright.size != (info["width"], info["height"]):
        raise ValueError(
            f"info says {info['width']}x{info['height']} px, {picture.name} has {upright.size[0]}x{upright.size[1]} px upright"
        )
    width, height = smart_size(*upright.size, *how.resize) if how.resize else upright.size
    name = picture.relative_to(folder)
    (images / name).parent.mkdir(parents=True, exist_ok=True)
    shown = upright.resize((width, height), Image.Resampling.BICUBIC) if how.resize else upright
    # PNG and JPEG alike: written from pixels, so no orientation is left that could be applied twice.
    shown.save(images / name, quality=95)  # PNG has no use for it
    boxes, labels = [], []
    for points, properties in _annotations(content):
        label = _label(properties, how, report)
        if label is None:
            continue
        scale = (width / upright.width, height / upright.height)
        xs = [min(max(round(float(p[0]) * scale[0]), 0), width) for p in points]
        ys = [min(max(round(float(p[1]) * scale[1]), 0), height) for p in points]
        box = [min(xs), min(ys), max(xs), max(ys)]
        if min(box[2] - box[0], box[3] - box[1]) < how.min_box_size:
            report.dropped["box too small after the resize"] += 1
            continue
        boxes.append(box)
        labels.append(label)
        report.labels[label] += 1
        report.objects += 1
    report.sizes[f"{width}x{height}"] += 1
    order = reading_order(boxes, labels)
    return {
        "id": str(name.with_suffix("")),
        "images": [str(name)],
        "objects": [{"bbox_2d": boxes[i], "label": labels[i]} for i in order],
        "width": width,
        "height": height,
        "orig_width": upright.width,
        "orig_height": upright.height,
    }


def _annotations(content: Mapping[str, Any]) -> Iterator[tuple[Sequence[Any], Mapping[str, Any]]]:
    """(points, properties) of each thing."""
    if isinstance(content.get("dataList"), list):
        for number, entry in enumerate(content["dataList"]):
            points = entry.get("coordinates") or entry.get("points")
            yield _points(points, f"dataList[{number}]"), entry.get("properties") or {}
        return
    features = (content.get("markResult") or {}).get("features")
    if not isinstance(features, list):
        raise ValueError("neither dataList nor markResult.features is a list")
    for number, entry in enumerate(features):
        geometry = entry.get("geometry") or {}
        yield (
            _points(geometry.get("coordinates"), f"markResult.features[{number}]"),
            entry.get("properties") or {},
        )


def _points(value: Any, what: str) -> list[Sequence[float]]:
    """All pairs of numbers in lists within lists."""
    if (
        isinstance(value, list)
        and len(value) >= 2
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
    ):
        return [value]
    inner = value if isinstance(value, list) else []
    points = [p for part in inner for p in _points(part, what)] if inner else []
    if len(points) < 1 or not inner:
        raise ValueError(f"{what}: {value!r:.60} are no points [x, y]")
    return points


def _label(properties: Mapping[str, Any], how: Conversion, report: Report) -> str | None:
    levels = _chinese(properties) if how.language == "chinese" else _english(properties, how, report)
    kind, attribute, extra = levels
    if not kind:
        report.dropped["no object type"] += 1
        return None
    if how.hierarchy is not None:
        if kind not in how.hierarchy:
            report.dropped[f"unknown object type {kind}"] += 1
            return None
        allowed = how.hierarchy[kind]
        if attribute not in (allowed or {""}):
            report.dropped[f"property {attribute or '(none)'} is not one of {kind}"] += 1
            return None
    # In this order, whatever order they were asked for in.
    parts = [
        value for name, value in zip(LEVELS, (kind, attribute, extra), strict=True) if name in how.levels
    ]
    return "/".join(part for part in parts if part) or None


def _chinese(properties: Mapping[str, Any]) -> tuple[str, str, str]:
    content = properties.get("contentZh") or {}
    if not isinstance(content, dict):
        raise ValueError(f"properties.contentZh: {content!r:.60} is not an object")
    texts = {key: "、".join(map(str, v)) if isinstance(v, list) else str(v) for key, v in content.items()}
    named = next((value for key, value in texts.items() if LABEL_WORD in key), "")
    rest = [value.strip() for key, value in texts.items() if LABEL_WORD not in key and value.strip()]
    kind, _, more = named.partition("/")
    attribute, _, extra = more.partition("/")
    return kind.strip(), attribute.strip(), "/".join([*([extra.strip()] if extra.strip() else []), *rest])


def _english(properties: Mapping[str, Any], how: Conversion, report: Report) -> tuple[str, str, str]:
    content = properties.get("content") if isinstance(properties.get("content"), dict) else properties
    assert isinstance(content, Mapping)
    found = []
    for key in ("label", "question", "question_ex"):
        value = content.get(key) or ""
        words = [str(v).strip() for v in (value if isinstance(value, list) else [value]) if str(v).strip()]
        if how.tokens:
            report.missing_tokens.update(w for w in words if w not in how.tokens)
        found.append(", ".join(how.tokens.get(w, w) for w in words))
    return found[0], found[1], found[2]


def read_hierarchy(path: Path) -> dict[str, frozenset[str]]:
    """Object type -> properties, of a list of `{"object_type", "property": [...]}` or an object.

    Raises:
        ValueError: if it is neither.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    pairs = (
        content.items()
        if isinstance(content, dict)
        else [(e.get("object_type"), e.get("property")) for e in content if isinstance(e, dict)]
    )
    found = {str(kind): frozenset(map(str, values or ())) for kind, values in pairs}
    if not found or "None" in found:
        raise ValueError(f'{path}: must be [{{"object_type": text, "property": [text, …]}}, …] or an object')
    return found
