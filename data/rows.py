"""What the rows of data sets look like: one table per kind of row, all checked by `read_row`.

A kind of row is a dataclass. Each of its fields says under which keys of the row it may stand (the first one that has something
counts), how it is read, what it must look like and under which reason a row is rejected in which it does not. Keys that no field
names are left alone: published rows carry many notes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from math import inf
from typing import Any, TypeVar, cast

from data.conversation import IMAGE, Role, Turn
from data.sources.record import SkipSample, parse_json

REQUIRED: Any = object()
"""Default of a column that a row cannot do without."""

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One field of a row.

    Attributes:
        keys: where it may stand.
        read: the value in the form that the dataset classes use; `ValueError` says what is wrong with it.
        form: what it must be, for people.
        reason: under which a bad row is counted.
        default: what a row without it has; `REQUIRED`: the row is rejected.
    """

    keys: tuple[str, ...]
    read: Callable[[Any], Any]
    form: str
    reason: str
    default: Any


def column(*keys: str, read: Callable[[Any], Any], form: str, reason: str, default: Any = REQUIRED) -> Any:
    """The field of a row's dataclass that such a `Column` describes."""
    return field(metadata={"column": Column(keys=keys, read=read, form=form, reason=reason, default=default)})


def read_row(kind: type[Row], row: Mapping[str, Any], what: str = "") -> Row:
    """A row in the form of its table.

    Args:
        kind: the table.
        row: as it stands in the file.
        what: names the row in the message, where it is a part of a record ("annotation 5").

    Raises:
        SkipSample: naming the key, what is wrong with it and what it must be.
    """
    values: dict[str, Any] = {}
    for name, rule in _columns(cast(Any, kind)):
        key = next((key for key in rule.keys if not _is_absent(row.get(key))), None)
        try:
            if key is None and rule.default is REQUIRED:
                raise ValueError("is missing or empty")
            values[name] = rule.default if key is None else rule.read(row[key])
        except ValueError as e:
            named = " or ".join(f"`{k}`" for k in rule.keys if key in (None, k))
            message = f"{named} {e}; it must be {rule.form}: correct the row or remove it"
            raise SkipSample(rule.reason, f"{what}: {message}" if what else message) from None
    return kind(**values)


@cache
def _columns(kind: Any) -> tuple[tuple[str, Column], ...]:
    return tuple((f.name, f.metadata["column"]) for f in fields(kind))


def answers_in(row: Mapping[str, Any]) -> list[str]:
    """What the `gpt` turns of a `ChatRow` say, those with pictures between left out; nothing of a row that is none."""
    try:
        turns = as_turns(row.get("message") or row.get("conversations"))
    except ValueError:
        return []
    answers = (turn.text.strip() for turn in turns if turn.role == "gpt")
    return [text for text in answers if text and IMAGE not in text]


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, tuple, dict)) and not value)


# ------------------------------------------------------------------------------------- how values are read


