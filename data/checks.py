"""The table of checks: every kind of fault that `python -m data.check` names, how bad it is and what to do about it.

A check is one row of `CHECKS`. Three sorts stand there: records that the trainer would reject (the row lists the `SkipSample`
reasons), records that it would train although something is wrong (the row has a function that finds it in a `Look`), and
faults of a whole group or of the mixture (found by `data/check.py`, which sees all of it).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from data.conversation import IMAGE
from data.dataset_base import RECORD_ERRORS, TaskDataset
from data.perception_dataset import ReferDataset
from data.rows import as_box, as_objects
from data.sources import Record, SkipSample
from data.tokens import Tokenizer
from data.types import Sample

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""`error`: left out of training, or stops it; `warning`: trained, and probably wrong; `note`: good to know, no fault."""

FRACTION = 1.0 + 1e-6
"""Boxes whose numbers are all at most this are fractions of the picture, not pixels."""

THOUSANDTHS = 1000.0
"""Some models write boxes in thousandths of the picture's sides."""

FAR_OUTSIDE = 1.5
"""A box that reaches beyond this many widths or heights is in another scale, not badly drawn."""

SLIP_PX = 1.0
"""Annotation tools round: a corner this far over the edge is no fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A picture as its file has it.

    Attributes:
        size: width and height; (0, 0) if it does not decode.
        orientation: of EXIF; 1 = as stored.
        mode: Pillow's name for what a pixel is; "" if it does not decode.
        digest: 64 bits of the file's bytes.
    """

    size: tuple[int, int]
    orientation: int
    mode: str
    digest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One record, and what became of it.

    Attributes:
        record: what the source gave.
        dataset: of its group.
        pictures: by name, those that were read.
        sample: what the dataset class made of it; None if it was rejected.
        tokens: of the sample.
        longest: tokens of the longest sample that can be used.
        tokenizer: of the model.
    """

    record: Record
    dataset: TaskDataset
    pictures: Mapping[str, Seen]
    sample: Sample | None
    tokens: int
    longest: int
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One kind of fault.

    Attributes:
        severity: see `SEVERITIES`.
        title: what is found, for people.
        remedy: what to do.
        reasons: of rejected records.
        find: says what is wrong with a record, if anything.
        instead_of: kinds that say the same less well; they are not told of a record that has this one.
    """

    severity: Severity
    title: str
    remedy: str
    reasons: tuple[str, ...] = ()
    find: Callable[[Look], str | None] | None = None
    instead_of: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------ boxes in rows


def raw_boxes(look: Look) -> list[tuple[str, tuple[float, ...], tuple[int, int]]]:
    """What each box is, its corners as the row has them, and the size of its picture.

    A row that breaks its schema gives none: that is another fault.
    """
    try:
        boxes = _boxes_of_things(look) if isinstance(look.dataset, ReferDataset) else _boxes_of_objects(look)
        return [(what, box, size) for what, box, size in boxes if all(size) and all(map(isfinite, box))]
    except (SkipSample, *RECORD_ERRORS):
        return []


def _boxes_of_things(look: Look) -> Iterator[tuple[str, tuple[float, ...], tuple[int, int]]]:
    assert isinstance(look.dataset, ReferDataset)
    file, things = look.dataset.read(look.record)
    for thing in things:
        if thing.box is not None and file in look.pictures:
            yield thing.what, thing.box, look.pictures[file].size


def _boxes_of_objects(look: Look) -> Iterator[tuple[str, tuple[float, ...], tuple[int, int]]]:
    row = look.record.data
    if not row.get("objects"):
        return
    objects = as_objects(row["objects"])
    names = [name for name, _ in _named_pictures(row, ("input_img", "image"))]
    for k, box in enumerate(objects.get("bbox", [])):
        picture = names[(objects["image"][k] if "image" in objects else 0) or 0]
        if box is not None and picture in look.pictures:
            yield f"object {k}", as_box(box), look.pictures[picture].size


def _named_pictures(row: Mapping[str, Any], keys: tuple[str, ...]) -> list[tuple[str, Any]]:
    """Name and entry of the pictures under the first of the keys that the row has."""
    value: Any = next((row[key] for key in keys if row.get(key)), [])
    entries = value if isinstance(value, list) else [value]
    named = ((e.get("path", e.get("file_name")) if isinstance(e, dict) else e, e) for e in entries)
    return [(name, entry) for name, entry in named if isinstance(name, str)]


