"""Boxes and masks of named things: COCO JSON -> Samples whose answers are `<BOX>` and `<SEG>`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from data.conversation import IMAGE, Target, Turn, build_sample, image_segment
from data.dataset_base import Record, SkipSample, TaskDataset
from data.rows import PhotoRow, ThingRow, read_row
from data.tokens import ANCHORS
from data.transforms.boxes import normalised_box, read_mask, resized_mask
from data.types import Sample


class ReferDataset(TaskDataset):
    """Referring boxes and masks: several questions about one picture, in random order.

    Record: one image of a COCO JSON whose annotations have, beside COCO's `bbox` and `segmentation`, the words for the thing:
    `{"id": 5, "image_id": 1, "category_id": 7, "bbox": [x, y, w, h], "segmentation": RLE or polygons, "expressions": ["the red
    7", …]}`.

    Plan: und_image, then per question text ("Where is the red 7?"), text (supervised: "<BOX>" or "<SEG>", with its region).

    Args:
        tokenizer, vit_transform, vae_transform: of the group.
        box_templates: questions for the box, one of them drawn each time; an empty list asks for none.
        mask_templates: the same for the mask.
        max_turns: random subset of this many questions; 0 = all.
        independent_turns: the questions do not see each other, each is asked as if alone about the picture.
    """

    source_format: ClassVar[str] = "coco"
    needs = ("vit",)

    def __init__(
        self,
        *,
        box_templates: Sequence[str] = ("Where is {ref}?",),
        mask_templates: Sequence[str] = ("Segment {ref}.",),
        max_turns: int = 0,
        independent_turns: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        self.templates = {"box": tuple(box_templates), "mask": tuple(mask_templates)}
        self.max_turns, self.independent_turns = max_turns, independent_turns
        if max_turns < 0:
            raise ValueError(f"max_turns must be 0 (all) or more, not {max_turns}")
        if isinstance(box_templates, str) or isinstance(mask_templates, str):
            raise ValueError("box_templates and mask_templates must be a list of questions each")
        if not (box_templates or mask_templates):
            raise ValueError("box_templates and mask_templates are both empty; nothing would be asked")
        for head, templates in self.templates.items():
            if wrong := [t for t in templates if "{ref}" not in t]:
                raise ValueError(
                    f"{head}_templates: {wrong[0]!r} does not contain {{ref}}, the place of the expression"
                )
            if templates and head not in self.tokenizer.special.anchors:
                raise ValueError(
                    f"{self.tokenizer.path}: the vocabulary lacks {ANCHORS[head]}; {head}_templates need it"
                )

    def to_sample(self, record: Record, rng: np.random.Generator) -> Sample:
        photo = read_row(PhotoRow, record.data["image"], "image")
        picture = self.open_image(record, photo.file)
        und = image_segment("und_image", picture, self.vit_transform)
        hw = (und.pixels.shape[1], und.pixels.shape[2])
        # Every annotation is read, asked for or not: whether a record is rejected must not hang on the draw.
        things = [
            (thing.names, target)
            for annotation in record.data["annotations"]
            for what in [f"annotation {annotation.get('id')}"]
            for thing in [_read_thing(annotation, record.data["categories"], what)]
            for target in self._read_targets(thing, picture.size, hw, what)
        ]
        if not things:
            raise SkipSample("no_target", "the image has no annotations")
        chosen = [things[i] for i in rng.permutation(len(things))[: self.max_turns or None]]
        turns = [turn for names, target in chosen for turn in self._ask(names, target, rng)]
        turns[0] = replace(turns[0], text=IMAGE + turns[0].text)
        return build_sample(
            turns, self.tokenizer, images=[(und,)], independent=self.independent_turns, task="refer"
        )

    def _read_targets(
        self, thing: ThingRow, size: tuple[int, int], hw: tuple[int, int], what: str
    ) -> Iterator[Target]:
        if self.templates["box"]:
            if thing.box is None:
                raise SkipSample(
                    "bad_box", f"{what}: it has no `bbox`; give it one, or set box_templates: []"
                )
            x, y, width, height = thing.box
            yield Target(head="box", box=normalised_box((x, y, x + width, y + height), size, what))
        if self.templates["mask"]:
            mask = read_mask(thing.mask, size, what)
            yield Target(head="mask", mask=resized_mask(mask, hw, what))

    def _ask(self, expressions: Sequence[str], target: Target, rng: np.random.Generator) -> tuple[Turn, Turn]:
        templates = self.templates[target.head]
        template = templates[int(rng.integers(len(templates)))]
        name = expressions[int(rng.integers(len(expressions)))]
        question = Turn(role="human", text=template.replace("{ref}", name))
        return question, Turn(role="gpt", text=ANCHORS[target.head], targets=(replace(target, name=name),))


def _read_thing(annotation: Mapping[str, Any], categories: Mapping[Any, Any], what: str) -> ThingRow:
    thing = read_row(ThingRow, annotation, what)
    if thing.category not in categories:
        known = ", ".join(str(c) for c in list(categories)[:20])
        raise SkipSample("unknown_category", f"{what}: category_id {thing.category!r} is not one of {known}")
    return thing
