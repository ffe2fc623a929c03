"""Messages with `<image>` -> segments: the one place that knows in which order a conversation's texts and pictures stand.

A row's `message` (or LLaVA's `conversations`) becomes `Turn`s (`data/rows.py`), turns and pictures become `Segment`s and
`Region`s. Dataset classes call `build_sample`; inference calls `prompt_segments` (or the two makers of single segments, when it
feeds them one by one), which go through the same code, so that a prompt is exactly the beginning of a training sample.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image
from torch import Tensor

from data.dataset_base import SkipSample, Transform
from data.rgb_image import RgbImage
from data.tokens import ANCHORS, Tokenizer
from data.types import EMPTY_MASK, EMPTY_PIXELS, NO_BOXES, Kind, Region, Sample, Segment

IMAGE = "<image>"
VIDEO = "<video>"
HEADS = {token: head for head, token in ANCHORS.items()}
_LEADING_IMAGES = re.compile(rf"(\s*{IMAGE})*\s*")
_ANCHOR = re.compile("|".join(re.escape(token) for token in HEADS))

Role = Literal["human", "gpt"]
Picture = tuple[Segment, ...]
"""The segments one picture gives: `(und,)`, `(cond, und)` or `(gen,)`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a `<BOX>` or `<SEG>` stands for, while its place in the sample is not known yet.

    Attributes:
        head: the perception head (`box`, `mask`).
        name: what it is, for people.
        image: which of the row's pictures, counted from 0.
        boxes: `k 4` xyxy in [0, 1]; one for a `<BOX>`.
        mask: `hh ww` uint8 0/1 of the transformed picture.
    """

    head: str
    name: str = ""
    image: int = 0
    boxes: Tensor = NO_BOXES
    mask: Tensor = EMPTY_MASK


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one side says. `targets` belong to the `<BOX>` and `<SEG>` of the text, in order."""

    role: Role
    text: str
    targets: tuple[Target, ...] = ()


def image_segment(
    kind: Kind,
    image: RgbImage | Image.Image,
    transform: Transform | None,
    num_images: int = 1,
    *,
    droppable: bool = False,
    view: Transform | None = None,
) -> Segment:
    """A picture in one role, in the transform of its tower.

    Args:
        kind: its role.
        image: the original.
        transform: the ViT's for `und_image`, the VAE's for the others; a class that uses one lists it in `needs`.
        num_images: how many pictures the sample has.
        droppable: may be left out by condition dropout.
        view: of an `und_image`, the transform of an image encoder inside a head (`TaskDataset.head_transform`).
    """
    assert transform is not None, "TaskDataset.needs lists what a class uses; the YAML is checked against it"
    return Segment(
        kind=kind,
        pixels=transform(image, num_images),
        view=EMPTY_PIXELS if view is None else view(image),
        droppable=droppable,
    )


def text_segments(
    text: str, tokenizer: Tokenizer, *, supervised: bool = False, droppable: bool = False
) -> tuple[Segment, ...]:
    """A text as it stands in a sample: a question is stripped, an answer is not, and a blank text is no segment."""
    if not text.strip():
        return ()
    ids = tokenizer.encode(text if supervised else text.strip())
    return (Segment(kind="text", ids=ids, supervised=supervised, droppable=droppable),)


def require_draws(draws: int) -> int:
    """A dataset's option `draws`: how often each picture to draw stands in a sample.

    Raises:
        ValueError: if it is not a positive whole number.
    """
    if not isinstance(draws, int) or isinstance(draws, bool) or draws < 1:
        raise ValueError(f"draws must be a whole number of at least 1, not {draws!r}")
    return draws


def answered_heads(turns: Iterable[Turn]) -> tuple[str, ...]:
    """The heads of the `<BOX>` and `<SEG>` of the answers, in order."""
    return tuple(HEADS[token] for turn in turns if turn.role == "gpt" for token in _ANCHOR.findall(turn.text))


def attach_targets(turns: Iterable[Turn], targets: Mapping[str, Sequence[Target]]) -> tuple[Turn, ...]:
    """Give every `<BOX>` and `<SEG>` of the answers the next target of its head.

    Raises:
        SkipSample: `object_count` if there are more of one than of the other.
    """
    waiting = {head: iter(targets.get(head, ())) for head in ANCHORS}
    attached = []
    for turn in turns:
        taken = tuple(_next_target(waiting[head], turn.text) for head in answered_heads([turn]))
        attached.append(replace(turn, targets=taken))
    for head, rest in waiting.items():
        if more := len(list(rest)):
            raise SkipSample(
                "object_count", f"the row has {more} more objects than the answers have {ANCHORS[head]}"
            )
    return tuple(attached)


