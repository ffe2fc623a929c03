"""Detection: a picture, and a JSON list of everything in it; demonstrations ("teachers") before it, where a pool has some."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from data.conversation import image_segment, text_segments
from data.dataset_base import Record, SkipSample, TaskDataset
from data.detections import (
    COORDINATES,
    PROMPTS,
    DetectionRow,
    Scene,
    Thing,
    answer_text,
    instruction,
    read_detection,
    reading_order,
    require_box,
    require_size,
    require_text,
    written_box,
)
from data.rows import PhotoRow, SceneRow, read_row
from data.teachers import TeacherPool
from data.transforms.boxes import box_in
from data.types import NO_BOXES, Region, Role, Sample, Segment

HEAD = "detr"
OVER_LENGTH = ("drop_teachers", "skip")


class DetectionDataset(TaskDataset):
    """Everything in a picture, as JSON that the model writes and as boxes that a detector finds.

    Row: see data/detections.py. Boxes are pixels of the picture in its file.

    Plan: per teacher text, und_image, text (supervised: its objects); then the same of the student, whose picture has the `detr`
    region. What asks stands before the picture, so that the picture's own states, which the detector reads, know of it.

    Args:
        tokenizer, vit_transform, vae_transform: of the group.
        language: of the question, `english` or `chinese`.
        prompt: a question in place of the usual one.
        system_prompt: what stands before everything; "": nothing.
        coordinates: of the answer: `pixels` of the picture that the model sees, `thousandths`, or a `fraction`.
        writes: the answer is written as text.
        detects: the boxes are for the `detr` head.
        max_objects: a row with more is rejected; the head's `num_queries`, which has nothing left for them.
        labels: closed list; a row with another label is rejected.
        candidates_file: `{"phrase_list": [...]}`, labels that the question names.
        shuffle_objects: share of the answers that are in random order, not from top to bottom.
        teacher_pool: JSONL of samples; rows that bring teachers of their own keep those.
        teacher_ratio: share of the samples that get teachers.
        num_teachers: how many.
        teacher_sampling: which of the pool: `random`; `round_robin`, by the row's line; `label_overlap` and `label_coverage`, by
            the student's labels; `similar_image`; `fixed`, the first; `hard`.
        teacher_features, teacher_difficulty: files of `similar_image` and of `hard`.
        teachers_learn: the teachers' answers are supervised as well.
        max_sample_tokens: of texts and pictures together, 0: no limit.
        over_length: of a longer sample: `drop_teachers`, from the first on, before it is rejected, or `skip` at once.
    """

    needs = ("vit",)
    image_transform_role = "vit"
    moves = True

    def __init__(
        self,
        *,
        language: str = "english",
        prompt: str = "",
        system_prompt: str = "",
        coordinates: str = "pixels",
        writes: bool = True,
        detects: bool = True,
        max_objects: int = 100,
        labels: Sequence[str] = (),
        candidates_file: str = "",
        shuffle_objects: float = 0.0,
        teacher_pool: str = "",
        teacher_ratio: float = 0.0,
        num_teachers: int = 1,
        teacher_sampling: str = "random",
        teacher_features: str = "",
        teacher_difficulty: str = "",
        teachers_learn: bool = True,
        max_sample_tokens: int = 0,
        over_length: str = "drop_teachers",
        **base: Any,
    ) -> None:
        super().__init__(**base)
        _one_of("language", language, PROMPTS)
        _one_of("coordinates", coordinates, COORDINATES)
        _one_of("over_length", over_length, OVER_LENGTH)
        for name, share in (("teacher_ratio", teacher_ratio), ("shuffle_objects", shuffle_objects)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {share}")
        for name, least, value in (
            ("max_objects", 1, max_objects),
            ("num_teachers", 0, num_teachers),
            ("max_sample_tokens", 0, max_sample_tokens),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        if teacher_ratio and num_teachers and not teacher_pool:
            raise ValueError(f"teacher_ratio {teacher_ratio} needs a teacher_pool: a JSONL file of samples")
        if not (writes or detects):
            raise ValueError("writes and detects are both false; nothing would be learnt")
        self.heads = (HEAD,) if detects else ()
        self.writes, self.detects, self.coordinates = writes, detects, coordinates
        self.system_prompt, self.labels = system_prompt, frozenset(labels)
        self.question = instruction(language, prompt, read_candidates(candidates_file))
        self.max_objects, self.shuffle_objects = max_objects, shuffle_objects
        self.teacher_ratio, self.num_teachers = teacher_ratio, num_teachers
        self.teachers_learn, self.max_sample_tokens = teachers_learn, max_sample_tokens
        self.over_length = over_length
        self.pool = (
            TeacherPool.open(teacher_pool, teacher_sampling, teacher_features, teacher_difficulty)
            if teacher_pool
            else None
        )

    def read(self, record: Record) -> DetectionRow:
        """The row's scenes.

        Raises:
            SkipSample: if it is none.
        """
        return read_detection(record.data)

    def to_sample(self, record: Record, rng: np.random.Generator) -> Sample:
        row = self.read(record)
        # Drawn whether it is needed or not: what follows must not hang on what the row has.
        teaches = rng.random() < self.teacher_ratio
        teachers = list(row.teachers)
        if teaches and self.pool is not None and not teachers:
            teachers = self.pool.choose(row.student, self.num_teachers, rng, record.where)
        self._require_known(row.student)
        turns = [self._turn(record, scene, "teacher", rng) for scene in teachers]
        turns.append(self._turn(record, row.student, "student", rng))
        while self.max_sample_tokens and (tokens := self._tokens(turns)) > self.max_sample_tokens:
            if len(turns) == 1 or self.over_length == "skip":
                raise SkipSample(
                    "too_long",
                    f"the sample takes about {tokens} tokens with {len(turns) - 1} teachers, max_sample_tokens is "
                    f"{self.max_sample_tokens}; raise it, or use smaller pictures or fewer teachers",
                )
            turns.pop(0)
        opening = text_segments(self.system_prompt, self.tokenizer)
        segments = [*opening, *(segment for turn in turns for segment in turn[0])]
        student, region = turns[-1]
        if not self.detects:
            return Sample(segments=tuple(segments), task="detection")
        at = len(segments) - len(student) + max(i for i, s in enumerate(student) if s.kind == "und_image")
        return Sample(
            segments=tuple(segments), regions=(replace(region, segment=at, image=at),), task="detection"
        )

    def _turn(
        self, record: Record, scene: Scene, role: Role, rng: np.random.Generator
    ) -> tuple[list[Segment], Region]:
        """What is asked, shown and said of one scene, and where its objects are."""
        pictures = [self.open_image(record, name) for name in scene.pictures]
        require_size(scene, pictures[-1].annotated_size)
        shown = [image_segment("und_image", p, self.vit_transform, len(pictures)) for p in pictures]
        height, width = shown[-1].pixels.shape[1:]
        names = [t.label for t in scene.things]
        boxes = [box_in(pictures[-1], t.box, f"objects[{i}].bbox_2d") for i, t in enumerate(scene.things)]
        written = [written_box(b.tolist(), (width, height), self.coordinates) for b in boxes]
        order = reading_order(written, names)
        if rng.random() < self.shuffle_objects:
            order = [order[i] for i in rng.permutation(len(order))]
        written, names, boxes = (
            [written[i] for i in order],
            [names[i] for i in order],
            [boxes[i] for i in order],
        )
        supervised = self.writes if role == "student" else self.teachers_learn and self.writes
        answer: tuple[Segment, ...] = ()
        if role == "teacher" or self.writes:
            answer = text_segments(answer_text(written, names), self.tokenizer, supervised=True)
            answer = tuple(replace(s, supervised=supervised, role=role if supervised else "") for s in answer)
        region = Region(
            head=HEAD,
            segment=0,
            token=0,
            image=0,
            boxes=torch.stack(boxes) if boxes else NO_BOXES,
            phrases=tuple(self._phrase(name) for name in names),
            name=", ".join(names),
        )
        return [*text_segments(self.question, self.tokenizer), *shown, *answer], region

    def _phrase(self, name: str) -> torch.Tensor:
        ids = self.tokenizer.encode(name)
        return torch.cat([ids, ids.new_tensor([self.tokenizer.special.end])])

    def _require_known(self, scene: Scene) -> None:
        if len(scene.things) > self.max_objects:
            raise SkipSample(
                "too_many_objects",
                f"objects: there are {len(scene.things)}, max_objects is {self.max_objects}; raise it together with num_queries "
                "of the detr head, or split the picture",
            )
        for i, thing in enumerate(scene.things):
            if self.labels and thing.label not in self.labels:
                raise SkipSample(
                    "unknown_label",
                    f"objects[{i}].label: {thing.label!r:.60} is none of the {len(self.labels)} `labels` of the group",
                )

    def _tokens(self, turns: Sequence[tuple[list[Segment], Region]]) -> int:
        """About what the sample takes in a pack."""
        stride = getattr(self.vit_transform, "stride", 14)
        sizes = [
            len(s.ids) if s.kind == "text" else s.pixels.shape[1] * s.pixels.shape[2] // stride**2
            for turn in turns
            for s in turn[0]
        ]
        return sum(sizes) + 2 * len(sizes)


class DetectionCocoDataset(DetectionDataset):
    """The same from COCO JSON: an object's label is its category's name. Pictures without annotations are left out.

    Plan and arguments: those of `DetectionDataset`. Annotations of crowds are left out.
    """

    source_format: ClassVar[str] = "coco"

    def read(self, record: Record) -> DetectionRow:
        scene = read_row(SceneRow, record.data)
        photo = read_row(PhotoRow, scene.photo, "image")
        things = []
        for i, annotation in enumerate(scene.things):
            if annotation.get("iscrowd"):
                continue
            at = f"annotations[{i}]"
            category = scene.categories.get(_key(annotation.get("category_id")))
            name = category.get("name") if isinstance(category, dict) else None
            if not isinstance(name, str) or not name.strip():
                raise SkipSample(
                    "unknown_category",
                    f"{at}.category_id: {annotation.get('category_id')!r:.60} is no category with a name",
                )
            box = annotation.get("bbox")
            if isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) for v in box):
                box = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
            things.append(Thing(box=require_box(box, f"{at}.bbox", None), label=require_text(name).strip()))
        return DetectionRow(
            student=Scene(pictures=(require_text(photo.file),), things=tuple(things), name=photo.file)
        )


def read_candidates(path: str) -> tuple[str, ...]:
    """The phrases of a candidates file; none without one.

    Raises:
        ValueError: if it is not `{"phrase_list": [text, …]}`.
    """
    if not path:
        return ()
    if not Path(path).is_file():
        raise ValueError(f"candidates_file: {path}: there is no such file")
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    phrases = content.get("phrase_list") if isinstance(content, dict) else None
    if not isinstance(phrases, list) or not all(isinstance(p, str) for p in phrases):
        raise ValueError(f'candidates_file: {path}: must be {{"phrase_list": [text, …]}}')
    return tuple(phrases)


def _key(value: Any) -> Any:
    return value if isinstance(value, (int, str)) else None


def _one_of(name: str, value: Any, known: Any) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
