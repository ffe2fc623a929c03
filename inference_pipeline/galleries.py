"""The picture grids of the report: rows of results.jsonl in, one HTML section per task out. Used by `report.py`.

Every task is one row of `GALLERIES`. Pictures become data: URIs, so the page needs no other file.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from data.page import legend, outline, picture, png

Row = Mapping[str, Any]

TRUE_COLOUR, PRED_COLOUR = "#ffffff", "#ff4fd8"
HIT, MISSED, EXTRA = (32, 205, 120), (255, 176, 32), (255, 62, 165)
"""Mask pixels that are in both, only in the truth, only in the prediction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gallery:
    """One task's section.

    Attributes:
        title: heading.
        figures: headline figures to repeat beside the heading.
        about: what a card shows.
        columns: cards in a row of the page.
        shown, failures: how many cards by id, and how many failures beside them.
        card: rows that belong together -> HTML of one card.
        by_picture: rows about one picture share a card.
        legend: HTML under the heading.
    """

    title: str
    figures: tuple[str, ...]
    about: str
    columns: int
    shown: int
    failures: int
    card: Callable[[Sequence[Row], Path], str]
    by_picture: bool = False
    legend: str = ""


def gallery_section(task: str, rows: Sequence[Row], eval_dir: Path, figures: str) -> str:
    """One task's section: the first cards by sample id whatever their outcome, then failures that are not among them."""
    gallery = GALLERIES[task]
    groups = _grouped(rows, gallery.by_picture)
    first, rest = groups[: gallery.shown], groups[gallery.shown :]
    failed = [group for group in rest if not all(row["correct"] for row in group)]
    what = "pictures" if gallery.by_picture else "samples"
    among = sum(not all(row["correct"] for row in group) for group in first)
    parts = [
        f'<section id="{task}"><h2>{gallery.title}</h2><p class="note">{gallery.about} {figures}</p>{gallery.legend}',
        f"<h3>The first {len(first)} {what} by id, as they came: {among} with a failure</h3>",
        _cards(gallery, first, eval_dir),
    ]
    if failed:
        chosen = failed[: gallery.failures]
        parts.append(f"<h3>{_of(len(chosen), len(failed))} among the other {len(rest)} {what}, by id</h3>")
        parts.append(_cards(gallery, chosen, eval_dir))
    elif rest:
        parts.append(f'<p class="note">No failure among the other {len(rest)} {what}.</p>')
    return "".join(parts) + "</section>"


def _of(chosen: int, failed: int) -> str:
    if chosen == failed:
        return "The only failure" if failed == 1 else f"All {failed} failures"
    return f"The first {chosen} of {failed} failures"


def _grouped(rows: Sequence[Row], by_picture: bool) -> list[list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: r["sample_id"]):
        key = row["input_images"][0] if by_picture and row.get("input_images") else row["sample_id"]
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _cards(gallery: Gallery, groups: Sequence[Sequence[Row]], eval_dir: Path) -> str:
    cards = "".join(gallery.card(group, eval_dir) for group in groups)
    return f'<div class="cards c{gallery.columns}">{cards}</div>'


# ------------------------------------------------------------------------------------------------------- one card per task


def question_card(rows: Sequence[Row], eval_dir: Path) -> str:
    """A picture and everything asked about it."""
    exchanges = "".join(f"<tr><td>{_asked(row)}</td><td>{_answered(row)}</td></tr>" for row in rows)
    image = saved_picture(eval_dir, _first_input(rows[0]), "picture asked about")
    return _card(rows, f'<div class="asked"><div>{image}{_id(rows[0])}</div><table>{exchanges}</table></div>')


def text_card(rows: Sequence[Row], eval_dir: Path) -> str:
    """A question without a picture."""
    return _card(rows, f"<div>{_asked(rows[0])}</div>{_answered(rows[0])}")


def drawing_card(rows: Sequence[Row], eval_dir: Path) -> str:
    """A caption and the picture drawn from it."""
    row = rows[0]
    image = saved_picture(eval_dir, row.get("image"), f"drawn from: {row['question']}")
    return _card(rows, f'<p class="say">{_asked(row)}</p>{image}{_foot(row, _read_by_judge(row))}')


