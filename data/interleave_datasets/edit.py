"""A picture, an instruction, the changed picture: rows of message JSONL -> Samples."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from data.conversation import (
    IMAGE,
    Picture,
    Turn,
    answered_heads,
    attach_targets,
    build_sample,
    draw_before_the_answer,
    end_with_images,
    image_segment,
    lead_with_images,
    require_draws,
    text_segments,
)
from data.dataset_base import Record, SkipSample, TaskDataset
from data.rows import EditRow, answers_in, read_row
from data.types import Sample
from data.vlm_dataset import NO_OBJECTS, read_objects


class EditDataset(TaskDataset):
    """Editing: the picture goes in twice (clean latents to draw from, ViT patches to understand), text and a picture come out.

    Row (`EditRow`): `{"input_img": [{"path": "a.png"}], "output_img": [{"path": "b.png"}], "message": [{"from": "human", "value":
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
        upstream_compat: the first picture of each side, the last question and the last answer are used, pictures stand first and
            last, and `<image>` stays in the texts, letter by letter.
    """

    needs = ("vit", "vae")
    limits_size = True
    moves = True
    draws_first: ClassVar[bool] = False

    def __init__(self, *, drop_condition: bool = False, draws: int = 1, **base: Any) -> None:
        super().__init__(**base)
        self.drop_condition, self.draws = drop_condition, require_draws(draws)

    def asked_heads(self, record: Record) -> tuple[str, ...]:
        row = read_row(EditRow, record.data)
        return answered_heads(row.turns) if row.objects else ()

    def certain_texts(self, record: Record) -> Sequence[str]:
        return () if self.upstream_compat else answers_in(record.data)

    def to_sample(self, record: Record, rng: np.random.Generator) -> Sample:
        row = read_row(EditRow, record.data)
        used = slice(1 if self.upstream_compat else None)
        inputs = [self.open_image(record, name) for name in row.inputs[used]]
        outputs = [self.open_image(record, name) for name in row.outputs[used]]
        drop = self.drop_condition
        cond = [image_segment("cond_image", p, self.vae_transform, droppable=drop) for p in inputs]
        und = [
            image_segment(
                "und_image",
                p,
                self.vit_transform,
                droppable=drop and not row.objects,
                view=self.head_transform if row.objects else None,
            )
            for p in inputs
        ]
        shown: list[Picture] = list(zip(cond, und, strict=True))
        drawn = [(image_segment("gen_image", p, self.vae_transform),) * self.draws for p in outputs]
        if self.upstream_compat:
            if row.objects:
                raise SkipSample("bad_objects", NO_OBJECTS)
            return self._as_published(row, shown[0], drawn[0])
        turns = lead_with_images(row.turns, len(inputs))
        turns = (draw_before_the_answer if self.draws_first else end_with_images)(turns, len(outputs))
        turns = attach_targets(turns, read_objects(row.objects, inputs, und))
        return build_sample(
            turns, self.tokenizer, images=shown, drawn=drawn, drop_text=drop, task=row.task or "edit"
        )

    def _as_published(self, row: EditRow, shown: Picture, drawn: Picture) -> Sample:
        question, answer = (_last_text(row.turns, role) for role in ("human", "gpt"))
        if not question:
            raise SkipSample("bad_message", "the row has no instruction")
        # Of the two published classes, the one that draws first cuts its question at the `<image>`s.
        asked = question.split(IMAGE) if self.draws_first else [question]
        texts = (
            s for text in asked for s in text_segments(text, self.tokenizer, droppable=self.drop_condition)
        )
        said = text_segments(answer, self.tokenizer, supervised=True)
        after = (*drawn, *said) if self.draws_first else (*said, *drawn)
        return Sample(segments=(*shown, *texts, *after), task=row.task or "edit")


class CounterfactualDataset(EditDataset):
    """The picture as it would look if something were different, and why: drawn first, explained afterwards.

    The published `CounterfactualMedicalIterableDataset_ver1`. Row and arguments: those of `EditDataset`; where the answers have
    `<image>` does not matter.

    Plan: cond_image, und_image, text, gen_image, text (supervised), which cannot see the drawing.
    """

    draws_first = True


def _last_text(turns: tuple[Turn, ...], role: str) -> str:
    return next((turn.text.strip() for turn in reversed(turns) if turn.role == role), "")
