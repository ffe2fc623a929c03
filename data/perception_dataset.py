"""Boxes and masks of named things: COCO JSON -> Samples whose answers are `<BOX>` and `<SEG>`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from data.conversation import IMAGE, Target, Turn, build_sample, image_segment
from data.dataset_base import Record, SkipSample, TaskDataset
from data.rgb_image import RgbImage
from data.rows import PhotoRow, ReasonRow, ReferRow, SceneRow, ThingRow, read_row
from data.tokens import ANCHORS
from data.transforms.boxes import box_in, mask_in, paint_shapes, read_mask, resized_mask
from data.types import Sample

ReadMask = Callable[[tuple[int, int], str], np.ndarray]
"""`(size, what) -> hh ww` uint8 of a picture of that width and height; raises `SkipSample`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """Something in a picture that may be asked for.

    Attributes:
        what: names it in messages.
        names: wordings of it.
        box: `xyxy` in pixels of the original picture; None: there is none.
        mask: `(size, what) -> hh ww` of the original picture, as `read_mask`; None: there is none.
        is_question: the names are questions themselves.
        facts: what else an evaluation may want to know of it (`spacing`, `modality`).
    """

    what: str
    names: Sequence[str]
    box: tuple[float, float, float, float] | None = None
    mask: ReadMask | None = None
    is_question: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One question of an evaluation, about a picture as it was annotated.

    Attributes:
        head: which head is asked.
        question, answer: texts; the answer is what a model that is made to answer says, empty where that would tell the place.
        name: of the thing.
        box: xyxy in pixels.
        mask: `size -> hh ww` uint8 0/1, 255 where nothing counts.
        facts: of the thing.
    """

    head: str
    question: str
    answer: str
    name: str
    box: tuple[float, float, float, float] | None = None
    mask: Callable[[tuple[int, int]], np.ndarray] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class ReferDataset(TaskDataset):
    """Referring boxes and masks: several questions about one picture, in random order.

    Record: one image of a COCO JSON whose annotations have, beside COCO's `bbox` and `segmentation`, the words for the thing:
    `{"id": 5, "image_id": 1, "category_id": 7, "bbox": [x, y, w, h], "segmentation": RLE or polygons, "expressions": ["the red
    7", …]}`.

    Plan: und_image, then per question text ("Where is the red 7?"), text (supervised: "<BOX>" or "<SEG>", with its region).

    Args:
        tokenizer, vit_transform, vae_transform, head_transform: of the group.
        box_templates: questions for the box, one of them drawn each time; an empty list asks for none.
        mask_templates: the same for the mask.
        max_turns: random subset of this many questions; 0 = all.
        independent_turns: the questions do not see each other, each is asked as if alone about the picture.
    """

    source_format: ClassVar[str] = "coco"
    needs = ("vit",)
    moves = True
    asks_every_name: ClassVar[bool] = True
    """Whether an evaluation asks for a thing by each of its names, or by the first alone."""

    def __init__(
        self,
        *,
        box_templates: Sequence[str] = ("Where is {ref}?",),
        mask_templates: Sequence[str] = ("Segment {ref}.",),
        max_turns: int = 0,
        independent_turns: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        self.templates = {"box": tuple(box_templates), "mask": tuple(mask_templates)}
        self.heads = tuple(head for head, templates in self.templates.items() if templates)
        self.max_turns, self.independent_turns = max_turns, independent_turns
        if max_turns < 0:
            raise ValueError(f"max_turns must be 0 (all) or more, not {max_turns}")
        if isinstance(box_templates, str) or isinstance(mask_templates, str):
            raise ValueError("box_templates and mask_templates must be a list of questions each")
        if not (box_templates or mask_templates):
            raise ValueError("box_templates and mask_templates are both empty; nothing would be asked")
        for head, templates in self.templates.items():
            if wrong := [t for t in templates if "{ref}" not in t]:
                raise ValueError(
                    f"{head}_templates: {wrong[0]!r} does not contain {{ref}}, the place of the expression"
                )
            if templates and head not in self.tokenizer.special.anchors:
                raise ValueError(
                    f"{self.tokenizer.path}: the vocabulary lacks {ANCHORS[head]}; {head}_templates need it"
                )

    def to_sample(self, record: Record, rng: np.random.Generator) -> Sample:
        file, things = self.read(record)
        if not things:
            raise SkipSample("no_target", "nothing in the picture has a name to ask for")
        picture = self.open_image(record, file)
        und = image_segment("und_image", picture, self.vit_transform, view=self.head_transform)
        hw = (und.pixels.shape[1], und.pixels.shape[2])
        # Every thing is read, asked for or not: whether a record is rejected must not hang on the draw.
        asked = self._exchanges(things, picture, hw)
        chosen = [asked[i] for i in rng.permutation(len(asked))[: self.max_turns or None]]
        turns = [turn for thing, targets in chosen for turn in self._ask(thing, targets, rng)]
        turns[0] = replace(turns[0], text=IMAGE + turns[0].text)
        return build_sample(
            turns, self.tokenizer, images=[(und,)], independent=self.independent_turns, task="refer"
        )

    def asked(self, record: Record) -> tuple[str, list[Asked]]:
        """The picture's name, and what an evaluation asks of a record: every thing, by the first template.

        Raises:
            SkipSample: as `read`.
        """
        file, things = self.read(record)
        return file, [
            asked
            for thing in things
            for name in (thing.names if self.asks_every_name else thing.names[:1])
            for asked in self._asked(thing, name)
        ]

    def read(self, record: Record) -> tuple[str, Sequence[Thing]]:
        """The picture's name and the things in it.

        Raises:
            SkipSample: if the record does not fit its table, or lacks what the templates ask for.
        """
        scene = read_row(SceneRow, record.data)
        things = []
        for annotation in scene.things:
            what = f"annotation {annotation.get('id')}"
            row = read_row(ThingRow, annotation, what)
            if row.category not in scene.categories:
                known = ", ".join(str(c) for c in list(scene.categories)[:20])
                raise SkipSample(
                    "unknown_category", f"{what}: category_id {row.category!r} is not one of {known}"
                )
            if self.templates["box"] and row.box is None:
                raise SkipSample(
                    "bad_box", f"{what}: it has no `bbox`; give it one, or set box_templates: []"
                )
            if self.templates["mask"] and row.mask is None:
                raise SkipSample(
                    "bad_mask", f"{what}: it has no `segmentation`; give it one, or set mask_templates: []"
                )
            things.append(
                Thing(
                    what=what,
                    names=row.names,
                    box=None if row.box is None else corners(row.box),
                    mask=None if row.mask is None else partial(read_mask, row.mask),
                )
            )
        return read_row(PhotoRow, scene.photo, "image").file, things

    def _exchanges(
        self, things: Sequence[Thing], picture: RgbImage, hw: tuple[int, int]
    ) -> Sequence[tuple[Thing, tuple[Target, ...]]]:
        """What can be asked for, and what each answer points at."""
        return [(thing, (target,)) for thing in things for target in self._targets(thing, picture, hw)]

    def _targets(self, thing: Thing, picture: RgbImage, hw: tuple[int, int]) -> Iterator[Target]:
        if self.templates["box"] and thing.box is not None:
            yield Target(head="box", boxes=box_in(picture, thing.box, thing.what)[None])
        if self.templates["mask"] and thing.mask is not None:
            yield Target(head="mask", mask=mask_target(picture, thing.mask, hw, thing.what))

    def _asked(self, thing: Thing, name: str) -> Iterator[Asked]:
        for head in self.heads:
            if (thing.box if head == "box" else thing.mask) is None:
                continue
            template = "{ref}" if thing.is_question else self.templates[head][0]
            yield Asked(
                head=head,
                question=template.replace("{ref}", name),
                answer=ANCHORS[head],
                name=name,
                box=thing.box,
                mask=None if thing.mask is None else partial(_mask_of, thing),
                facts=thing.facts,
            )

    def _ask(self, thing: Thing, targets: Sequence[Target], rng: np.random.Generator) -> tuple[Turn, Turn]:
        head = targets[0].head
        templates = ("{ref}",) if thing.is_question else self.templates[head]
        template = templates[int(rng.integers(len(templates)))]
        name = thing.names[int(rng.integers(len(thing.names)))]
        question = Turn(role="human", text=template.replace("{ref}", name))
        answer = ";".join([ANCHORS[head]] * len(targets))
        return question, Turn(
            role="gpt", text=answer, targets=tuple(replace(target, name=name) for target in targets)
        )


class ReferRowDataset(ReferDataset):
    """One named thing per row of JSONL, as in RefCOCO's and PerceptionGPT's files.

    Row (`ReferRow`): `{"img_path": "a.jpg", "expression": "the red 7", "bbox": [x1, y1, x2, y2], "mask": RLE or polygons}`; an
    expression may be a list of wordings, `segmentation` means `mask`. What a row lacks of box and mask is not asked for.

    Plan and arguments: those of `ReferDataset`, and

    Args:
        bbox_format: `xyxy` (corners), or `xywh` (corner and size), in which files of referring segmentation have it.
    """

    source_format: ClassVar[str] = "jsonl"

    def __init__(self, *, bbox_format: str = "xyxy", **base: Any) -> None:
        super().__init__(**base)
        if bbox_format not in ("xyxy", "xywh"):
            raise ValueError(f"bbox_format must be xyxy or xywh, not {bbox_format!r}")
        self.bbox_format = bbox_format

    def read(self, record: Record) -> tuple[str, Sequence[Thing]]:
        row = read_row(ReferRow, record.data)
        box = row.box if row.box is None or self.bbox_format == "xyxy" else corners(row.box)
        mask = None if row.mask is None else partial(read_mask, row.mask)
        if not (self.templates["box"] and box) and not (self.templates["mask"] and mask):
            raise SkipSample("no_target", "the row has neither a box nor a mask that the templates ask for")
        return row.file, [Thing(what=repr(row.names[0]), names=row.names, box=box, mask=mask)]


class ReasonSegDataset(ReferDataset):
    """Segmentation of what a sentence hints at: a ReasonSeg folder.

    Record (`ReasonRow`): `{"image": "x.jpg", "text": ["What cuts bread?"], "is_sentence": true, "shapes": [{"label": "target",
    "points": [[x, y], …]}]}`. A sentence is asked as it stands, a phrase in one of the `mask_templates`. Shapes are painted from
    the largest to the smallest: "target" in, "ignore" out (an evaluation does not count these pixels); those labelled "flag" are
    left out.

    Plan and arguments: those of `ReferDataset`, without boxes.
    """

    source_format: ClassVar[str] = "reasonseg"
    asks_every_name = False  # as published

    def __init__(self, *, box_templates: Sequence[str] = (), **base: Any) -> None:
        super().__init__(box_templates=box_templates, **base)
        if box_templates:
            raise ValueError("box_templates: ReasonSeg has masks only; leave it out")

    def read(self, record: Record) -> tuple[str, Sequence[Thing]]:
        row = read_row(ReasonRow, record.data)
        mask = partial(paint_shapes, row.shapes)
        return row.file, [Thing(what="shapes", names=row.texts, mask=mask, is_question=row.is_sentence)]


def mask_target(picture: RgbImage, read: ReadMask, hw: tuple[int, int], what: str) -> Tensor:
    """`hh ww` uint8 0/1 of a picture as the model sees it; ignored pixels are background.

    Raises:
        SkipSample: `empty_mask`, or what `read` and `mask_in` raise.
    """
    mask = read(picture.annotated_size, what) == 1
    if not mask.any():
        raise SkipSample("empty_mask", f"{what}: nothing of the picture is inside; correct or remove it")
    return resized_mask(mask_in(picture, mask.astype(np.uint8), what), hw, what)


def joined_masks(masks: Sequence[ReadMask], size: tuple[int, int], what: str) -> np.ndarray:
    """All of them as one `hh ww` uint8 0/1; empty where there is none."""
    joined = np.zeros((size[1], size[0]), np.uint8)
    for number, read in enumerate(masks):
        joined |= read(size, f"{what} {number}")
    return joined


def _mask_of(thing: Thing, size: tuple[int, int]) -> np.ndarray:
    assert thing.mask is not None
    return thing.mask(size, thing.what)


def corners(xywh: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """Corner and size -> two corners."""
    x, y, width, height = xywh
    return x, y, x + width, y + height