def edit_card(rows: Sequence[Row], eval_dir: Path) -> str:
    """Input, true and predicted picture of one instruction."""
    row = rows[0]
    said = row["question"]
    places = (
        ("input", _first_input(row)),
        ("truth", row.get("truth_image")),
        ("prediction", row.get("image")),
    )
    images = "".join(
        f"<figure>{saved_picture(eval_dir, path, f'{name} of: {said}')}<figcaption>{name}</figcaption></figure>"
        for name, path in places
    )
    verdict = "as asked" if row["correct"] else _edit_fault(row)
    outside = f"{row.get('psnr_outside', 0):.1f} dB outside the digit"
    foot = _foot(row, f"{verdict} · {outside}")
    report = f' <span class="truth">“{_said(row)}”</span>' if row["answer"] else ""
    heading = f'<p class="say">{_asked(row)}{report}</p>'
    return _card(rows, f'{heading}<div class="pictures">{images}</div>{foot}')


def box_card(rows: Sequence[Row], eval_dir: Path) -> str:
    """The true and the predicted box over the picture."""
    row = rows[0]
    boxes = ((row.get("gt_box"), TRUE_COLOUR, "3 2"), (row.get("pred_box"), PRED_COLOUR, ""))
    drawn = "".join(outline(box, colour, dash) for box, colour, dash in boxes if box)
    image = saved_picture(eval_dir, _first_input(row), f"boxes for: {row['question']}", over=drawn)
    verdict = f"IoU {row.get('iou', 0):.2f}" if row.get("pred_box") else "no box given"
    return _card(rows, f'<p class="say">{_asked(row)}</p>{image}{_foot(row, verdict)}')


def mask_card(rows: Sequence[Row], eval_dir: Path) -> str:
    """The predicted mask over the picture, pixels coloured by how they compare with the truth."""
    row = rows[0]
    image = mask_overlay(eval_dir, row)
    verdict = f"IoU {row.get('mask_iou', 0):.2f}" if row.get("pred_mask") else "no mask given"
    return _card(rows, f'<p class="say">{_asked(row)}</p>{image}{_foot(row, verdict)}')


def _rgb(colour: tuple[int, int, int]) -> str:
    return f"background: rgb{colour}"


GALLERIES: dict[str, Gallery] = {
    "vqa": Gallery(
        title="Answers about a picture",
        figures=("vqa_exact",),
        about="Every question is asked on its own. Right only if the answer equals the truth word for word.",
        columns=2,
        shown=6,
        failures=6,
        card=question_card,
        by_picture=True,
    ),
    "t2i": Gallery(
        title="Pictures from a caption",
        figures=("generation_digit", "generation_colour"),
        about="The judge reads each picture; it never saw the model. Right only if digits and colours are as requested.",
        columns=6,
        shown=12,
        failures=6,
        card=drawing_card,
    ),
    "edit": Gallery(
        title="Edited pictures",
        figures=("edit_success",),
        about="The named digit has to change as asked, every other one to stay, and the rest of the picture with it.",
        columns=2,
        shown=8,
        failures=6,
        card=edit_card,
    ),
    "box": Gallery(
        title="Pointing",
        figures=("box_acc_50",),
        about="Right if the predicted and the true box have an IoU of at least 0.5.",
        columns=6,
        shown=12,
        failures=6,
        card=box_card,
        legend=legend(
            ("line", f"outline-color:{PRED_COLOUR}", "predicted box"),
            ("line dashed", f"outline-color:{TRUE_COLOUR}", "true box"),
        ),
    ),
    "mask": Gallery(
        title="Segmenting",
        figures=("mask_miou",),
        about="Masks over the darkened picture. A card is marked as a failure below an IoU of 0.5.",
        columns=6,
        shown=12,
        failures=6,
        card=mask_card,
        legend=legend(
            ("", _rgb(HIT), "found"), ("", _rgb(MISSED), "missed"), ("", _rgb(EXTRA), "not part of it")
        ),
    ),
    "text": Gallery(
        title="Text alone",
        figures=("text_exact",),
        about="Questions without a picture.",
        columns=6,
        shown=12,
        failures=6,
        card=text_card,
    ),
}


