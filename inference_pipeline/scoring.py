"""One question and what the model made of it -> one row of results.jsonl. Used by `evaluate.py`.

Every task is one row of `SCORERS`: a function that gives the task's columns. A model that said nothing usable is scored like
any other and gets the lowest score; no sample is left out.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.conversation import IMAGE
from inference_pipeline.questions import Edit, Glyph, Question
from train.metrics.boxes import box_iou
from train.metrics.image import colours_match, digits_match, psnr
from train.metrics.masks import mask_iou
from train.metrics.text import normalise

Picture = NDArray[np.uint8]
"""`hh ww 3`."""

Columns = dict[str, Any]


class Found(Protocol):
    """A digit that the judge read in a picture; `box` is xyxy in pixels."""

    @property
    def digit(self) -> int: ...

    @property
    def colour(self) -> str: ...

    @property
    def box(self) -> Sequence[float]: ...


class Judge(Protocol):
    """Reads the digits of a picture; knows nothing of the model."""

    def read(self, image: Picture) -> Sequence[Found]:
        """The digits found in `hh ww 3` uint8."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What the model made of one question; every field may be empty."""

    text: str = ""
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    masks: tuple[NDArray[np.bool_], ...] = ()
    picture: Picture | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Who judges pictures (None if no question asks for one), and how still everything beside an edited digit has to stand."""

    judge: Judge | None
    min_psnr_outside: float = 25.0


def text_columns(question: Question, output: Output, rules: Rules) -> Columns:
    """Exact match."""
    return {"correct": normalise(output.text) == normalise(question.answer)}


def box_columns(question: Question, output: Output, rules: Rules) -> Columns:
    """IoU of the first box; right from 0.5."""
    assert question.box is not None
    predicted = output.boxes[0] if output.boxes else None
    iou = box_iou(predicted, question.box) if predicted is not None else 0.0
    return {
        "correct": iou >= 0.5,
        "iou": round(iou, 6),
        "pred_box": [round(float(v), 3) for v in predicted] if predicted is not None else None,
        "gt_box": list(question.box),
    }


def mask_columns(question: Question, output: Output, rules: Rules) -> Columns:
    """IoU of the first mask; called right from 0.5, the figure is the mean IoU."""
    assert question.mask is not None and question.box is not None
    iou = mask_iou(output.masks[0], question.mask) if output.masks else 0.0
    return {"correct": iou >= 0.5, "mask_iou": round(iou, 6), "gt_box": list(question.box)}


def generation_columns(question: Question, output: Output, rules: Rules) -> Columns:
    """The judge reads the picture: exactly the wanted digits, in the wanted colours."""
    assert rules.judge is not None
    wanted = _pairs(question.scene)
    found = _pairs(rules.judge.read(output.picture)) if output.picture is not None else []
    digits = output.picture is not None and digits_match(found, wanted)
    colours = output.picture is not None and colours_match(found, wanted)
    return {
        "correct": digits and colours,
        "digit_right": digits,
        "colour_right": colours,
        "found": found,
        "wanted": wanted,
    }


def editing_columns(question: Question, output: Output, rules: Rules) -> Columns:
    """The judge reads the picture: the named digit as asked, every other one as before; and no pixel outside changed much."""
    assert question.edit is not None and rules.judge is not None
    before, truth = np.asarray(Image.open(question.images[0]).convert("RGB")), question.true_picture
    picture = output.picture
    if picture is None or picture.shape != before.shape:  # another size is no edit of this picture
        picture, outside, found = None, 0.0, []
    else:
        outside = psnr(picture, before, keep=_outside(before, question.edit.target, margin=2))
        found = list(rules.judge.read(picture))
    changed = picture is not None and edit_done(found, question.edit)
    kept = picture is not None and others_kept(found, question.scene, question.edit)
    return {
        "correct": changed and kept and outside >= rules.min_psnr_outside,
        "change_right": changed,
        "others_right": kept,
        "psnr_outside": round(outside, 3),
        "psnr": round(psnr(picture, truth), 3) if picture is not None else 0.0,
        "edit_kind": question.edit.kind,
        "found": _pairs(found),
        "wanted": _pairs(question.scene),
        "gt_box": list(question.edit.target.box),
    }


SCORERS: Mapping[str, Callable[[Question, Output, Rules], Columns]] = {
    "vqa": text_columns,
    "text": text_columns,
    "box": box_columns,
    "mask": mask_columns,
    "t2i": generation_columns,
    "edit": editing_columns,
}


def score(question: Question, output: Output, rules: Rules) -> Columns:
    """The columns of one sample's task."""
    return SCORERS[question.task](question, output, rules)