def lead_with_images(turns: Sequence[Turn], count: int) -> tuple[Turn, ...]:
    """Put `count` placeholders before the first turn, unless some human turn has its own."""
    if any(IMAGE in turn.text for turn in turns if turn.role == "human"):
        return tuple(turns)
    return (replace(turns[0], text=IMAGE * count + turns[0].text), *turns[1:])


def end_with_images(turns: Sequence[Turn], count: int) -> tuple[Turn, ...]:
    """Put `count` placeholders after the last answer, unless some answer has its own."""
    if any(IMAGE in turn.text for turn in turns if turn.role == "gpt"):
        return tuple(turns)
    *before, last = _with_an_answer(turns)
    return (*before, replace(last, text=last.text + IMAGE * count))


def draw_before_the_answer(turns: Sequence[Turn], count: int) -> tuple[Turn, ...]:
    """Put `count` placeholders before the last answer, wherever the answers had theirs."""
    bare = without_images(turns, "gpt")
    *before, last = _with_an_answer(bare)
    return (*before, replace(last, text=IMAGE * count + last.text))


def without_images(turns: Sequence[Turn], role: Role) -> tuple[Turn, ...]:
    """One side's texts without placeholders."""
    return tuple(
        replace(t, text=t.text.replace(IMAGE, " ")) if t.role == role and IMAGE in t.text else t
        for t in turns
    )


def show_frames(turns: Sequence[Turn], count: int) -> tuple[Turn, ...]:
    """Put `count` `<image>`s in the place of the human turns' `<video>`.

    Raises:
        SkipSample: `video_count` if there is none, or more than one.
    """
    places = sum(turn.text.count(VIDEO) for turn in turns if turn.role == "human")
    if places != 1:
        raise SkipSample("video_count", f"the human turns have {places} {VIDEO}, the row has one video")
    return tuple(
        replace(t, text=t.text.replace(VIDEO, IMAGE * count)) if t.role == "human" else t for t in turns
    )


