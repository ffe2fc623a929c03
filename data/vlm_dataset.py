"""Pictures or a video and a conversation about them: rows of message JSONL -> Samples.

Visual question answering, captions, grounding; with the pictures drawn once more, reconstruction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from data.conversation import (
    IMAGE,
    Picture,
    Target,
    Turn,
    answered_heads,
    attach_targets,
    build_sample,
    choose_exchanges,
    end_with_images,
    image_segment,
    show_frames,
)
from data.dataset_base import Record, SkipSample, TaskDataset, Tower
from data.rgb_image import RgbImage
from data.rows import TalkRow, answers_in, read_row
from data.transforms.boxes import box_in, mask_in, read_mask, resized_mask
from data.types import Sample, Segment
from data.video import FrameSampler, file_for_pyav, read_frames

REQUEST = "After the answer, draw every picture again as it is."
"""Default of `request`. The published classes ask in words of their own."""

NO_OBJECTS = "the published code knows no `objects`: a group that has them cannot be upstream_compat"


class VlmDataset(TaskDataset):
    """Understanding: pictures and questions in, supervised answers out.

    Row (`TalkRow`): `{"input_img": [{"path": "images/7.png"}], "message": [{"from": "human", "value": "<image>\\nHow many
    digits?"}, {"from": "gpt", "value": "Two."}, …], "objects": {"ref": ["the red 7"], "bbox": [[x1, y1, x2, y2]], "mask":
    [RLE]}}`; LLaVA's `image` and `conversations` mean the same. Object k (optional) is `ref[k]`, `bbox[k]` (pixels of the
    original picture), `mask[k]` (RLE or polygons) and `image[k]` (which picture; 0): each `<BOX>` of the answers takes the next
    object that has a box, each `<SEG>` the next that has a mask. In place of pictures a row may have a `video` (a file, a
    folder of frames "clip/", or a list of frames), some frames of which stand where the text has `<video>`.

    Plan: und_image where `<image>` stands, text, text (supervised), text, text (supervised) …

    Args:
        tokenizer, vit_transform, vae_transform: of the group.
        shuffle_turns: put the question-and-answer exchanges of a row in random order.
        max_turns: use a random subset of this many exchanges; 0 = all.
        independent_turns: the exchanges do not see each other, each is asked as if alone about the picture.
        drop_image: pictures may be left out by condition dropout (never those of a row with objects); not given = no.
        frame_sampler_args: of `FrameSampler`, for rows with a video.
        upstream_compat: every turn's first `<image>` is the row's first picture again, and a `<image>` too many is nothing.
    """

    image_transform_role: ClassVar[Tower] = "vit"
    needs: ClassVar[tuple[Tower, ...]] = ("vit",)
    moves: ClassVar[bool] = True
    drops_image: ClassVar[bool] = False

    def __init__(
        self,
        *,
        shuffle_turns: bool = False,
        max_turns: int = 0,
        independent_turns: bool = False,
        drop_image: bool | None = None,
        frame_sampler_args: Mapping[str, Any] | None = None,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        if max_turns < 0:
            raise ValueError(f"max_turns must be 0 (all) or more, not {max_turns}")
        self.shuffle_turns, self.max_turns = shuffle_turns, max_turns
        self.independent_turns = independent_turns
        self.drop_image = self.drops_image if drop_image is None else drop_image
        self.frame_sampler = (
            None if frame_sampler_args is None else FrameSampler.from_args(frame_sampler_args)
        )
        self.reads_videos = self.frame_sampler is not None
        if self.augment is not None and self.reads_videos:
            raise ValueError(
                "augment: the frames of videos are not moved; leave out one of augment and frame_sampler_args"
            )

    def asked_heads(self, record: Record) -> tuple[str, ...]:
        row = read_row(TalkRow, record.data)
        return answered_heads(row.turns) if row.objects else ()

    def video_file(self, record: Record) -> str:
        return file_for_pyav(read_row(TalkRow, record.data).video)

    def to_sample(self, record: Record, rng: np.random.Generator) -> Sample:
        row = read_row(TalkRow, record.data)
        pictures = self._frames(row, record, rng) or [self.open_image(record, name) for name in row.pictures]
        turns = show_frames(row.turns, len(pictures)) if row.video else row.turns
        droppable = self.drop_image and not row.objects
        und = [
            image_segment(
                "und_image",
                picture,
                self.vit_transform,
                len(pictures),
                droppable=droppable,
                view=self.head_transform if row.objects else None,
            )
            for picture in pictures
        ]
        if row.objects and self.upstream_compat:
            raise SkipSample("bad_objects", NO_OBJECTS)
        turns = attach_targets(turns, read_objects(row.objects, pictures, und))
        turns = choose_exchanges(turns, rng, shuffle=self.shuffle_turns, max_exchanges=self.max_turns)
        return self.compose(turns, pictures, und, row.task or "vqa")

    def certain_texts(self, record: Record) -> Sequence[str]:
        return () if self.max_turns else answers_in(record.data)

    def compose(
        self, turns: Sequence[Turn], pictures: Sequence[RgbImage], und: Sequence[Segment], task: str
    ) -> Sample:
        """The sample of what was read.

        Args:
            turns: what is said.
            pictures: originals.
            und: the same pictures for the ViT.
            task: of the row.
        """
        shown = self.shown(turns, [(segment,) for segment in und])
        return build_sample(
            turns, self.tokenizer, images=shown, independent=self.independent_turns, task=task
        )

    def shown(self, turns: Sequence[Turn], pictures: Sequence[Picture]) -> Sequence[Picture]:
        """What stands at the placeholders of the human turns, in order."""
        if not self.upstream_compat:
            return pictures
        counts = [turn.text.count(IMAGE) for turn in turns if turn.role == "human"]
        return [pictures[k] if k < len(pictures) else () for count in counts for k in range(count)]

    def _frames(self, row: TalkRow, record: Record, rng: np.random.Generator) -> list[RgbImage]:
        if not row.video:
            return []
        if row.pictures:
            raise SkipSample("bad_video", "the row has pictures and a video; only one of them can be shown")
        if self.frame_sampler is None:
            raise SkipSample(
                "bad_video",
                "the row has a video; add frame_sampler_args to the group, say {max_num_frames: 12}",
            )
        return read_frames(record, row.video, self.frame_sampler, rng)


class VlmVer1Dataset(VlmDataset):
    """The same under the published name `SftJSONLIterableDataset_Ver1`, where `drop_image` not given means yes."""

    # The published configurations give this class a transform for the VAE as well, which it has no use for.
    image_transform_role = "vae"
    drops_image = True
    limits_size = True


class ReconstructionDataset(VlmDataset):
    """Answers about pictures, and then the pictures once more, drawn: `SftJSONLIterableDataset_with_VisualReconstruction_Ver1`.

    Row: that of `VlmDataset`.

    Plan: und_image where `<image>` stands, text, text (supervised) …, gen_image of every picture that went in.

    Args:
        tokenizer, vit_transform, vae_transform, shuffle_turns, max_turns, independent_turns, drop_image, frame_sampler_args: of
            `VlmDataset`.
        request: words that ask for the drawing; they follow those of the last question.
        upstream_compat: also, they follow those of every question, without a space where that has no `<image>`.
    """

    image_transform_role = "vae"
    needs = ("vit", "vae")
    limits_size = True
    shows_latents: ClassVar[bool] = False

    def __init__(self, *, request: str = REQUEST, **base: Any) -> None:
        super().__init__(**base)
        if not isinstance(request, str) or not request.strip():
            raise ValueError(f"request must be words that ask for the drawing, not {request!r}")
        self.request = request

    def compose(
        self, turns: Sequence[Turn], pictures: Sequence[RgbImage], und: Sequence[Segment], task: str
    ) -> Sample:
        if not pictures:
            return super().compose(turns, pictures, und, task)
        images: list[Picture] = [(segment,) for segment in und]
        if self.shows_latents:
            cond = [
                image_segment("cond_image", p, self.vae_transform, droppable=s.droppable)
                for p, s in zip(pictures, und, strict=True)
            ]
            images = list(zip(cond, und, strict=True))
        return build_sample(
            end_with_images(self._asking(turns), len(pictures)),
            self.tokenizer,
            images=self.shown(turns, images),
            drawn=[(image_segment("gen_image", p, self.vae_transform),) for p in pictures],
            independent=self.independent_turns,
            task=task,
        )

    def _asking(self, turns: Sequence[Turn]) -> tuple[Turn, ...]:
        questions = [i for i, turn in enumerate(turns) if turn.role == "human"]
        asked = set(questions if self.upstream_compat else questions[-1:])
        return tuple(
            replace(turn, text=self._with_request(turn.text)) if i in asked else turn
            for i, turn in enumerate(turns)
        )

    def _with_request(self, text: str) -> str:
        parts = text.split(IMAGE)
        if self.upstream_compat and len(parts) == 1:
            return text + self.request  # without a space between them
        last = max((i for i, part in enumerate(parts) if part.strip()), default=len(parts) - 1)
        parts[last] = f"{parts[last].rstrip()} {self.request}"
        return IMAGE.join(parts)


class ReconstructionVer2Dataset(ReconstructionDataset):
    """The same with the pictures also shown as clean latents: `SftJSONLIterableDataset_with_VisualReconstruction_Ver2`.

    Plan: cond_image and und_image where `<image>` stands, text, text (supervised) …, gen_image of every picture that went in.
    """

    shows_latents = True


def read_objects(
    objects: Mapping[str, Sequence[Any]], pictures: Sequence[RgbImage], und: Sequence[Segment]
) -> dict[str, list[Target]]:
    """The targets of each perception head in a row's `objects`.

    Args:
        objects: the row's field, as its table reads it.
        pictures: originals, for the pixels that boxes and masks count in.
        und: the same pictures transformed.

    Raises:
        SkipSample: if an entry cannot be used; the message names the object.
    """
    targets: dict[str, list[Target]] = {"box": [], "mask": []}
    for k in range(max((len(values) for values in objects.values()), default=0)):
        name, box, mask, image = (
            objects[key][k] if key in objects else None for key in ("ref", "bbox", "mask", "image")
        )
        image, name, what = image or 0, name or "", f"object {k}"
        if not 0 <= image < len(pictures):
            raise SkipSample("bad_objects", f"{what} lies in picture {image}, the row has {len(pictures)}")
        picture = pictures[image]
        if box is not None:
            target = Target(head="box", name=name, image=image, boxes=box_in(picture, box, what)[None])
            targets["box"].append(target)
        if mask is not None:
            height, width = und[image].pixels.shape[1:]
            original = mask_in(picture, read_mask(mask, picture.annotated_size, what), what)
            pixels = resized_mask(original, (height, width), what)
            targets["mask"].append(Target(head="mask", name=name, image=image, mask=pixels))
    return targets