def box_scale(look: Look) -> str | None:
    boxes = raw_boxes(look)
    if not boxes:
        return None
    largest = max(v for _, box, _ in boxes for v in box)
    what, box, (width, height) = boxes[0]
    if largest <= FRACTION:
        return f"{what}: {_corners(box)} looks like fractions of the {width}x{height} picture, pixels are expected"
    for what, box, (width, height) in boxes:
        far = max(box[2] / width, box[3] / height) > FAR_OUTSIDE
        if far and largest <= THOUSANDTHS and min(box) >= 0:
            return f"{what}: {_corners(box)} looks like thousandths of the {width}x{height} picture, pixels are expected"
    return None


def box_corners(look: Look) -> str | None:
    for what, box, _ in raw_boxes(look):
        if box[2] <= box[0] or box[3] <= box[1]:
            return (
                f"{what}: {_corners(box)} has its second corner before its first; is it x, y, width, height?"
            )
    return None


def box_outside(look: Look) -> str | None:
    if box_scale(look) or box_corners(look):
        return None
    for what, box, (width, height) in raw_boxes(look):
        over = max(-box[0], -box[1], box[2] - width, box[3] - height)
        if over > SLIP_PX:
            return (
                f"{what}: {_corners(box)} reaches {over:g} px out of the {width}x{height} picture; it is cut"
            )
    return None


def _corners(box: Sequence[float]) -> str:
    return f"[{', '.join(f'{v:g}' for v in box)}]"


# --------------------------------------------------------------------------------------------- pictures of rows


def declared_size(look: Look) -> str | None:
    row = look.record.data
    for keys in (("input_img", "image"), ("output_img",)):
        for name, entry in _named_pictures(row, keys):
            seen = look.pictures.get(name)
            declared = (entry.get("width"), entry.get("height")) if isinstance(entry, dict) else (None, None)
            if seen and all(seen.size) and None not in declared and declared != seen.size:
                return f"{name} is {seen.size[0]}x{seen.size[1]} px, the row says {declared[0]}x{declared[1]}"
    return None


def pair_size(look: Look) -> str | None:
    if look.sample is None:
        return None
    hw = {
        kind: {tuple(s.pixels.shape[1:]) for s in look.sample.segments if s.kind == kind}
        for kind in ("cond_image", "gen_image")
    }
    if not hw["cond_image"] or not hw["gen_image"] or hw["cond_image"] == hw["gen_image"]:
        return None
    given, wanted = (", ".join(f"{w}x{h}" for h, w in sorted(sizes)) for sizes in hw.values())
    return f"the model gets an input of {given} px and a target of {wanted} px"


def exif_rotation(look: Look) -> str | None:
    for name, seen in look.pictures.items():
        if seen.orientation != 1:
            return f"{name} is stored turned (EXIF orientation {seen.orientation}); it is trained as stored"
    return None


def deep_picture(look: Look) -> str | None:
    for name, seen in look.pictures.items():
        if seen.mode.startswith(("I", "F")):
            return f"{name} has numbers beyond 8 bits (mode {seen.mode}); every one above 255 is trained as white"
    return None


def blank_picture(look: Look) -> str | None:
    segments = look.sample.segments if look.sample else ()
    # An edit may wipe a picture; what it starts from, and what is drawn from words alone, should show something.
    given = [s for s in segments if s.kind in ("und_image", "cond_image")]
    for segment in given or [s for s in segments if s.kind == "gen_image"]:
        if bool((segment.pixels == segment.pixels[:, :1, :1]).all()):
            height, width = segment.pixels.shape[1:]
            return f"the {segment.kind} of {width}x{height} px has one colour only"
    return None


# ------------------------------------------------------------------------------------------------ texts of rows


def framing_token(look: Look) -> str | None:
    special = look.tokenizer.special
    framing = {special.begin, special.end, special.image_start, special.image_end}
    for segment in look.sample.segments if look.sample else ():
        if segment.kind == "text" and framing.intersection(segment.ids.tolist()):
            text = look.tokenizer.decode(segment.ids, keep_special=True)
            return f"{text[:60]!r} writes a token that frames texts or pictures"
    return None


def over_budget(look: Look) -> str | None:
    if look.tokens <= look.longest:
        return None
    return f"{look.tokens:,} tokens, the limit is {look.longest:,}"


# ---------------------------------------------------------------------------------------------------- the table

