"""Everything in a picture: by the text that the model writes, by its detector, or by both; in pixels of the original."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from data.conversation import text_segments
from data.detections import COORDINATES, answer_text, instruction, reading_order, written_box
from data.packing import pack
from data.types import Region, Sample, Segment
from inference_pipeline.box_answers import Parsed, Status, object_spans, parse_boxes
from inference_pipeline.inferencer import Inferencer
from modeling.heads.detr import DetrHead
from train.metrics.boxes import box_iou

Mode = Literal["text", "head", "fused"]
HEAD = "detr"
SAME = 0.5
"""IoU from which a box of the text and one of the head are the same object."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """One object.

    Attributes:
        bbox_2d: xyxy in pixels of the picture as it was given.
        bbox_resized: xyxy in pixels of the picture as the model sees it.
        label: what it is called; "" from a head that says nothing.
        score: in [0, 1]; of a text the mean probability of the tokens that say it.
        source: `text`, `head`, or `fused`: both saw it.
    """

    bbox_2d: Box
    bbox_resized: Box
    label: str
    score: float
    source: Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A picture and what is in it: (xyxy in its pixels, label) each."""

    image: Image.Image
    objects: Sequence[tuple[Box, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What was found in one picture.

    Attributes:
        detections: the surest first.
        size, resized: width and height of the picture as given, and as the model sees it.
        text: what the model wrote; "" of mode `head`.
        status: how that could be read; None of mode `head`.
        dropped: what of it was left out or mended.
        num_tokens: written.
        truncated: it had not ended after `max_new_tokens`.
    """

    detections: Sequence[Detection]
    size: tuple[int, int]
    resized: tuple[int, int]
    text: str = ""
    status: Status | None = None
    dropped: tuple[str, ...] = ()
    num_tokens: int = 0
    truncated: bool = False


@torch.no_grad()
def predict_detection(
    model: Inferencer,
    images: Sequence[Image.Image],
    *,
    mode: Mode = "head",
    prompt: str = "",
    system_prompt: str = "",
    language: str = "english",
    coordinates: str = "pixels",
    teachers: Sequence[Sequence[Demonstration]] = (),
    score_threshold: float = 0.3,
    max_new_tokens: int = 1024,
) -> list[Found]:
    """Find everything in each picture.

    Args:
        model: with a `detr` head for `head` and `fused`.
        images: as they are.
        mode: `text`: what the model writes; `head`: what its detector finds; `fused`: both, see `_fused`.
        prompt, system_prompt, language, coordinates: as in training (`data.detection_dataset.DetectionDataset`).
        teachers: demonstrations before each picture; none, or a list per picture.
        score_threshold: least score of a detection.
        max_new_tokens: of the text.

    Raises:
        ValueError: if the model lacks the head, or `coordinates` is unknown.
    """
    if mode != "text" and HEAD not in model.decoder.model.heads:
        raise ValueError(f"mode {mode}: the model has no {HEAD} head (bagel_config.json); use mode text")
    if coordinates not in COORDINATES:
        raise ValueError(f"coordinates must be one of {', '.join(COORDINATES)}, not {coordinates!r}")
    question = instruction(language, prompt)
    shown = teachers or [()] * len(images)
    prompts = [
        _prompt(model, image, question, system_prompt, coordinates, demonstrations)
        for image, demonstrations in zip(images, shown, strict=True)
    ]
    found = []
    for image, segments in zip(images, prompts, strict=True):
        height, width = segments[-1].pixels.shape[1:]
        by_head = _by_head(model, segments, score_threshold) if mode != "text" else []
        result = Found(detections=(), size=image.size, resized=(width, height))
        by_text: list[_Object] = []
        if mode != "head":
            by_text, result = _by_text(model, segments, coordinates, max_new_tokens, result)
        chosen = _fused(by_head, by_text) if mode == "fused" else by_head or by_text
        kept = sorted((o for o in chosen if o.score >= score_threshold), key=lambda o: -o.score)
        found.append(
            replace(result, detections=tuple(_detection(o, image.size, (width, height)) for o in kept))
        )
    return found


@dataclass(frozen=True, slots=True)
class _Object:
    """xyxy in [0, 1]."""

    box: Box
    label: str
    score: float
    source: Mode


def _prompt(
    model: Inferencer,
    image: Image.Image,
    question: str,
    system_prompt: str,
    coordinates: str,
    teachers: Sequence[Demonstration],
) -> tuple[Segment, ...]:
    """The beginning of a training sample: up to the picture that is looked through."""
    ask = text_segments(question, model.tokenizer)
    segments = list(text_segments(system_prompt, model.tokenizer))
    for teacher in teachers:
        seen = model.picture(teacher.image)
        size = (seen.pixels.shape[2], seen.pixels.shape[1])
        sides = (*teacher.image.size, *teacher.image.size)
        boxes = [
            written_box([v / s for v, s in zip(box, sides, strict=True)], size, coordinates)
            for box, _ in teacher.objects
        ]
        names = [name for _, name in teacher.objects]
        order = reading_order(boxes, names)
        text = answer_text([boxes[i] for i in order], [names[i] for i in order])
        segments += [*ask, seen, *text_segments(text, model.tokenizer)]
    return (*segments, *ask, model.picture(image))


def _by_head(model: Inferencer, segments: Sequence[Segment], threshold: float) -> list[_Object]:
    decoder, place = model.decoder, len(segments) - 1
    region = Region(head=HEAD, segment=place, token=0, image=place)
    sample = Sample(segments=tuple(segments), regions=(region,))
    batch = pack([sample], decoder.spec, decoder.special).to(decoder.device)
    output = decoder.model(batch, decoder.encoder(batch).noised)
    head = decoder.model.heads[HEAD]
    assert isinstance(head, DetrHead)
    inputs = decoder.model.head_inputs(output.hidden[:0], batch.regions[HEAD], output.grids)
    (found,) = head.detections(output.heads[HEAD], inputs, threshold=threshold, end=decoder.special.end)
    return [
        _Object(d.box, model.tokenizer.decode(list(d.ids)).strip(), d.score, "head")
        for d in found
        if d.box[2] > d.box[0] and d.box[3] > d.box[1]
    ]


def _by_text(
    model: Inferencer, segments: Sequence[Segment], coordinates: str, max_new_tokens: int, result: Found
) -> tuple[list[_Object], Found]:
    context = model.decoder.read([segments])
    choose = _Surely()
    (written,) = model.decoder.write(context, max_new_tokens, choose)
    text = model.tokenizer.decode(written.ids, keep_special=True)
    space = {
        "pixels": (float(result.resized[0]), float(result.resized[1])),
        "thousandths": (1000.0, 1000.0),
        "fraction": (1.0, 1.0),
    }[coordinates]
    parsed = parse_boxes(text, space)
    scores = _text_scores(parsed, text, written.ids, choose.probabilities, model.tokenizer.decode)
    sides = (*space, *space)
    objects = [
        _Object(_box(v / s for v, s in zip(o.box, sides, strict=True)), o.label, score, "text")
        for o, score in zip(parsed.objects, scores, strict=True)
    ]
    read = replace(
        result,
        text=text,
        status=parsed.status,
        dropped=parsed.dropped,
        num_tokens=len(written.ids),
        truncated=not written.finished,
    )
    return objects, read


class _Surely:
    """Greedy, and remembers how probable each token was."""

    def __init__(self) -> None:
        self.probabilities: list[float] = []

    def __call__(self, logits: Tensor, sequences: Sequence[int]) -> Tensor:
        p, chosen = logits.float().softmax(-1).max(-1)
        self.probabilities.append(float(p[0]))
        return chosen


def _text_scores(
    parsed: Parsed,
    text: str,
    ids: Sequence[int],
    probabilities: Sequence[float],
    decode: Callable[..., str],
) -> list[float]:
    """Of each object the geometric mean of its tokens' probabilities; where its place is not known, that of the whole answer.

    An object that says its own score keeps it.
    """
    logs = torch.tensor(probabilities[: len(ids)]).clamp(min=1e-9).log()
    ends = [len(decode(list(ids[: i + 1]), keep_special=True)) for i in range(len(ids))]
    starts = [0, *ends[:-1]]
    spans = object_spans(text)
    known = len(spans) == len(parsed.objects)
    scores = []
    for number, found in enumerate(parsed.objects):
        if found.score is not None:
            scores.append(min(max(float(found.score), 0.0), 1.0))
            continue
        low, high = spans[number] if known else (0, len(text))
        own = [i for i in range(len(ids)) if starts[i] < high and ends[i] > low]
        scores.append(float(logs[own].mean().exp()) if own else 0.0)
    return scores


def _fused(by_head: Sequence[_Object], by_text: Sequence[_Object]) -> list[_Object]:
    """Objects that both saw: the head's box, the text's name, and a score that is above either (one minus both doubts).

    What only one of them saw stays as it is.
    """
    rest, together = list(by_text), []
    for seen in sorted(by_head, key=lambda o: -o.score):
        best = max(rest, key=lambda o: box_iou(o.box, seen.box), default=None)
        if best is None or box_iou(best.box, seen.box) < SAME:
            together.append(seen)
            continue
        rest.remove(best)
        score = 1 - (1 - seen.score) * (1 - best.score)
        together.append(_Object(seen.box, best.label or seen.label, score, "fused"))
    return [*together, *rest]


def _detection(found: _Object, size: tuple[int, int], resized: tuple[int, int]) -> Detection:
    return Detection(
        bbox_2d=_scaled(found.box, size),
        bbox_resized=_scaled(found.box, resized),
        label=found.label,
        score=found.score,
        source=found.source,
    )


def _scaled(box: Box, size: tuple[int, int]) -> Box:
    return _box(v * s for v, s in zip(box, (*size, *size), strict=True))


def _box(values: Iterable[float]) -> Box:
    x1, y1, x2, y2 = values
    return x1, y1, x2, y2
