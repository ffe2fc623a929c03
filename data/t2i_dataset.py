"""Captions and the pictures to draw from them: WebDataset shards, parquet files or message JSONL -> Samples."""

from typing import Any, ClassVar

import numpy as np

from data.conversation import (
    IMAGE,
    Turn,
    build_sample,
    end_with_images,
    image_segment,
    require_draws,
    without_images,
)
from data.dataset_base import Record, SkipSample, TaskDataset
from data.rgb_image import RgbImage
from data.rows import CaptionedRow, CaptionRow, DrawRow, read_row
from data.types import Sample, Segment

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
SIDE_BY_SIDE = "a record's members stand side by side in its shard"


class T2iDataset(TaskDataset):
    """Text-to-image from tar shards.

    Members of a sample: `KEY.png` (or jpg, jpeg, webp) and `KEY.json` with `{"caption": "a red 7"}`, or `{"captions": […]}` of
    which one is drawn, or `KEY.txt`.

    Plan: text (droppable, for guidance), gen_image (`draws` times).

    Args:
        tokenizer, vit_transform, vae_transform: of the group.
        draws: noised copies of the picture, every one with its own time and noise; they share the caption and do not see
            each other.
        upstream_compat: a picture without a caption is drawn from a blank.
    """

    source_format: ClassVar[str] = "tar"
    needs = ("vae",)
    moves = True

    def __init__(self, *, draws: int = 1, **base: Any) -> None:
        super().__init__(**base)
        self.draws = require_draws(draws)

    def to_sample(self, record: Record, rng: np.random.Generator) -> Sample:
        row, picture = self.read(record)
        texts = row.captions or ((row.caption,) if row.caption.strip() else ())
        if not texts and not self.upstream_compat:
            hint = f" ({SIDE_BY_SIDE})" if self.source_format == "tar" else ""
            raise SkipSample(
                "no_caption",
                f"none of `captions`, `caption` and `txt` has a text; give the picture one{hint}",
            )
        drawn = (image_segment("gen_image", picture, self.vae_transform),) * self.draws
        if not texts:
            blank = Segment(kind="text", ids=self.tokenizer.encode(" "), droppable=True)
            return Sample(segments=(blank, *drawn), task="t2i")
        caption = texts[int(rng.integers(len(texts)))]
        turns = [Turn(role="human", text=caption.replace(IMAGE, " ")), Turn(role="gpt", text=IMAGE)]
        return build_sample(turns, self.tokenizer, drawn=[drawn], drop_text=True, task="t2i")

    def read(self, record: Record) -> tuple[CaptionRow, RgbImage]:
        """The captions and the picture of a record."""
        fields = record.data.get("json")
        members = {key: value for key, value in record.data.items() if key != "json"}
        row = read_row(CaptionRow, {**members, **(fields if isinstance(fields, dict) else {})})
        return row, _open_member(record)


class ParquetT2iDataset(T2iDataset):
    """Text-to-image from parquet files, the published `t2i_pretrain`.

    Row (`CaptionedRow`): `image` (bytes of a picture file) and `captions` (a JSON string of a dict), one of whose texts is drawn.

    Plan and arguments: those of `T2iDataset`.
    """

    source_format: ClassVar[str] = "parquet"

    def read(self, record: Record) -> tuple[CaptionRow, RgbImage]:
        row = read_row(CaptionedRow, record.data)
        return row, self.open_image(record, row.image)


class T2iMessageDataset(TaskDataset):
    """Text-to-image from message JSONL, under the published name `T2IIterableDataset_Ver1`.

    Row (`DrawRow`): `{"output_img": [{"path": "b.png"}], "message": [{"from": "human", "value": "Draw a red 7."}, {"from": "gpt",
    "value": "Here it is. <image>"}]}`; `input_img` is read where there is no `output_img`, as published.

    Plan: text (droppable), text (supervised) if the answer has any, gen_image.
    """

    needs = ("vae",)
    limits_size = True

    def to_sample(self, record: Record, rng: np.random.Generator) -> Sample:
        row = read_row(DrawRow, record.data)
        pictures = [self.open_image(record, name) for name in row.outputs]
        drawn = [(image_segment("gen_image", p, self.vae_transform),) for p in pictures]
        turns = end_with_images(without_images(row.turns, "human"), len(pictures))
        return build_sample(turns, self.tokenizer, drawn=drawn, drop_text=True, task=row.task or "t2i")


def _open_member(record: Record) -> RgbImage:
    for extension in IMAGE_EXTENSIONS:
        try:
            return record.open_image(extension)
        except SkipSample as e:
            if e.reason != "missing_image":
                raise
    raise SkipSample(
        "missing_image",
        f"the sample has no member with one of the extensions {', '.join(IMAGE_EXTENSIONS)}; {SIDE_BY_SIDE}",
    )
