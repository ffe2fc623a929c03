"""A picture changed step by step: rows of parquet files -> Samples."""

from typing import Any

import numpy as np

from data.conversation import IMAGE, Picture, Turn, build_sample, image_segment, require_draws
from data.dataset_base import Record, TaskDataset
from data.rows import StepsRow, read_row
from data.types import Sample

MAX_STEPS = 2
"""A sample goes over this many steps of a row at most."""


class StepsDataset(TaskDataset):
    """Editing in several steps, the published `unified_edit`.

    Row (`StepsRow`): `image_list` (picture files) and `instruction_list` (per step a list of wordings, one of which is drawn). A
    sample begins at any picture but the last and goes over one step or two. Of those with two steps, half give both instructions
    at once and draw the second picture; the other half draw after each instruction.

    Plan: cond_image, und_image, text (all droppable), gen_image; with two steps one after the other then, droppable as before,
    the picture that was drawn as cond_image and und_image, text, and the second gen_image.

    Args:
        tokenizer, vit_transform, vae_transform: of the group.
        draws: noised copies of each picture to draw, every one with its own time and noise.
        upstream_compat: two instructions at once that lead to a row's last picture give only the first of them and the picture
            before; every instruction has a full stop put after it, whatever it ends with.
    """

    source_format = "parquet"
    needs = ("vit", "vae")

    def __init__(self, *, draws: int = 1, **base: Any) -> None:
        super().__init__(**base)
        self.draws = require_draws(draws)

    def to_sample(self, record: Record, rng: np.random.Generator) -> Sample:
        row = read_row(StepsRow, record.data)
        last = len(row.images) - 1
        start = int(rng.integers(last))
        end = int(rng.integers(start + 1, min(start + MAX_STEPS, last) + 1))
        at_once = end - start > 1 and bool(rng.random() < 0.5)
        if at_once and self.upstream_compat and end == last:
            end -= 1
        said = [
            steps[int(rng.integers(len(steps)))].replace(IMAGE, " ") for steps in row.instructions[start:end]
        ]
        stops = [end] if at_once else list(range(start + 1, end + 1))
        texts = [self._joined(said)] if at_once else said
        turns = [
            turn for text in texts for turn in (Turn(role="human", text=text), Turn(role="gpt", text=IMAGE))
        ]
        turns[0] = Turn(role="human", text=IMAGE + turns[0].text)
        return build_sample(
            turns,
            self.tokenizer,
            images=[self._shown(record, row.images[start])],
            drawn=[self._drawn(record, row.images[stop], again=stop != end) for stop in stops],
            drop_text=True,
            task="edit",
        )

    def _joined(self, said: list[str]) -> str:
        if self.upstream_compat:
            return " ".join(f"{text}." for text in said)
        return " ".join(text.strip().rstrip(".") + "." for text in said)

    def _shown(self, record: Record, name: str) -> Picture:
        image = self.open_image(record, name)
        return (
            image_segment("cond_image", image, self.vae_transform, droppable=True),
            image_segment("und_image", image, self.vit_transform, droppable=True),
        )

    def _drawn(self, record: Record, name: str, *, again: bool) -> Picture:
        target = image_segment("gen_image", self.open_image(record, name), self.vae_transform)
        return (target,) * self.draws + (self._shown(record, name) if again else ())