CHECKS: Mapping[str, Check] = {
    # What is wrong with the mixture itself.
    "unknown_dataset": Check(
        severity="error",
        title="data sets that nothing locates",
        remedy="correct the name in dataset_names, or add it to dataset_info",
    ),
    "wrong_weight": Check(
        severity="error", title="weights that are no weights", remedy="write a number from 0"
    ),
    "wrong_count": Check(
        severity="error",
        title="num_used_data that cannot be read",
        remedy="write one count per name (0 = all), or {name: [start, end]}",
    ),
    "bad_key": Check(
        severity="error",
        title="keys of the mixture that do not fit",
        remedy="correct the key in the YAML; the message names the nearest one",
    ),
    "missing_source": Check(
        severity="error",
        title="data files that are missing, empty or unreadable",
        remedy="correct the path in dataset_info, or restore the file",
    ),
    "transform": Check(
        severity="error",
        title="picture sizes that the model cannot take",
        remedy="set image_stride and max_image_size of the group's transform as the model needs them",
    ),
    "too_many_rejects": Check(
        severity="error",
        title="groups of which too many records are unusable: training would stop",
        remedy="mend the records named below, or raise --max_reject_fraction",
    ),
    # What the trainer rejects.
    "bad_json": Check(
        severity="error",
        title="lines, members or cells that do not parse",
        remedy="correct or remove them; if they were cut short, fetch the file again",
        reasons=("bad_json", "bad_entry", "bad_row_group", "bad_tar", "missing_file"),
    ),
    "schema": Check(
        severity="error",
        title="rows that break their schema",
        remedy="write the row as the dataset class documents it",
        reasons=(
            "bad_message",
            "bad_image_list",
            "bad_objects",
            "bad_row",
            "bad_size",
            "bad_slice",
            "bad_task",
            "bad_text",
            "bad_video",
            "broken_record",
            "no_caption",
            "no_expression",
            "no_features",
            "no_instruction",
            "no_label",
            "too_many_objects",
            "video_count",
            "unknown_category",
            "unknown_label",
        ),
    ),
    "missing_picture": Check(
        severity="error",
        title="pictures or videos that are missing",
        remedy="restore the files, correct data_dir, or remove the rows",
        reasons=("missing_image", "missing_video"),
    ),
    "bad_picture": Check(
        severity="error",
        title="pictures that are truncated or no pictures",
        remedy="fetch the files again, or remove the rows",
        reasons=("bad_image",),
    ),
    "too_large": Check(
        severity="error",
        title="pictures or records larger than may be read",
        remedy="make them smaller; a small file that claims a huge picture is damaged or hostile",
        reasons=("too_large",),
    ),
    "unsafe_path": Check(
        severity="error",
        title="names that lead out of the data directory or the archive",
        remedy="name files relative to data_dir and below it; write such shards again",
        reasons=("unsafe_path", "unsafe_member"),
    ),
    "image_count": Check(
        severity="error",
        title=f"rows with another number of {IMAGE} than of pictures",
        remedy=f"write one {IMAGE} per picture, or none",
        reasons=("image_count",),
    ),
    "object_count": Check(
        severity="error",
        title="rows with another number of <BOX> or <SEG> than of objects",
        remedy="write one <BOX> or <SEG> in the answers per object",
        reasons=("object_count", "object_image"),
    ),
    "nothing_to_learn": Check(
        severity="error",
        title="rows without an answer, a target picture or a region",
        remedy="give the row an answer, or remove it",
        reasons=("no_target",),
    ),
    "bad_box": Check(
        severity="error",
        title="boxes that are no boxes, or have no area inside their picture",
        remedy="correct or remove the box",
        reasons=("bad_box",),
    ),
    "bad_mask": Check(
        severity="error",
        title="masks that cannot be decoded",
        remedy="write COCO's RLE or polygons",
        reasons=("bad_mask",),
    ),
    "empty_mask": Check(
        severity="error",
        title="masks without a pixel",
        remedy="remove the object; if it is lost in the resize, raise max_image_size",
        reasons=("empty_mask",),
    ),
    "mask_size": Check(
        severity="error",
        title="masks made for a picture of another size",
        remedy="make the mask again from the picture that the row names",
        reasons=("mask_size",),
    ),
    "over_budget": Check(
        severity="error",
        title="samples longer or costlier than the limit",
        remedy="raise --max_num_tokens_per_sample (or --max_attention_pairs), or lower max_image_size or max_turns",
        reasons=("too_long", "too_costly"),
        find=over_budget,
    ),
    "unusable": Check(
        severity="error",
        title="records rejected for another reason",
        remedy="the message says what is wrong",
    ),
    # What would be trained although it is wrong.
    "leaked_picture": Check(
        severity="error",
        title="pictures that both mixtures have",
        remedy="split by picture before making rows, and make the files again",
    ),
    "leaked_patient": Check(
        severity="error",
        title="patients that both mixtures have",
        remedy="split by patient before making rows: slices and visits of one patient belong together",
    ),
    "box_scale": Check(
        severity="error",
        title="boxes in another scale than pixels",
        remedy="multiply by the picture's width and height (and divide thousandths by 1000)",
        find=box_scale,
        instead_of=("bad_box",),
    ),
    "box_corners": Check(
        severity="error",
        title="boxes whose corners are in the wrong order",
        remedy="write objects as x0, y0, x1, y1; COCO annotations as x, y, width, height",
        find=box_corners,
        instead_of=("bad_box",),
    ),
    "box_outside": Check(
        severity="warning",
        title="boxes that reach out of their picture",
        remedy="correct the box, or see whether the picture was resized or cropped after it was annotated",
        find=box_outside,
        instead_of=("bad_box",),
    ),
    "declared_size": Check(
        severity="warning",
        title="pictures of another size than the row says",
        remedy="see whether the picture was resized after it was annotated: boxes and masks would be off",
        find=declared_size,
    ),
    "pair_size": Check(
        severity="warning",
        title="edits whose input and output differ in size",
        remedy="write both pictures in one size",
        find=pair_size,
    ),
    "leaked_text": Check(
        severity="warning",
        title="conversations without pictures that both mixtures have",
        remedy="remove them from one of the two",
    ),
    "framing_token": Check(
        severity="warning",
        title="texts that write the model's own framing tokens",
        remedy="remove them: the layout sets them itself",
        find=framing_token,
    ),
    "exif_rotation": Check(
        severity="warning",
        title="pictures stored turned",
        remedy="turn the pixels (PIL.ImageOps.exif_transpose) and save the file again",
        find=exif_rotation,
    ),
    "deep_picture": Check(
        severity="warning",
        title="pictures of more than 8 bits a value, as scanners write them: all but the darkest values become white",
        remedy="choose a window, map it to 0 to 255 and save 8-bit files",
        find=deep_picture,
        instead_of=("blank_picture",),
    ),
    "blank_picture": Check(
        severity="warning",
        title="pictures of one colour",
        remedy="see whether the file was made from missing data",
        find=blank_picture,
    ),
    "duplicate_row": Check(
        severity="warning",
        title="rows that stand twice in a group, same texts and same pictures",
        remedy="remove one of them",
    ),
    "no_effect": Check(
        severity="warning",
        title="keys of the mixture that do not do what they seem to",
        remedy="remove the key, or complete it",
    ),
    "short_source": Check(
        severity="warning",
        title="data sets with fewer records or files than num_used_data asks for",
        remedy="lower num_used_data, or give the data set what is missing",
    ),
    "tiny_group": Check(
        severity="warning",
        title="groups with fewer records than lanes: they repeat within a step or two",
        remedy="lower the weight, add records, or lower --num_lanes",
    ),
    # What is good to know.
    "never_drawn": Check(
        severity="note", title="groups of weight 0", remedy="remove the group, or give it a weight"
    ),
    "repeated_text": Check(
        severity="note",
        title="conversations without pictures that stand several times in a group",
        remedy="remove the copies if they are not meant to weigh more",
    ),
}
"""Kind -> what it is. Of one severity, the first row is the worst."""

_KIND_OF_REASON: Mapping[str, str] = {reason: kind for kind, c in CHECKS.items() for reason in c.reasons}


def kind_of(reason: str) -> str:
    """The kind of a rejected record's fault."""
    return _KIND_OF_REASON.get(reason, "unusable")


def find_faults(look: Look, rejected: tuple[str, str] | None) -> dict[str, str]:
    """What is wrong with one record: kind -> message.

    Args:
        look: the record.
        rejected: reason and message, if it gave no sample.
    """
    found: dict[str, str] = {}
    if rejected is not None:
        found[kind_of(rejected[0])] = rejected[1]
    for kind, check in CHECKS.items():
        message = check.find(look) if check.find else None
        if message is not None:
            found[kind] = message
    for kind in tuple(found):
        for other in CHECKS[kind].instead_of:
            found.pop(other, None)
    return found
