"""Groups made of numbers, for the tests of streams and loaders: a record is the length of a text, below 0 it is unusable."""

import os
import time
from collections.abc import Sequence

import numpy as np
import torch

from data.dataset_base import DropoutSpec, SkipSample, TaskDataset
from data.layout import LayoutSpec
from data.mixture import Group, WhenExhausted
from data.policy import PackBudget
from data.sources import Record, SourceLost
from data.stream import StreamPlan
from data.tokens import SpecialTokens
from data.types import PackedBatch, Sample, Segment

SPECIAL = SpecialTokens(begin=1, end=2, image_start=3, image_end=4, anchors={})
LAYOUT = LayoutSpec(vit_patch_size=8, latent_stride=16)


class NumberSource:
    """Records from a list of numbers."""

    def __init__(self, numbers: Sequence[int]):
        self.numbers = list(numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, index: int) -> Record:
        return Record(data={"i": index, "n": self.numbers[index]}, where=f"toy.jsonl:{index + 1}", fetch=None)


class NumberDataset(TaskDataset):
    """A supervised text of `n` tokens, the first of which says which record it is; or what `fault` says."""

    def __init__(
        self, *, tokenizer=None, vit_transform=None, vae_transform=None, fault: str = "skip", image=False
    ):
        super().__init__(tokenizer=tokenizer, vit_transform=vit_transform, vae_transform=vae_transform)
        self.fault, self.image = fault, image

    def to_sample(self, record: Record, rng: np.random.Generator) -> Sample:
        n = record.data["n"]
        if n < 0:
            self.fail()
        ids = torch.from_numpy(rng.integers(10, 1000, max(n - 2, 1)))
        ids[0] = 10_000 + record.data["i"]
        segments = [Segment(kind="text", ids=ids, supervised=True, droppable=False)]
        if self.image:
            pixels = torch.from_numpy(rng.integers(0, 255, (3, 16, 16), dtype=np.uint8))
            segments.append(Segment(kind="cond_image", pixels=pixels, droppable=True))
            segments.append(Segment(kind="gen_image", pixels=pixels))
        return Sample(segments=tuple(segments))

    def fail(self) -> None:
        if self.fault == "hang":
            time.sleep(600)
        if self.fault == "die":
            os._exit(9)
        raise {
            "skip": SkipSample("bad_number", "the number is negative"),
            "shape": KeyError("value"),
            "bug": ZeroDivisionError("no such thing"),
            "lost": SourceLost("toy.jsonl: cannot be read any more"),
        }[self.fault]


def group(
    name: str,
    numbers: Sequence[int],
    weight: float = 1.0,
    mandatory: bool = False,
    when_exhausted: WhenExhausted = "repeat",
    epochs: int | None = None,
    **options,
) -> Group:
    return Group(
        name=name,
        weight=weight,
        is_mandatory=mandatory,
        when_exhausted=when_exhausted,
        epochs=epochs,
        dataset=NumberDataset(**options),
        source=NumberSource(numbers),
    )


def lengths(count: int, low: int, high: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(low, high, count).tolist()


def mixed_groups() -> tuple[Group, ...]:
    """Short and long samples, images, and a group of three records."""
    return (
        group("short", lengths(200, 5, 30)),
        group("long", lengths(90, 40, 95), weight=0.7),
        group("image", lengths(50, 5, 40), weight=0.5, image=True),
        group("tiny", [9, 11, 13], weight=0.2),
    )


def plan(*groups: Group, **changes) -> StreamPlan:
    settings = {
        "groups": groups or mixed_groups(),
        "layout": LAYOUT,
        "special": SPECIAL,
        "budget": PackBudget(expected=90, maximum=100, per_sample=100, max_buffer=8),
        "seed": 5,
        "num_lanes": 4,
        "dropout": DropoutSpec(vae=0.3),
        "timestep_shift": 3.0,
    }
    return StreamPlan(**{**settings, **changes})


def fingerprint(batch: PackedBatch) -> tuple:
    """Everything of a pack, comparable with `==`."""
    tensors: list = []
    batch.map(lambda t: tensors.append((t.dtype, tuple(t.shape), t.flatten().tolist())) or t)
    return (tensors, batch.origins, batch.tasks, batch.sample_lens, batch.cursor.to_json(), batch.rejects)
