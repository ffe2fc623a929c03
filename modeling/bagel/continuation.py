"""A training sample, up to where the model has to say or draw something, and what it says or draws there.

The parts before come from the sample itself, so a question, a picture to edit or a caption is laid out as in training.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from data.types import Sample, Segment
from modeling.bagel.choice import Choose, likeliest
from modeling.bagel.decode import Decoder, DrawOptions, without_last_text
from modeling.types import HeadOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """What the model made of one sample; empty where the sample asks for nothing of the kind.

    Attributes:
        ids: of the text that it wrote in place of `target_ids`, without begin and end.
        target_ids: of the sample's first supervised text.
        heads: name and output of one perception head per anchor that it wrote.
        drawn, target: `3 hh ww` uint8, what it drew in place of the sample's first target picture, and that picture.
    """

    ids: list[int] = field(default_factory=list)
    target_ids: list[int] = field(default_factory=list)
    heads: Sequence[tuple[str, HeadOutput]] = ()
    drawn: Tensor | None = None
    target: Tensor | None = None


def can_be_continued(sample: Sample) -> bool:
    """Whether `continue_sample` knows all of its kinds: a video's frames share a split, which is not read one by one."""
    return not any(s.same_split for s in sample.segments)


def continue_sample(
    decoder: Decoder,
    sample: Sample,
    options: DrawOptions,
    *,
    seed: int,
    max_new_tokens: int,
    choose: Choose = likeliest,
) -> Continuation:
    """Let the model write the sample's first answer, and draw its first target picture.

    Args:
        decoder: of the model.
        sample: one of which `can_be_continued`; of its branches the one that the target is on is read.
        options: steps and guidance of a picture; image guidance is not given.
        seed: of the picture's noise.
        max_new_tokens: most tokens of the answer.
        choose: logits -> next ids. Where ranks share the model, all of them have to choose the same.
    """
    result = Continuation()
    drawing = next((i for i, s in enumerate(sample.segments) if s.kind == "gen_image"), None)
    writing = next((i for i, s in enumerate(sample.segments) if s.supervised), None)
    # What follows a target picture is laid out behind it, and the picture itself is seen by nobody: such texts are not asked for.
    if writing is not None and (drawing is None or writing < drawing):
        context = decoder.read([before(sample, writing)])
        written = decoder.write(context, max_new_tokens, choose)
        result = replace(
            result,
            ids=written[0].ids,
            target_ids=sample.segments[writing].ids.tolist(),
            heads=decoder.perceive(context, written)[0],
        )
    if drawing is not None:
        target = sample.segments[drawing].pixels
        given = before(sample, drawing)
        without_text = decoder.read([without_last_text(given)]) if options.num_contexts > 1 else None
        size = (target.shape[1], target.shape[2])
        drawn = decoder.draw(decoder.read([given]), [size], [seed], options, without_text)
        result = replace(result, drawn=drawn[0].cpu(), target=target)
    return result


def before(sample: Sample, at: int) -> tuple[Segment, ...]:
    """What a segment of a sample follows: the trunk and its own branch, as given; target pictures are seen by nobody."""
    branch = sample.segments[at].branch
    return tuple(
        replace(s, supervised=False, branch=0)
        for s in sample.segments[:at]
        if s.branch in (0, branch) and s.kind != "gen_image"
    )