def result_row(
    question: Question, output: Output | None, rules: Rules, output_dir: Path, seconds: float = 0.0
) -> Columns:
    """The row of one sample, its pictures written under `output_dir`/images; `output` is None if the model gave none."""
    return {
        "sample_id": question.sample_id,
        "task": question.task,
        "main_task_type": question.main_task_type,
        "sub_task_type": question.sub_task_type,
        "question": question.text.replace(IMAGE, "").strip(),
        "answer": output.text if output else "",
        "truth": question.answer,
        "missing": output is None,
        **score(question, output or Output(), rules),
        **_save_pictures(question, output or Output(), output_dir),
        "inference_time_s": round(seconds, 4),
    }


def _save_pictures(question: Question, output: Output, output_dir: Path) -> Columns:
    """Write input, true and predicted picture and mask; their paths relative to `output_dir`."""
    name = f"{question.sample_id}.png"
    contents: dict[str, tuple[str, bytes]] = {}
    if question.picture:
        contents["truth_image"] = (f"truth/{name}", question.picture)
    if output.picture is not None:
        contents["image"] = (f"pred/{name}", _png(output.picture))
    if question.mask is not None:
        contents["gt_mask"] = (f"truth/{name}", _png(question.mask.astype(np.uint8) * 255))
    if question.mask is not None and output.masks:
        contents["pred_mask"] = (f"pred/{name}", _png(output.masks[0].astype(np.uint8) * 255))
    return {
        "input_images": [
            _save(path.read_bytes(), output_dir, f"input/{path.name}") for path in question.images
        ],
        **{column: _save(content, output_dir, place) for column, (place, content) in contents.items()},
    }


def _save(content: bytes, output_dir: Path, place: str) -> str:
    file = output_dir / "images" / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return f"images/{place}"


def edit_done(found: Sequence[Found], edit: Edit) -> bool:
    """Whether the named digit's place is as asked: the same digit in the new colour (recolour), or none (remove)."""
    there = [(f.digit, f.colour) for f in found if _stands_at(f, edit.target)]
    return there == ([] if edit.kind == "remove" else [(edit.target.digit, edit.colour)])


def others_kept(found: Sequence[Found], after: Sequence[Glyph], edit: Edit) -> bool:
    """Whether what is read beside the named digit is exactly the other digits, each with its colour and at its place."""
    beside = [f for f in found if not _stands_at(f, edit.target)]
    others = [g for g in after if g.box != edit.target.box]
    kept = [
        any((f.digit, f.colour) == (g.digit, g.colour) and _stands_at(f, g) for f in beside) for g in others
    ]
    return all(kept) and len(beside) == len(others)


def _stands_at(found: Found, place: Glyph) -> bool:
    """Whether the centre of what was found lies in a digit's box."""
    x, y = (found.box[0] + found.box[2]) / 2, (found.box[1] + found.box[3]) / 2
    left, top, right, bottom = place.box
    return left <= x <= right and top <= y <= bottom


def _outside(picture: Picture, target: Glyph, margin: int) -> NDArray[np.bool_]:
    """`hh ww`, True outside the digit's box grown by `margin` pixels."""
    left, top, right, bottom = (round(v) for v in target.box)
    keep = np.ones(picture.shape[:2], dtype=bool)
    keep[max(top - margin, 0) : bottom + margin, max(left - margin, 0) : right + margin] = False
    return keep


def _pairs(glyphs: Sequence[Found] | Sequence[Glyph]) -> list[tuple[int, str]]:
    return [(int(g.digit), g.colour) for g in glyphs]


def _png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()