# ----------------------------------------------------------------------------------------------------------------- pieces


def saved_picture(eval_dir: Path, path: str | None, alt: str, *, over: str = "") -> str:
    """A picture of the evaluation with SVG in its own pixel units `over` it."""
    if not path:
        return '<div class="picture absent">no picture</div>'
    try:
        content = (eval_dir / path).read_bytes()
        size = Image.open(io.BytesIO(content)).size
    except (OSError, UnidentifiedImageError):
        return f'<div class="picture absent">{escape(Path(path).name)}<br>cannot be read</div>'
    return picture(content, size, alt, over=over)


def mask_overlay(eval_dir: Path, row: Row) -> str:
    """The picture in dark grey, its pixels coloured where the true or the predicted mask is."""
    try:
        grey = np.asarray(Image.open(eval_dir / str(_first_input(row))).convert("L"), dtype=np.float32)
        truth = _read_mask(eval_dir, row.get("gt_mask"), grey.shape)
        predicted = _read_mask(eval_dir, row.get("pred_mask"), grey.shape)
    except (OSError, ValueError) as error:
        return f'<div class="picture absent">cannot be drawn<br>{escape(str(error))[:80]}</div>'
    canvas = np.repeat(grey[..., None] * 0.55, 3, axis=-1)
    parts = ((truth & predicted, HIT), (truth & ~predicted, MISSED), (predicted & ~truth, EXTRA))
    for part, colour in parts:
        canvas[part] = 0.15 * canvas[part] + 0.85 * np.array(colour)
    height, width = grey.shape
    content = png(Image.fromarray(canvas.clip(0, 255).astype(np.uint8)))
    return picture(content, (width, height), f"mask for: {row['question']}")


def _read_mask(eval_dir: Path, path: str | None, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    if not path:
        return np.zeros(shape, dtype=bool)
    mask = np.asarray(Image.open(eval_dir / path).convert("L")) > 127
    if mask.shape != shape:
        raise ValueError(f"{path} is {mask.shape}, its picture {shape}")
    return mask


def _card(rows: Sequence[Row], content: str) -> str:
    wrong = "" if all(row["correct"] for row in rows) else " wrong"
    return f'<article class="card{wrong}">{content}</article>'


def _foot(row: Row, verdict: str) -> str:
    kind = "pass" if row["correct"] else "fail"
    return f'<div class="foot"><span class="{kind}">{_symbol(row)} {escape(verdict)}</span>{_id(row)}</div>'


def _id(row: Row) -> str:
    return f"<code>{escape(row['sample_id'])}</code>"


def _read_by_judge(row: Row) -> str:
    found = ", ".join(f"{colour} {digit}" for digit, colour in row.get("found", []))
    return f"judge reads {found or 'no digit'}" if not row["correct"] else "as requested"


def _edit_fault(row: Row) -> str:
    if row.get("missing") or not row.get("image"):
        return "no picture"
    if not row.get("change_right"):
        return "named digit not as asked"
    return "another digit changed" if not row.get("others_right") else "background changed"


def _asked(row: Row) -> str:
    return escape(row["question"])


def _said(row: Row) -> str:
    return escape(row["answer"]) or "(no answer)"


def _answered(row: Row) -> str:
    tone = "right" if row["correct"] else "wrong-text"
    instead = "" if row["correct"] else f' <span class="truth">truth: {escape(row["truth"])}</span>'
    return f'<b class="{tone}">{_symbol(row)} {_said(row)}</b>{instead}'


def _symbol(row: Row) -> str:
    return "✓" if row["correct"] else "✗"


def _first_input(row: Row) -> str | None:
    images = row.get("input_images") or [None]
    return images[0]
