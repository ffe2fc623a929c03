"""Conversations without pictures: rows of message JSONL -> Samples."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from data.conversation import IMAGE, build_sample
from data.dataset_base import Record, TaskDataset
from data.rows import ChatRow, answers_in, read_row
from data.types import Sample


class TextDataset(TaskDataset):
    """Text only; a row's pictures are not read, its `<image>`s are removed and white space is collapsed, as published.

    Row (`ChatRow`): `{"message": [{"from": "human", "value": "2 + 3 = ?"}, {"from": "gpt", "value": "5"}]}`.

    Plan: text, text (supervised), text, text (supervised) …
    """

    def certain_texts(self, record: Record) -> Sequence[str]:
        return [" ".join(text.split()) for text in answers_in(record.data)]

    def to_sample(self, record: Record, rng: np.random.Generator) -> Sample:
        row = read_row(ChatRow, record.data)
        turns = [replace(turn, text=" ".join(turn.text.replace(IMAGE, " ").split())) for turn in row.turns]
        return build_sample(turns, self.tokenizer, task=row.task or "text")
