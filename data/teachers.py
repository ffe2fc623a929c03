"""Teachers: scenes with their answers that are shown before the one to be answered, and which of a pool are chosen."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from data.detections import Scene, read_scene
from data.sources.record import SkipSample, parse_json

STRATEGIES = (
    "random", "round_robin", "label_overlap", "label_coverage", "similar_image", "fixed", "hard",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherPool:
    """Scenes to choose from.

    Attributes:
        scenes: in the file's order.
        strategy: one of STRATEGIES.
        features: picture -> a vector, for `similar_image`.
        difficulty: picture or id -> a number, for `hard`.
    """

    scenes: tuple[Scene, ...]
    strategy: str = "random"
    features: Mapping[str, np.ndarray] = field(default_factory=dict)
    difficulty: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def open(path: str, strategy: str, features: str = "", difficulty: str = "") -> "TeacherPool":
        """Read a pool.

        Args:
            path: JSONL of samples (data/detections.py).
            strategy: one of STRATEGIES.
            features: of `similar_image`: safetensors, a vector under each picture's name.
            difficulty: of `hard`: JSON object, a number under each picture's name or id.

        Raises:
            ValueError: if a file is missing, says nothing, or has a sample that cannot be read (naming file and line).
        """
        if strategy not in STRATEGIES:
            raise ValueError(f"teacher_sampling must be one of {', '.join(STRATEGIES)}, not {strategy!r}")
        if strategy == "similar_image" and not features:
            raise ValueError("teacher_sampling similar_image needs teacher_features: a vector per picture")
        if strategy == "hard" and not difficulty:
            raise ValueError("teacher_sampling hard needs teacher_difficulty: a number per picture")
        return TeacherPool(
            scenes=read_pool(path),
            strategy=strategy,
            features=load_file(_file(features, "teacher_features")) if features else {},
            difficulty=_numbers(difficulty) if difficulty else {},
        )

    def choose(self, student: Scene, count: int, rng: np.random.Generator, where: str = "") -> list[Scene]:
        """Some of the pool, never one with the student's own picture.

        Args:
            student: what is to be answered; one without objects (inference) is matched by its picture alone.
            count: how many at most.
            rng: of this sample alone.
            where: the student's file and line, for `round_robin`.
        """
        own = set(student.pictures)
        able = [i for i, scene in enumerate(self.scenes) if own.isdisjoint(scene.pictures)]
        shuffled = [able[i] for i in rng.permutation(len(able))]
        return [self.scenes[i] for i in _ORDERS[self.strategy](self, student, able, shuffled, where)[:count]]


def read_pool(path: str) -> tuple[Scene, ...]:
    """The scenes of a pool file, see `TeacherPool.open`."""
    scenes = []
    for number, line in enumerate(Path(_file(path, "teacher_pool")).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            scenes.append(read_scene(parse_json(line), ""))
        except SkipSample as e:
            raise ValueError(f"{path}:{number}: {e.message}") from e
        except ValueError as e:
            raise ValueError(f"{path}:{number}: not JSON ({e})") from e
    if not scenes:
        raise ValueError(
            f"{path}: the pool of teachers is empty; make one with scripts/detection/make_pool.py"
        )
    return tuple(scenes)


def _file(path: str, key: str) -> str:
    if not Path(path).is_file():
        raise ValueError(f"{key}: {path}: there is no such file")
    return path


def _numbers(path: str) -> dict[str, float]:
    content = json.loads(Path(_file(path, "teacher_difficulty")).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not all(isinstance(v, (int, float)) for v in content.values()):
        raise ValueError(f"teacher_difficulty: {path}: must be a JSON object of numbers by picture or id")
    return content


# ------------------------------------------------------------------------------ (pool, student, able, shuffled, where) -> order


def _random(pool: TeacherPool, student: Scene, able: list[int], shuffled: list[int], where: str) -> list[int]:
    return shuffled


def _round_robin(
    pool: TeacherPool, student: Scene, able: list[int], shuffled: list[int], where: str
) -> list[int]:
    # The student's line: neighbours have neighbours. One without a line starts at a place of its own, always the same.
    line = re.search(r"(\d+)$", where)
    turn = (
        int(line[1])
        if line
        else int.from_bytes(hashlib.blake2b(student.name.encode(), digest_size=4).digest())
    )
    start = turn % max(1, len(able))
    return able[start:] + able[:start]


def _label_overlap(
    pool: TeacherPool, student: Scene, able: list[int], shuffled: list[int], where: str
) -> list[int]:
    def overlap(i: int) -> float:
        both = pool.scenes[i].labels | student.labels
        return len(pool.scenes[i].labels & student.labels) / len(both) if both else 0.0

    return sorted(shuffled, key=lambda i: -overlap(i)) if student.labels else shuffled


def _label_coverage(
    pool: TeacherPool, student: Scene, able: list[int], shuffled: list[int], where: str
) -> list[int]:
    wanted = set(student.labels)
    if not wanted:
        return shuffled
    order, rest = [], list(shuffled)
    while rest:
        best = max(rest, key=lambda i: len(wanted & pool.scenes[i].labels))
        order.append(best)
        rest.remove(best)
        wanted -= pool.scenes[best].labels
    return order


def _similar_image(
    pool: TeacherPool, student: Scene, able: list[int], shuffled: list[int], where: str
) -> list[int]:
    own = _vector(pool, student)
    return sorted(shuffled, key=lambda i: -float(own @ _vector(pool, pool.scenes[i])))


def _vector(pool: TeacherPool, scene: Scene) -> np.ndarray:
    vector = pool.features.get(scene.pictures[-1])
    if vector is None:
        raise SkipSample(
            "no_features", f"teacher_features has no vector of {scene.pictures[-1]!r}; make the file again"
        )
    wide = vector.astype(np.float64)
    return wide / max(float(np.linalg.norm(wide)), 1e-12)


def _fixed(pool: TeacherPool, student: Scene, able: list[int], shuffled: list[int], where: str) -> list[int]:
    return able


def _hard(pool: TeacherPool, student: Scene, able: list[int], shuffled: list[int], where: str) -> list[int]:
    def difficulty(i: int) -> float:
        scene = pool.scenes[i]
        return pool.difficulty.get(scene.pictures[-1], pool.difficulty.get(scene.name, 0.0))

    return sorted(shuffled, key=lambda i: -difficulty(i))


_ORDERS: dict[str, Callable[[TeacherPool, Scene, list[int], list[int], str], list[int]]] = {
    "random": _random,
    "round_robin": _round_robin,
    "label_overlap": _label_overlap,
    "label_coverage": _label_coverage,
    "similar_image": _similar_image,
    "fixed": _fixed,
    "hard": _hard,
}
