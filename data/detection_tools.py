"""Files of detection rows as a whole: reading them with their errors, splitting, choosing a pool of teachers, candidates.

`scripts/detection/` has the commands.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.detections import DetectionRow, Scene, read_detection, require_size
from data.sources.record import IMAGE_ERRORS, SkipSample, brief, parse_json

DENSITIES = ((3, "sparse"), (10, "medium"))
AREAS = ((0.05, "small"), (0.20, "medium"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of a file: the row, or what is wrong with it (`file:line …`)."""

    number: int
    data: Any = None
    row: DetectionRow | None = None
    error: str = ""


def read_lines(path: Path, image_root: Path | None = None) -> list[Line]:
    """Every line that is not blank.

    Args:
        path: JSONL, see data/detections.py.
        image_root: where pictures lie, to check that they can be opened and have the size the rows say; None: not looked at.

    Raises:
        ValueError: if there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    found = []
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        if not text.strip():
            continue
        data: Any = None
        try:
            data = parse_json(text)
            row = read_detection(data)
            for scene in (*row.teachers, row.student):
                _require_pictures(scene, image_root)
            found.append(Line(number=number, data=data, row=row))
        except (SkipSample, ValueError) as e:
            name = data.get("id") if isinstance(data, dict) else None
            where = f"{path}:{number}" + (f" id={name}" if isinstance(name, (str, int)) else "")
            what = e.message if isinstance(e, SkipSample) else f"not JSON ({e})"
            found.append(Line(number=number, data=data, error=f"{where}: {what}"))
    return found


def _require_pictures(scene: Scene, root: Path | None) -> None:
    if root is None:
        return
    for name in scene.pictures:
        try:
            with Image.open(root / name) as image:
                size = image.size
        except FileNotFoundError:
            raise SkipSample(
                "missing_image", f"images: {root / name} is missing; give --image_root"
            ) from None
        except IMAGE_ERRORS as e:
            raise SkipSample("bad_image", f"images: {root / name} cannot be read ({brief(e)})") from None
    require_size(scene, size)


def warnings(lines: Sequence[Line], pool: Sequence[Scene] = (), max_objects: int = 0) -> list[str]:
    """What is no error and yet hardly meant: the same box twice, pictures of the pool, more objects than a head has queries."""
    shown = {name for scene in pool for name in scene.pictures}
    told = []
    for line in lines:
        if line.row is None:
            continue
        student = line.row.student
        if len(set(student.things)) < len(student.things):
            told.append(f"line {line.number}: the same box with the same label is there twice")
        if leaked := sorted(shown.intersection(student.pictures)):
            told.append(f"line {line.number}: {leaked[0]} is in the pool of teachers too")
        if max_objects and len(student.things) > max_objects:
            told.append(f"line {line.number}: {len(student.things)} objects, --max_objects is {max_objects}")
    return told


def write_rows(path: Path, rows: Iterable[Any]) -> int:
    """JSONL; returns how many rows."""
    texts = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(texts), encoding="utf-8")
    return len(texts)


def split_rows(
    rows: Sequence[Any],
    val_ratio: float,
    seed: int,
    group: Callable[[Any], str] | None = None,
    labels: Callable[[Any], Iterable[str]] | None = None,
) -> tuple[list[Any], list[Any]]:
    """Rows for training and for validation, each in the file's order.

    Args:
        rows: to be divided.
        val_ratio: share of the rows for validation; at least one.
        seed: of the shuffle.
        group: rows of one group stay together (pictures of one place).
        labels: of a row; groups with the rarest labels are dealt out first, so that both sides have some.

    Raises:
        ValueError: if nothing is left to train on.
    """
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(group(row) if group else str(i), []).append(i)
    names = [list(groups)[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    wanted = max(1, int(len(rows) * val_ratio))
    chosen: set[int] = set()
    if labels:
        of = {n: {label for i in groups[n] for label in labels(rows[i])} for n in names}
        support = Counter(label for n in names for label in of[n])
        for label in sorted(support, key=lambda k: (support[k], k)):
            holders = [n for n in names if label in of[n]]
            have = any(chosen.issuperset(groups[n]) for n in holders)
            if not have and len(holders) > 1 and len(chosen) + len(groups[holders[0]]) <= wanted:
                chosen.update(groups[holders[0]])
    for name in names:
        if len(chosen) >= wanted:
            break
        if not chosen or len(chosen) + len(groups[name]) <= wanted:
            chosen.update(groups[name])
    train = [row for i, row in enumerate(rows) if i not in chosen]
    if not train:
        raise ValueError(
            f"{len(rows)} rows in {len(groups)} groups: all would be for validation; lower val_ratio"
        )
    return train, [row for i, row in enumerate(rows) if i in chosen]


# ---------------------------------------------------------------------------------------------------------------- a pool


@dataclass(frozen=True, slots=True)
class Traits:
    """What a scene would add to a pool."""

    labels: frozenset[str]
    density: str
    place: str
    area: str


def traits(scene: Scene) -> Traits:
    """Labels level by level (`a`, `a/b`), how crowded it is, where and how large things are on average.

    Raises:
        ValueError: if the row does not say its width and height.
    """
    if scene.size is None:
        raise ValueError(
            f"{scene.name}: the row has no width and height, which a pool is chosen by; convert it again"
        )
    width, height = scene.size
    levels = {
        "/".join(t.label.split("/")[: i + 1]) for t in scene.things for i in range(t.label.count("/") + 1)
    }
    boxes = np.array([t.box for t in scene.things], dtype=np.float64).reshape(-1, 4)
    if not len(boxes):
        return Traits(frozenset(), "empty", "none", "none")
    centre = ((boxes[:, :2] + boxes[:, 2:]) / 2 / (width, height)).mean(0).clip(0, 1 - 1e-9)
    area = float(((boxes[:, 2:] - boxes[:, :2]) / (width, height)).prod(1).mean())
    return Traits(
        labels=frozenset(levels),
        density=next((name for most, name in DENSITIES if len(boxes) <= most), "dense"),
        place=f"{int(centre[1] * 3)},{int(centre[0] * 3)}",
        area=next((name for most, name in AREAS if area < most), "large"),
    )


def choose_pool(scenes: Sequence[Scene], max_teachers: int, seed: int) -> tuple[list[int], dict[str, Any]]:
    """Scenes that between them show most: greedily 10 x new labels + 3 x a new density + 2 x a new place + a new size.

    What is left when nothing new is to be had is drawn at random. Ties go to the smaller id.

    Args:
        scenes: to choose from.
        max_teachers: how many.
        seed: of the random rest.

    Returns:
        their places, in the order chosen, and a report: what they cover.
    """
    known = [traits(s) for s in scenes]
    labels: set[str] = set()
    kinds: set[tuple[str, str]] = set()
    chosen: list[int] = []
    by_name = sorted(range(len(scenes)), key=lambda i: scenes[i].name)

    def gain(i: int) -> int:
        t = known[i]
        new = [("density", t.density), ("place", t.place), ("area", t.area)]
        return 10 * len(t.labels - labels) + sum(
            w for w, kind in zip((3, 2, 1), new, strict=True) if kind not in kinds
        )

    while len(chosen) < max_teachers:
        rest = [i for i in by_name if i not in chosen]
        best = max(rest, key=gain, default=None)
        if best is None or gain(best) == 0:
            break
        chosen.append(best)
        t = known[best]
        labels |= t.labels
        kinds |= {("density", t.density), ("place", t.place), ("area", t.area)}
    by_gain = len(chosen)
    rest = [i for i in by_name if i not in chosen]
    order = np.random.default_rng(seed).permutation(len(rest))[: max_teachers - len(chosen)]
    chosen += [rest[i] for i in order]
    report = {
        "teachers": len(chosen),
        "chosen_for_what_they_add": by_gain,
        "labels": dict(Counter(label for i in chosen for label in sorted(known[i].labels))),
        "labels_missing": sorted({label for t in known for label in t.labels} - labels),
        "density": dict(Counter(known[i].density for i in chosen)),
        "place": dict(Counter(known[i].place for i in chosen)),
        "area": dict(Counter(known[i].area for i in chosen)),
    }
    return chosen, report


def phrase_list(scenes: Iterable[Scene]) -> dict[str, Any]:
    """A candidates file: labels, the commonest first, and how often each is there."""
    counts = Counter(t.label for s in scenes for t in s.things)
    order = sorted(counts, key=lambda k: (-counts[k], k))
    return {"phrase_list": order, "counts": {k: counts[k] for k in order}}
