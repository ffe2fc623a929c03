"""Pictures and a conversation about them: rows of message JSONL -> Samples (visual question answering, captions, grounding)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from data.conversation import (
    Target,
    attach_targets,
    build_sample,
    choose_exchanges,
    image_segment,
    read_image_names,
    read_turns,
)
from data.dataset_base import Record, SkipSample, TaskDataset, Transform
from data.tokens import Tokenizer
from data.transforms.boxes import normalised_box, read_mask, resized_mask
from data.types import Sample, Segment


class VlmDataset(TaskDataset):
    """Understanding: pictures and questions in, supervised answers out.

    Row: `{"input_img": [{"path": "images/7.png"}], "message": [{"from": "human", "value": "<image>\\nHow many digits?"},
    {"from": "gpt", "value": "Two."}, …], "objects": {"ref": ["the red 7"], "bbox": [[x1, y1, x2, y2]], "mask": [RLE]}}`;
    LLaVA's `image` and `conversations` mean the same. Object k (optional) is `ref[k]`, `bbox[k]` (pixels of the original
    picture), `mask[k]` (RLE or polygons) and `image[k]` (which picture; 0): each `<BOX>` of the answers takes the next
    object that has a box, each `<SEG>` the next that has a mask.

    Plan: und_image where `<image>` stands, text, text (supervised), text, text (supervised) …

    Args:
        tokenizer, vit_transform, vae_transform: of the group.
        shuffle_turns: put the question-and-answer exchanges of a row in random order.
        max_turns: use a random subset of this many exchanges; 0 = all.
        independent_turns: the exchanges do not see each other, each is asked as if alone about the picture.
        drop_image: pictures may be left out by condition dropout (never those of a row with objects); not given = no.
    """

    source_format: ClassVar[str] = "jsonl"
    image_transform_role = "vit"
    needs = ("vit",)
    drops_image: ClassVar[bool] = False

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        vit_transform: Transform | None = None,
        vae_transform: Transform | None = None,
        shuffle_turns: bool = False,
        max_turns: int = 0,
        independent_turns: bool = False,
        drop_image: bool | None = None,
    ) -> None:
        super().__init__(tokenizer=tokenizer, vit_transform=vit_transform, vae_transform=vae_transform)
        if max_turns < 0:
            raise ValueError(f"max_turns must be 0 (all) or more, not {max_turns}")
        self.shuffle_turns, self.max_turns = shuffle_turns, max_turns
        self.independent_turns = independent_turns
        self.drop_image = self.drops_image if drop_image is None else drop_image

    def to_sample(self, record: Record, rng: np.random.Generator) -> Sample:
        row = record.data
        pictures = [record.open_image(name) for name in read_image_names(row, "input_img", "image")]
        droppable = self.drop_image and not row.get("objects")
        und = [
            image_segment("und_image", picture, self.vit_transform, len(pictures), droppable=droppable)
            for picture in pictures
        ]
        turns = attach_targets(read_turns(row), read_objects(row.get("objects"), pictures, und))
        turns = choose_exchanges(turns, rng, shuffle=self.shuffle_turns, max_exchanges=self.max_turns)
        return build_sample(
            turns,
            self.tokenizer,
            images=[(s,) for s in und],
            independent=self.independent_turns,
            task=str(row.get("main_task_type", "vqa")),
        )


class VlmVer1Dataset(VlmDataset):
    """The same under the published name `SftJSONLIterableDataset_Ver1`, where `drop_image` not given means yes."""

    drops_image = True


def read_objects(
    objects: Mapping[str, Any] | None, pictures: Sequence[Image.Image], und: Sequence[Segment]
) -> dict[str, list[Target]]:
    """The targets of each perception head in a row's `objects`.

    Args:
        objects: the row's field; None = no objects.
        pictures: originals, for the pixels that boxes and masks count in.
        und: the same pictures transformed.

    Raises:
        SkipSample: if a list has a wrong length or an entry cannot be used; the message names the object.
    """
    if objects is None:
        return {}
    keys = ("ref", "bbox", "mask", "image")
    if not isinstance(objects, dict) or not all(isinstance(objects.get(key, []), list) for key in keys):
        raise SkipSample(
            "bad_objects", f"`objects` must be lists under {', '.join(keys)}, not {objects!s:.80}"
        )
    known = {key: objects[key] for key in keys if key in objects}
    count = max((len(values) for values in known.values()), default=0)
    if any(len(values) != count for values in known.values()):
        lengths = ", ".join(f"{key} {len(values)}" for key, values in known.items())
        raise SkipSample("bad_objects", f"the lists of `objects` differ in length: {lengths}")
    targets: dict[str, list[Target]] = {"box": [], "mask": []}
    for k in range(count):
        name, box, mask, image = (
            known[key][k] if key in known else None for key in ("ref", "bbox", "mask", "image")
        )
        image, name, what = image or 0, name or "", f"object {k}"
        if not 0 <= image < len(pictures):
            raise SkipSample("bad_objects", f"{what} lies in picture {image}, the row has {len(pictures)}")
        size = pictures[image].size
        if box is not None:
            target = Target(head="box", name=name, image=image, box=normalised_box(box, size, what))
            targets["box"].append(target)
        if mask is not None:
            height, width = und[image].pixels.shape[1:]
            pixels = resized_mask(read_mask(mask, size, what), (height, width), what)
            targets["mask"].append(Target(head="mask", name=name, image=image, mask=pixels))
    return targets