def as_text(value: Any) -> str:
    """A text, as it is."""
    if not isinstance(value, str):
        raise ValueError(f"is {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON may hold half of a pair of code units
        raise ValueError(f"has a character that is none: {_shown(value)}") from None
    return value


def as_turns(value: Any) -> tuple[Turn, ...]:
    """What is said, by whom."""
    turns = []
    for i, message in enumerate(_as_list(value)):
        said = message if isinstance(message, dict) else {}
        role, text = said.get("from"), said.get("value")
        if role not in ("human", "gpt") or not isinstance(text, str):
            raise ValueError(f"has in turn {i} {_shown(message)}")
        turns.append(Turn(role=cast(Role, role), text=as_text(text)))
    return tuple(turns)


def as_files(value: Any) -> tuple[str, ...]:
    """Names of files: one or a list, each by itself or as `{"path": name}`."""
    return tuple(map(as_file, value if isinstance(value, (list, tuple)) else [value]))


def as_file(value: Any) -> str:
    """The name of one file; `{"bytes": name, "path": …}` is how data sets of the `datasets` library keep pictures in columns."""
    name = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
    if not isinstance(name, str) or not name:
        raise ValueError(f"has {_shown(value)}")
    return name


def as_captions(value: Any) -> tuple[str, ...]:
    """The texts of a list, of a dict, or of the JSON string of one; empty ones are left out."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as e:
            raise ValueError(f"is {_shown(value)}, no JSON") from e
    texts = list(value.values()) if isinstance(value, dict) else _as_list(value)
    return tuple(text for text in map(as_text, texts) if text.strip())


def as_names(value: Any) -> tuple[str, ...]:
    """Texts that each say something."""
    names = tuple(map(as_text, _as_list(value)))
    if not all(name.strip() for name in names):
        raise ValueError("has a text that is blank")
    return names


def as_name_or_names(value: Any) -> tuple[str, ...]:
    """One text, or several wordings of it."""
    return as_names([value] if isinstance(value, str) else value)


def as_flag(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"is {_shown(value)}")
    return value


def as_shapes(value: Any) -> tuple[tuple[str, list[Any]], ...]:
    """Label and corners of polygons."""
    shapes = []
    for i, shape in enumerate(_as_list(value)):
        fields = shape if isinstance(shape, dict) else {}
        label, points = fields.get("label"), fields.get("points")
        if not isinstance(label, str) or not isinstance(points, list):
            raise ValueError(f"has as shape {i} {_shown(shape)}")
        shapes.append((label, points))
    return tuple(shapes)


def as_steps(value: Any) -> tuple[tuple[str, ...], ...]:
    """Per step the wordings of its instruction; one wording may stand alone."""
    steps = tuple(as_names([step] if isinstance(step, str) else step) for step in _as_list(value))
    if empty := [i for i, step in enumerate(steps) if not step]:
        raise ValueError(f"has no wording of step {empty[0]}")
    return steps


def as_objects(value: Any) -> Mapping[str, list[Any]]:
    """Lists of one length, one entry per object."""
    if not isinstance(value, dict) or not all(isinstance(value.get(key, []), list) for key in OBJECT_KEYS):
        raise ValueError(f"is {_shown(value)}")
    known = {key: value[key] for key in OBJECT_KEYS if key in value}
    for key, kind in (("ref", str), ("image", int)):
        if wrong := [v for v in known.get(key, []) if v is not None and type(v) is not kind]:
            raise ValueError(f"has under {key} {_shown(wrong[0])}")
    if len({len(values) for values in known.values()}) > 1:
        raise ValueError("has " + ", ".join(f"{key} {len(values)}" for key, values in known.items()))
    return known


def as_box(value: Any) -> tuple[float, float, float, float]:
    """Four numbers."""
    try:
        a, b, c, d = (float(v) for v in value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"is {_shown(value)}") from None
    return a, b, c, d


def as_boxes(value: Any) -> tuple[tuple[float, float, float, float], ...]:
    """One box, or several."""
    entries = _as_list(value)
    return tuple(map(as_box, entries if entries and isinstance(entries[0], (list, tuple)) else [entries]))


def as_places(value: Any) -> tuple[tuple[int, ...], ...]:
    """Per placeholder the numbers of its boxes."""
    places = tuple(tuple(_as_list(group)) for group in _as_list(value))
    if any(type(number) is not int or number < 0 for group in places for number in group):
        raise ValueError(f"is {_shown(value)}")
    return places


def as_id(value: Any) -> str:
    """What names somebody."""
    if type(value) not in (int, str):
        raise ValueError(f"is {_shown(value)}")
    return as_text(str(value))


def as_count(value: Any) -> int:
    """A whole number from 0."""
    if type(value) is not int or value < 0:
        raise ValueError(f"is {_shown(value)}")
    return value


def as_spacing(value: Any) -> tuple[float, float]:
    """Two steps in mm."""
    try:
        rows, columns = (float(v) for v in value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"is {_shown(value)}") from None
    if not (0 < rows < inf and 0 < columns < inf):
        raise ValueError(f"is {_shown(value)}")
    return rows, columns


def as_key(value: Any) -> int | str:
    """The id of something."""
    if type(value) not in (int, str):
        raise ValueError(f"is {_shown(value)}")
    return value


def as_fields(value: Any) -> Mapping[Any, Any]:
    """Something with fields of its own."""
    if not isinstance(value, dict):
        raise ValueError(f"is {_shown(value)}")
    return value


def as_list_of_fields(value: Any) -> tuple[Mapping[Any, Any], ...]:
    """Several of `as_fields`."""
    return tuple(map(as_fields, _as_list(value)))


def as_answer(value: Any) -> str:
    """A text, or VQAv2's annotation with one."""
    return as_text(value.get("multiple_choice_answer") if isinstance(value, dict) else value)


def as_several(value: Any) -> tuple[Any, ...]:
    """A list of anything."""
    return tuple(_as_list(value))


def as_it_is(value: Any) -> Any:
    """Anything: what reads it later says what is wrong with it."""
    return value


def _as_list(value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"is {_shown(value)}")
    return list(value)


def _shown(value: Any) -> str:
    return f"{value!r:.80}"


# --------------------------------------------------------------------------------------------- the tables

OBJECT_KEYS = ("ref", "bbox", "mask", "image")
PICTURES = 'a path, {"path": path}, or a list of them'
MESSAGES = 'a list of {"from": "human" or "gpt", "value": text}'
OBJECTS = f"lists of one length under {', '.join(OBJECT_KEYS)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRow:
    """A conversation: UniMedVL's `message` or LLaVA's `conversations`."""

    turns: tuple[Turn, ...] = column(
        "message", "conversations", read=as_turns, form=MESSAGES, reason="bad_message"
    )
    task: str = column("main_task_type", read=as_text, form="a text", reason="bad_task", default="")


@dataclass(frozen=True, slots=True, kw_only=True)
class TalkRow(ChatRow):
    """A conversation about pictures or about a video."""

    pictures: tuple[str, ...] = column(
        "input_img", "image", read=as_files, form=PICTURES, reason="bad_image_list", default=()
    )
    video: tuple[str, ...] = column(
        "video", read=as_files, form='a file, a folder ("clip/"), or a list of frames', reason="bad_video",
        default=(),
    )  # fmt: skip
    objects: Mapping[str, list[Any]] = column(
        "objects", read=as_objects, form=OBJECTS, reason="bad_objects", default={}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EditRow(ChatRow):
    """A conversation that turns pictures into pictures."""

    inputs: tuple[str, ...] = column("input_img", read=as_files, form=PICTURES, reason="image_count")
    outputs: tuple[str, ...] = column("output_img", read=as_files, form=PICTURES, reason="image_count")
    objects: Mapping[str, list[Any]] = column(
        "objects", read=as_objects, form=OBJECTS, reason="bad_objects", default={}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawRow(ChatRow):
    """A conversation that ends in pictures."""

    outputs: tuple[str, ...] = column(
        "output_img", "input_img", read=as_files, form=PICTURES, reason="image_count"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionRow:
    """What a picture to draw is called."""

    captions: tuple[str, ...] = column(
        "captions",
        read=as_captions,
        form="texts in a list, a dict or a JSON string",
        reason="no_caption",
        default=(),
    )
    caption: str = column("caption", "txt", read=as_text, form="a text", reason="no_caption", default="")


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionedRow(CaptionRow):
    """A picture to draw with its captions (parquet)."""

    image: str = column("image", read=as_file, form="a picture file", reason="missing_image")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsRow:
    """A picture changed step by step (parquet): `instructions[k]` leads from `images[k]` to `images[k + 1]`."""

    images: tuple[str, ...] = column(
        "image_list", read=as_files, form="a list of picture files", reason="bad_image_list"
    )
    instructions: tuple[tuple[str, ...], ...] = column(
        "instruction_list", read=as_steps, form="a list of lists of texts", reason="no_instruction"
    )

    def __post_init__(self) -> None:
        if len(self.images) < 2 or len(self.instructions) < len(self.images) - 1:
            raise SkipSample(
                "image_count",
                f"`image_list` has {len(self.images)} pictures and `instruction_list` {len(self.instructions)} steps; there "
                "must be two pictures or more and a step between each and the next",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneRow:
    """A picture of a COCO file with all that stands there about it."""

    photo: Mapping[Any, Any] = column("image", read=as_fields, form="an object", reason="bad_image_list")
    things: tuple[Mapping[Any, Any], ...] = column(
        "annotations", read=as_list_of_fields, form="a list of objects", reason="no_target"
    )
    categories: Mapping[Any, Any] = column(
        "categories", read=as_fields, form="categories by their ids", reason="unknown_category"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PhotoRow:
    """A picture of a COCO file."""

    file: str = column("file_name", read=as_file, form="a path", reason="bad_image_list")


@dataclass(frozen=True, slots=True, kw_only=True)
class ThingRow:
    """A named thing in a picture: an annotation of a COCO file."""

    names: tuple[str, ...] = column(
        "expressions", read=as_names, form="a list of texts that name the thing", reason="no_expression"
    )
    category: int | str = column(
        "category_id", read=as_key, form="a category's id", reason="unknown_category"
    )
    box: tuple[float, float, float, float] | None = column(
        "bbox", read=as_box, form="four numbers x, y, width, height", reason="bad_box", default=None
    )
    mask: Any = column("segmentation", read=as_it_is, form="RLE or polygons", reason="bad_mask", default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferRow:
    """A named thing in a picture: a row of a RefCOCO-like file."""

    file: str = column("img_path", "image", read=as_file, form="a path", reason="bad_image_list")
    names: tuple[str, ...] = column(
        "expression",
        "expressions",
        read=as_name_or_names,
        form="a text, or a list of wordings",
        reason="no_expression",
    )
    box: tuple[float, float, float, float] | None = column(
        "bbox", read=as_box, form="four numbers", reason="bad_box", default=None
    )
    mask: Any = column(
        "mask", "segmentation", read=as_it_is, form="RLE or polygons", reason="bad_mask", default=None
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureRow:
    """Something about one picture: the beginning of a row of a Shikra-style file."""

    file: str = column(
        "img_path", "image_path", "image", read=as_file, form="a path", reason="bad_image_list"
    )
    boxes: tuple[tuple[float, float, float, float], ...] = column(
        "boxes", "bbox", read=as_boxes, form="four numbers, or a list of such", reason="bad_box", default=()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpressionRow(PictureRow):
    """Words for things, and where these are: for REC, RES, REG and captions of regions."""

    names: tuple[str, ...] = column(
        "expression", "expressions", read=as_name_or_names, form="a text, or a list of wordings",
        reason="no_expression",
    )  # fmt: skip
    mask: Any = column(
        "mask", "segmentation", read=as_it_is, form="RLE or polygons", reason="bad_mask", default=None
    )
    masks: tuple[Any, ...] = column(
        "masks", read=as_several, form="a list of RLE or polygons", reason="bad_mask", default=()
    )
    absent: bool = column("absent", read=as_flag, form="true or false", reason="no_expression", default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionRow(PictureRow):
    """A question and its answer, both of which may have `<boxes>`; `*_boxes_seq` says which for each of them."""

    question: str = column("question", read=as_text, form="a text", reason="bad_message")
    answer: str = column(
        "cot_with_ans", "answer", "annotation", read=as_answer,
        form='a text, or {"multiple_choice_answer": text}', reason="bad_message",
    )  # fmt: skip
    asked_places: tuple[tuple[int, ...], ...] = column(
        "question_boxes_seq", read=as_places, form="a list of lists of places in `boxes`",
        reason="object_count", default=(),
    )  # fmt: skip
    answered_places: tuple[tuple[int, ...], ...] = column(
        "answer_boxes_seq", read=as_places, form="a list of lists of places in `boxes`",
        reason="object_count", default=(),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SpotRow(PictureRow):
    """A caption that says of its phrases, marked by `<ph_st>` and `<ph_ed>`, where they are."""

    sentence: str = column("sentence", read=as_text, form="a text", reason="no_caption")
    places: tuple[tuple[int, ...], ...] = column(
        "boxes_seq", read=as_places, form="a list of lists of places in `boxes`", reason="object_count"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureCaptionRow(PictureRow):
    """A picture's caption."""

    caption: str = column("caption", read=as_text, form="a text", reason="no_caption")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanRow:
    """A medical picture: the image of a COCO file, or the beginning of a row."""

    file: str = column("file_name", "image", "img_path", read=as_file, form="a path", reason="bad_image_list")
    modality: str = column("modality", read=as_text, form="a text", reason="bad_task", default="")
    patient: str = column("patient_id", read=as_id, form="a text or a number", reason="bad_task", default="")
    slice_idx: int | None = column(
        "slice_idx", read=as_count, form="a whole number from 0", reason="bad_slice", default=None
    )
    spacing: tuple[float, float] | None = column(
        "spacing", read=as_spacing, form="[rows, columns] in mm", reason="bad_slice", default=None
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FindingsRow:
    """What is found in a medical picture."""

    labels: tuple[str, ...] = column(
        "labels", "label", read=as_name_or_names, form="a text, or one per finding", reason="no_expression"
    )
    boxes: tuple[tuple[float, float, float, float], ...] = column(
        "boxes", "bbox", read=as_boxes, form="x, y, width, height, or a list of such", reason="bad_box",
        default=(),
    )  # fmt: skip
    masks: tuple[Any, ...] = column(
        "masks", read=as_several, form='a list of RLE, polygons or {"volume": file, "label": number}',
        reason="bad_mask", default=(),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasonRow:
    """A picture of a ReasonSeg folder."""

    file: str = column("image", read=as_file, form="a path", reason="bad_image_list")
    texts: tuple[str, ...] = column(
        "text", read=as_name_or_names, form="a text, or a list of wordings", reason="no_expression"
    )
    is_sentence: bool = column(
        "is_sentence", read=as_flag, form="true or false", reason="no_expression", default=True
    )
    shapes: tuple[tuple[str, list[Any]], ...] = column(
        "shapes", read=as_shapes, form='a list of {"label": text, "points": [[x, y], …]}', reason="bad_mask"
    )
