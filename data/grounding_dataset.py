"""Shikra-style rows -> Samples: questions made from templates, answers that point with tokens or with coordinates.

my_rec:
  type: grounding_jsonl
  task: rec                          # rec, res, reg, gc, spot, caption, vqa
  dataset_names: [refcoco_train]
  weight: 1.0
  templates: my_questions.json       # a JSON list, or the questions themselves; ours (data/templates) if left out
  box_format: token                  # `<BOX>`; or text: fraction, thousandths, pixels, bins (data/box_text.py)
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from data.box_text import BoxText
from data.conversation import Target, Turn, build_sample, image_segment, lead_with_images
from data.dataset_base import Record, SkipSample, TaskDataset
from data.perception_dataset import Asked, ReadMask, corners, joined_masks, mask_target
from data.rows import ExpressionRow, PictureCaptionRow, PictureRow, QuestionRow, SpotRow, read_row
from data.tokens import ANCHORS
from data.transforms.boxes import box_in, read_mask
from data.types import Sample

OURS = Path(__file__).parent / "templates"

_PLACEHOLDER = re.compile(r"<(expr|question|boxes|masks)>")
_PHRASE_START, _PHRASE_END = "<ph_st>", "<ph_ed>"
_BOXES = "<boxes>"


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in a text where things of the row are pointed at: `boxes` or `masks`, and which of them."""

    kind: str
    which: tuple[int, ...]


