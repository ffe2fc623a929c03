"""Conversations without pictures: rows of message JSONL -> Samples."""

from dataclasses import replace
from typing import ClassVar

import numpy as np

from data.conversation import IMAGE, build_sample, read_turns
from data.dataset_base import Record, TaskDataset
from data.types import Sample


class TextDataset(TaskDataset):
    """Text only; a row's pictures are not read, its `<image>`s are removed and white space is collapsed, as published.

    Row: `{"message": [{"from": "human", "value": "2 + 3 = ?"}, {"from": "gpt", "value": "5"}]}`.

    Plan: text, text (supervised), text, text (supervised) …
    """

    source_format: ClassVar[str] = "jsonl"

    def to_sample(self, record: Record, rng: np.random.Generator) -> Sample:
        turns = [
            replace(turn, text=" ".join(turn.text.replace(IMAGE, " ").split()))
            for turn in read_turns(record.data)
        ]
        return build_sample(turns, self.tokenizer, task=str(record.data.get("main_task_type", "text")))