def _with_an_answer(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    return tuple(turns) if turns[-1].role == "gpt" else (*turns, Turn(role="gpt", text=""))


def choose_exchanges(
    turns: Sequence[Turn], rng: np.random.Generator, *, shuffle: bool, max_exchanges: int = 0
) -> tuple[Turn, ...]:
    """Some of a conversation's question-and-answer exchanges, which must not lean on each other.

    Pictures at the beginning of the first question stay at the beginning. A conversation with pictures elsewhere is given
    back as it is.

    Args:
        turns: the whole conversation.
        rng: decides which and in which order.
        shuffle: in random order, not in theirs.
        max_exchanges: how many at most; 0 = all.
    """
    opening = _LEADING_IMAGES.match(turns[0].text)
    assert opening  # matches the empty text
    leading, body = IMAGE * opening.group().count(IMAGE), turns[0].text[opening.end() :]
    free = (replace(turns[0], text=body), *turns[1:])
    if turns[0].role != "human" or any(IMAGE in turn.text for turn in free):
        return tuple(turns)

    starts = [
        i for i, turn in enumerate(free) if turn.role == "human" and (i == 0 or free[i - 1].role == "gpt")
    ]
    exchanges = [free[a:b] for a, b in zip(starts, [*starts[1:], len(free)], strict=True)]
    order = rng.permutation(len(exchanges))[: max_exchanges or None]
    if not shuffle:
        order = np.sort(order)
    first, *rest = (turn for i in order for turn in exchanges[i])
    return (replace(first, text=leading + first.text), *rest)


def build_sample(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    *,
    images: Sequence[Picture] = (),
    drawn: Sequence[Picture] = (),
    drop_text: bool = False,
    independent: bool = False,
    task: str,
) -> Sample:
    """A conversation as a sample.

    Args:
        turns: what is said; human placeholders take from `images`, those of the answers from `drawn`.
        tokenizer: of the model.
        images, drawn: what each picture emits.
        drop_text: human texts may be left out by condition dropout.
        independent: the exchanges see the pictures before the first question but not each other: each has a branch of its own.
        task: for logs and for the table of a pack.

    Raises:
        SkipSample: `image_count`, `object_count`, or `no_target` if nothing of the sample could be learnt.
        ValueError: if the tokenizer has no token for a target's head.
    """
    segments, regions = _lay_out(turns, tokenizer, images, drawn, drop_text, independent)
    if not any(s.supervised or s.kind == "gen_image" for s in segments):
        raise SkipSample("no_target", "the row has neither an answer nor a picture to draw")
    return Sample(segments=segments, regions=regions, task=task)


def prompt_segments(text: str, tokenizer: Tokenizer, images: Sequence[Picture] = ()) -> tuple[Segment, ...]:
    """The segments of a question, the same as in a training sample; without placeholders the pictures stand first.

    Raises:
        SkipSample: `image_count` if the text has another number of placeholders than there are pictures.
    """
    turns = lead_with_images([Turn(role="human", text=text)], len(images))
    return _lay_out(turns, tokenizer, images, (), drop_text=False)[0]


def _lay_out(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    images: Sequence[Picture],
    drawn: Sequence[Picture],
    drop_text: bool,
    independent: bool = False,
) -> tuple[tuple[Segment, ...], tuple[Region, ...]]:
    _check_placeholders(turns, "human", len(images))
    _check_placeholders(turns, "gpt", len(drawn))
    # One iterator over all turns: the second turn's first placeholder is not the first picture again.
    waiting = {"human": iter(images), "gpt": iter(drawn)}
    segments: list[Segment] = []
    places: list[int] = []  # of each picture's und_image
    anchored: list[tuple[Target, int, int]] = []
    branch = 0
    for turn in turns:
        targets = iter(turn.targets)
        # An answer to pictures without words opens a branch as a question does.
        opening = independent and (turn.role == "human" or not branch)
        if opening and branch:
            branch, opening = branch + 1, False
        for part in _parts(turn):
            if part == IMAGE:
                picture = next(waiting[turn.role])
                if turn.role == "human":
                    kinds = [segment.kind for segment in picture]
                    places.append(len(segments) + kinds.index("und_image") if "und_image" in kinds else -1)
                segments.extend(replace(segment, branch=branch) for segment in picture)
                continue
            if opening and part.strip():
                branch, opening = 1, False  # the pictures before the first question stay in the trunk
            supervised = turn.role == "gpt"
            droppable = drop_text and not supervised
            for segment in text_segments(part, tokenizer, supervised=supervised, droppable=droppable):
                for token in _anchor_places(segment.ids, part, tokenizer):
                    anchored.append((_next_target(targets, part), len(segments), token))
                segments.append(replace(segment, branch=branch))
    return tuple(segments), tuple(_place(*entry, places) for entry in anchored)


def _parts(turn: Turn) -> list[str]:
    """Texts and `<image>`s of a turn in order; a turn without pictures stays as it was written."""
    parts = re.split(f"({IMAGE})", turn.text)
    return parts if len(parts) == 1 else [part.strip() for part in parts]


def _check_placeholders(turns: Sequence[Turn], role: Role, pictures: int) -> None:
    placeholders = sum(turn.text.count(IMAGE) for turn in turns if turn.role == role)
    if placeholders != pictures:
        given = "input" if role == "human" else "output"
        raise SkipSample(
            "image_count",
            f"the {role} turns have {placeholders} {IMAGE}, the row has {pictures} {given} pictures",
        )


def _anchor_places(ids: Tensor, text: str, tokenizer: Tokenizer) -> list[int]:
    heads = [HEADS[token] for token in _ANCHOR.findall(text)]
    for head in heads:
        if head not in tokenizer.special.anchors:
            raise ValueError(
                f"{tokenizer.path}: the vocabulary lacks {ANCHORS[head]}; add it to train the {head} head"
            )
    anchors = set(tokenizer.special.anchors.values())
    return [place for place, token in enumerate(ids.tolist()) if token in anchors]


def _next_target(targets: Iterator[Target], text: str) -> Target:
    target = next(targets, None)
    if target is None:
        raise SkipSample("object_count", f"{text[:60]!r} has a {' or '.join(HEADS)} without an object")
    return target


def _place(target: Target, segment: int, token: int, places: Sequence[int]) -> Region:
    image = places[target.image] if 0 <= target.image < len(places) else -1
    if image < 0:
        raise SkipSample(
            "object_image",
            f"object {target.name!r} lies in picture {target.image}, which the row does not show",
        )
    return Region(
        head=target.head,
        segment=segment,
        token=token,
        image=image,
        boxes=target.boxes,
        mask=target.mask,
        name=target.name,
    )