Piece = str | Slot
Pieces = tuple[Piece, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """What a row asks and answers.

    Attributes:
        values: placeholder -> what stands there, in the question's template.
        answer: in order.
        boxes: as the row has them.
        masks: `(size, what) -> hh ww`, each.
    """

    values: Mapping[str, Pieces]
    answer: Pieces
    boxes: Sequence[Sequence[float]] = ()
    masks: Sequence[ReadMask] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GroundingTask:
    """One kind of question.

    Attributes:
        row: its table.
        needs: placeholders that a template must have.
        read: row -> what is asked and answered, with a wording drawn.
        points: what its answers always point with, `boxes` or `masks`.
    """

    row: type[PictureRow]
    needs: tuple[str, ...]
    read: Callable[[Any, Callable[[Sequence[str]], str]], Exchange]
    points: str = ""


class GroundingDataset(TaskDataset):
    """Questions about places in one picture, of a row in the style of Shikra and PerceptionGPT.

    Rows by `task`: `rec` ("where is …?"), `res` (its mask), `reg` (words that single out a region) and `gc` (a region's caption)
    are `ExpressionRow`s; `vqa` a `QuestionRow`; `spot` (a caption that points as it names) a `SpotRow`; `caption` a
    `PictureCaptionRow`.

    Plan: und_image (where the template has `<image>`, else first), text, text (supervised).

    Args:
        tokenizer, vit_transform, vae_transform, head_transform: of the group.
        task: row of `TASKS`.
        templates: questions with `<expr>`, `<boxes>` or `<question>`, and `<image>` where they like, or a JSON file that lists
            them; one is drawn each time. What is put in may hold anything, braces too.
        box_format: `token` (`<BOX>`, read by the box head), or a form of `BoxText`. Boxes in questions are texts in any case.
        box_digits, box_brackets: of boxes in texts.
        bbox_format: `xyxy` (corners), or `xywh` (corner and size).
        absent_answer: to a row with `absent: true`.
    """

    source_format: ClassVar[str] = "jsonl"
    needs = ("vit",)
    moves = True
    path_options = ("templates",)

    def __init__(
        self,
        *,
        task: str = "rec",
        templates: Sequence[str] | str = (),
        box_format: str = "token",
        box_digits: int = 3,
        box_brackets: str = "square",
        bbox_format: str = "xyxy",
        absent_answer: str = "There is none.",
        **base: Any,
    ) -> None:
        super().__init__(**base)
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, not {task!r}")
        if bbox_format not in ("xyxy", "xywh"):
            raise ValueError(f"bbox_format must be xyxy or xywh, not {bbox_format!r}")
        if not absent_answer.strip():
            raise ValueError("absent_answer must be what is said of things that are not there")
        self.task, self.bbox_format, self.absent_answer = task, bbox_format, absent_answer
        self.templates = read_templates(templates or str(OURS / f"{task}.json"), TASKS[task].needs)
        as_tokens = box_format == "token"
        self.written = BoxText("fraction" if as_tokens else box_format, box_digits, box_brackets)
        self.box_text = None if as_tokens else self.written
        points = {"boxes": ("box",) if as_tokens else (), "masks": ("mask",), "": ()}
        self.heads = points[TASKS[task].points]
        for head in self.heads:
            if head not in self.tokenizer.special.anchors:
                raise ValueError(
                    f"{self.tokenizer.path}: the vocabulary lacks {ANCHORS[head]}, which task {task} needs; add it, or choose "
                    "another box_format"
                )

    def asked_heads(self, record: Record) -> tuple[str, ...]:
        if self.task != "vqa" or self.box_text:
            return ()
        return ("box",) if read_row(QuestionRow, record.data).answered_places else ()

    def to_sample(self, record: Record, rng: np.random.Generator) -> Sample:
        row = read_row(TASKS[self.task].row, record.data)
        exchange = TASKS[self.task].read(row, lambda texts: texts[int(rng.integers(len(texts)))])
        template = self.templates[int(rng.integers(len(self.templates)))]
        picture = self.open_image(record, row.file)
        und = image_segment("und_image", picture, self.vit_transform, view=self.head_transform)
        height, width = und.pixels.shape[1:]
        boxes = [box_in(picture, self._corners(box), f"box {i}") for i, box in enumerate(exchange.boxes)]
        masks = [mask_target(picture, m, (height, width), f"mask {i}") for i, m in enumerate(exchange.masks)]
        answer = exchange.answer or (self.absent_answer,)
        turns = [
            self._turn("human", _filled(template, exchange.values), boxes, masks, (width, height)),
            self._turn("gpt", answer, boxes, masks, (width, height)),
        ]
        return build_sample(lead_with_images(turns, 1), self.tokenizer, images=[(und,)], task=self.task)

    def asked(self, record: Record) -> tuple[str, list[Asked]]:
        """The picture's name, and what an evaluation asks of a record: of `rec` and `res` every name, by the first template.

        Raises:
            SkipSample: if the row cannot be used.
        """
        row = read_row(TASKS[self.task].row, record.data)
        if not isinstance(row, ExpressionRow) or self.task not in ("rec", "res"):
            return row.file, []
        exchange = TASKS[self.task].read(row, lambda texts: texts[0])
        head = "box" if self.task == "rec" else "mask"
        if head == "box" and len(exchange.boxes) != 1:
            return row.file, []  # accuracy is of one box per expression
        return row.file, [
            Asked(
                head=head,
                question="".join(map(str, _filled(self.templates[0], {"expr": (name,)}))),
                answer="" if head == "box" and self.box_text else ANCHORS[head],
                name=name,
                box=self._corners(exchange.boxes[0]) if head == "box" else None,
                mask=partial(joined_masks, exchange.masks, what="mask") if head == "mask" else None,
            )
            for name in row.names
        ]

    def _corners(self, box: Sequence[float]) -> tuple[float, float, float, float]:
        a, b, c, d = box
        return (a, b, c, d) if self.bbox_format == "xyxy" else corners((a, b, c, d))

    def _turn(
        self,
        role: Any,
        pieces: Pieces,
        boxes: Sequence[Tensor],
        masks: Sequence[Tensor],
        size: tuple[int, int],
    ) -> Turn:
        """One side's text with what it points at; a question points with text."""
        text, targets = "", list[Target]()
        for piece in pieces:
            if isinstance(piece, str):
                text += piece
                continue
            things = boxes if piece.kind == "boxes" else masks
            if wrong := [i for i in piece.which if i >= len(things)]:
                raise SkipSample(
                    "object_count", f"{piece.kind} {wrong[0]} is asked for, the row has {len(things)}"
                )
            if piece.kind == "boxes" and (role == "human" or self.box_text):
                text += self.written.write([boxes[i].tolist() for i in piece.which], size)
                continue
            head = "box" if piece.kind == "boxes" else "mask"
            text += ";".join([ANCHORS[head]] * len(piece.which))
            for i in piece.which:
                targets.append(
                    Target(head="box", boxes=boxes[i][None])
                    if head == "box"
                    else Target(head="mask", mask=masks[i])
                )
        return Turn(role=role, text=text, targets=tuple(targets))


# ---------------------------------------------------------------------------------------------------------- templates


def read_templates(given: Sequence[str] | str, needs: Sequence[str]) -> tuple[str, ...]:
    """Questions, or those of a JSON file.

    Raises:
        ValueError: if there are none, or one lacks a placeholder.
    """
    where, templates = "templates", given
    if isinstance(given, str):
        where = given
        try:
            templates = json.loads(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise ValueError(f"templates: {given}: not a JSON list of questions ({e})") from e
    if (
        not isinstance(templates, (list, tuple))
        or not templates
        or not all(isinstance(t, str) for t in templates)
    ):
        raise ValueError(f"{where}: expected a list of questions")
    for template in templates:
        if missing := [f"<{name}>" for name in needs if f"<{name}>" not in template]:
            raise ValueError(f"{where}: {template!r} lacks {missing[0]}")
    return tuple(templates)


def _filled(template: str, values: Mapping[str, Pieces]) -> Pieces:
    """A template with its placeholders replaced, once: what is put in is not looked at again."""
    pieces: list[Piece] = []
    for i, part in enumerate(_PLACEHOLDER.split(template)):
        pieces += values.get(part, (f"<{part}>",)) if i % 2 else (part,)
    return tuple(pieces)


def _pointing(text: str, places: Sequence[tuple[int, ...]]) -> Pieces:
    """A row's text whose `<boxes>` stand for the boxes of the same number in `places`."""
    parts = text.split(_BOXES)
    if len(parts) != len(places) + 1:
        raise SkipSample(
            "object_count",
            f"{text[:60]!r} has {len(parts) - 1} {_BOXES}, the row names boxes for {len(places)}",
        )
    pieces: list[Piece] = [parts[0]]
    for which, part in zip(places, parts[1:], strict=True):
        pieces += [Slot("boxes", which), part]
    return tuple(pieces)


# -------------------------------------------------------------------------------------------------------------- tasks


def _refer(row: ExpressionRow, draw: Callable[[Sequence[str]], str]) -> Exchange:
    if row.absent:
        return Exchange(values={"expr": (draw(row.names),)}, answer=())
    if not row.boxes:
        raise SkipSample("bad_box", "the row has no `bbox`; give it one, or `absent`: true")
    answer = (Slot("boxes", tuple(range(len(row.boxes)))),)
    return Exchange(values={"expr": (draw(row.names),)}, answer=answer, boxes=row.boxes)


def _segment(row: ExpressionRow, draw: Callable[[Sequence[str]], str]) -> Exchange:
    if row.absent:
        return Exchange(values={"expr": (draw(row.names),)}, answer=())
    masks = row.masks or (() if row.mask is None else (row.mask,))
    if not masks:
        raise SkipSample("bad_mask", "the row has no `mask`; give it one, or `absent`: true")
    return Exchange(
        values={"expr": (draw(row.names),)},
        answer=(Slot("masks", tuple(range(len(masks)))),),
        masks=[partial(read_mask, mask) for mask in masks],
    )


def _describe(row: ExpressionRow, draw: Callable[[Sequence[str]], str]) -> Exchange:
    if not row.boxes:
        raise SkipSample("bad_box", "the row has no `bbox`; the question needs one")
    region = Slot("boxes", tuple(range(len(row.boxes))))
    return Exchange(values={"boxes": (region,)}, answer=(draw(row.names),), boxes=row.boxes)


def _answer(row: QuestionRow, draw: Callable[[Sequence[str]], str]) -> Exchange:
    return Exchange(
        values={"question": _pointing(row.question, row.asked_places)},
        answer=_pointing(row.answer, row.answered_places),
        boxes=row.boxes,
    )


def _spot(row: SpotRow, draw: Callable[[Sequence[str]], str]) -> Exchange:
    sentence = row.sentence.replace(_PHRASE_START, "").replace(_PHRASE_END, f" {_BOXES}")
    return Exchange(values={}, answer=_pointing(sentence, row.places), boxes=row.boxes)


def _caption(row: PictureCaptionRow, draw: Callable[[Sequence[str]], str]) -> Exchange:
    return Exchange(values={}, answer=(row.caption,))


TASKS: Mapping[str, GroundingTask] = {
    "rec": GroundingTask(row=ExpressionRow, needs=("expr",), read=_refer, points="boxes"),
    "res": GroundingTask(row=ExpressionRow, needs=("expr",), read=_segment, points="masks"),
    "reg": GroundingTask(row=ExpressionRow, needs=("boxes",), read=_describe),
    "gc": GroundingTask(row=ExpressionRow, needs=("boxes",), read=_describe),
    "spot": GroundingTask(row=SpotRow, needs=(), read=_spot, points="boxes"),
    "caption": GroundingTask(row=PictureCaptionRow, needs=(), read=_caption),
    "vqa": GroundingTask(row=QuestionRow, needs=("question",), read=_answer),
}
"""By the name of the published tasks; `gc` is grounded captioning, `spot` spotting captioning."""
