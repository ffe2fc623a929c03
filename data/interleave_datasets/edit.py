"""A picture, an instruction, the changed picture: rows of message JSONL -> Samples."""

from typing import ClassVar

import numpy as np

from data.conversation import (
    attach_targets,
    build_sample,
    end_with_images,
    image_segment,
    lead_with_images,
    read_image_names,
    read_turns,
    require_draws,
)
from data.dataset_base import Record, SkipSample, TaskDataset, Transform
from data.tokens import Tokenizer
from data.types import Sample
from data.vlm_dataset import read_objects


class EditDataset(TaskDataset):
    """Editing: the picture goes in twice (clean latents to draw from, ViT patches to understand), text and a picture come out.

    Row: `{"input_img": [{"path": "a.png"}], "output_img": [{"path": "b.png"}], "message": [{"from": "human", "value":
    "Make the 7 blue."}, {"from": "gpt", "value": "Done. <image>"}]}`. Input pictures stand at the human turn's `<image>`s, or
    first if it has none; output pictures at the gpt turn's, or last if it has none. The gpt text may be empty. It may point at
    what changes before it draws: `<BOX>` and `<SEG>` of the answers take the row's `objects` as in `VlmDataset`.

    Plan: cond_image, und_image, text, text (supervised), gen_image; or gen_image before the supervised text, which then
    cannot see it (nobody sees a noised picture).

    Args:
        tokenizer, vit_transform, vae_transform: of the group.
        drop_condition: the instruction and both forms of the input may be left out by condition dropout, each with its own
            probability (never the ViT input of a row with objects); needed for guidance. Off, as published for the medical
            editing classes.
        draws: noised copies of each output picture, every one with its own time and noise; they share all that stands before
            them and do not see each other.
    """

    source_format: ClassVar[str] = "jsonl"
    needs = ("vit", "vae")

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        vit_transform: Transform | None = None,
        vae_transform: Transform | None = None,
        drop_condition: bool = False,
        draws: int = 1,
    ) -> None:
        super().__init__(tokenizer=tokenizer, vit_transform=vit_transform, vae_transform=vae_transform)
        self.drop_condition, self.draws = drop_condition, require_draws(draws)

    def to_sample(self, record: Record, rng: np.random.Generator) -> Sample:
        inputs = [record.open_image(name) for name in read_image_names(record.data, "input_img")]
        outputs = [record.open_image(name) for name in read_image_names(record.data, "output_img")]
        if not inputs or not outputs:
            found = f"the row has {len(inputs)} and {len(outputs)}"
            raise SkipSample("image_count", f"an edit needs pictures in input_img and output_img; {found}")
        objects, drop = record.data.get("objects"), self.drop_condition
        cond = [image_segment("cond_image", p, self.vae_transform, droppable=drop) for p in inputs]
        und = [
            image_segment("und_image", p, self.vit_transform, droppable=drop and not objects) for p in inputs
        ]
        turns = end_with_images(lead_with_images(read_turns(record.data), len(inputs)), len(outputs))
        turns = attach_targets(turns, read_objects(objects, inputs, und))
        drawn = [(image_segment("gen_image", p, self.vae_transform),) * self.draws for p in outputs]
        return build_sample(
            turns,
            self.tokenizer,
            images=list(zip(cond, und, strict=True)),
            drawn=drawn,
            drop_text=drop,
            task=str(record.data.get("main_task_type", "edit")),
        )
