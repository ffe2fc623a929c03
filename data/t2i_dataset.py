"""Captions and the pictures to draw from them: WebDataset shards or message JSONL -> Samples."""

from dataclasses import replace
from typing import ClassVar

import numpy as np
from PIL import Image

from data.conversation import (
    IMAGE,
    Turn,
    build_sample,
    end_with_images,
    image_segment,
    read_image_names,
    read_turns,
    require_draws,
)
from data.dataset_base import Record, SkipSample, TaskDataset, Transform
from data.tokens import Tokenizer
from data.types import Sample

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")


class T2iDataset(TaskDataset):
    """Text-to-image from tar shards.

    Members of a sample: `KEY.png` (or jpg, jpeg, webp) and `KEY.json` with `{"caption": "a red 7"}`, or `{"captions": […]}` of
    which one is drawn, or `KEY.txt`.

    Plan: text (droppable, for guidance), gen_image (`draws` times).

    Args:
        tokenizer, vit_transform, vae_transform: of the group.
        draws: noised copies of the picture, every one with its own time and noise; they share the caption and do not see
            each other.
    """

    source_format: ClassVar[str] = "tar"
    needs = ("vae",)

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        vit_transform: Transform | None = None,
        vae_transform: Transform | None = None,
        draws: int = 1,
    ) -> None:
        super().__init__(tokenizer=tokenizer, vit_transform=vit_transform, vae_transform=vae_transform)
        self.draws = require_draws(draws)

    def to_sample(self, record: Record, rng: np.random.Generator) -> Sample:
        caption = _caption(record, rng)
        drawn = image_segment("gen_image", _open_member(record), self.vae_transform)
        turns = [Turn(role="human", text=caption.replace(IMAGE, " ")), Turn(role="gpt", text=IMAGE)]
        return build_sample(turns, self.tokenizer, drawn=[(drawn,) * self.draws], drop_text=True, task="t2i")


class T2iMessageDataset(TaskDataset):
    """Text-to-image from message JSONL, under the published name `T2IIterableDataset_Ver1`.

    Row: `{"output_img": [{"path": "b.png"}], "message": [{"from": "human", "value": "Draw a red 7."}, {"from": "gpt", "value":
    "Here it is. <image>"}]}`; `input_img` is read where there is no `output_img`, as published.

    Plan: text (droppable), text (supervised) if the answer has any, gen_image.
    """

    source_format: ClassVar[str] = "jsonl"
    needs = ("vae",)

    def to_sample(self, record: Record, rng: np.random.Generator) -> Sample:
        pictures = [
            record.open_image(name) for name in read_image_names(record.data, "output_img", "input_img")
        ]
        if not pictures:
            raise SkipSample("image_count", "the row has no output_img to draw")
        drawn = [(image_segment("gen_image", p, self.vae_transform),) for p in pictures]
        said = [
            replace(turn, text=turn.text.replace(IMAGE, " ")) if turn.role == "human" else turn
            for turn in read_turns(record.data)
        ]
        turns = end_with_images(said, len(pictures))
        task = str(record.data.get("main_task_type", "t2i"))
        return build_sample(turns, self.tokenizer, drawn=drawn, drop_text=True, task=task)


def _caption(record: Record, rng: np.random.Generator) -> str:
    row = record.data.get("json")
    fields = row if isinstance(row, dict) else {}
    captions = fields.get("captions") or [fields.get("caption", record.data.get("txt"))]
    captions = list(captions.values()) if isinstance(captions, dict) else captions
    caption = captions[int(rng.integers(len(captions)))]
    if not isinstance(caption, str) or not caption.strip():
        raise SkipSample("no_caption", "no `caption` or `captions` in the .json member, and no .txt member")
    return caption


def _open_member(record: Record) -> Image.Image:
    for extension in IMAGE_EXTENSIONS:
        try:
            return record.open_image(extension)
        except SkipSample as e:
            if e.reason != "missing_image":
                raise
    raise SkipSample(
        "missing_image", f"the sample has no member with one of the extensions {', '.join(IMAGE_EXTENSIONS)}"
    )
