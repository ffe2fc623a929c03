"""What a dataset class is: `to_sample(record, rng) -> Sample`, and what every sample gets afterwards.

A dataset class is one file and one row in `DATASET_REGISTRY` (data/dataset_info.py). It says how a record
becomes segments and regions and nothing else: order, dropout of conditions, timesteps, noise seeds and the
checks below are the same for all.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from data.augment import CROPPED, Augment
from data.motion import WHOLE
from data.rgb_image import RgbImage
from data.sources.record import Record, SkipSample
from data.tokens import Tokenizer
from data.types import Region, Sample, Segment

__all__ = [
    "RECORD_ERRORS",
    "DropoutSpec",
    "Record",
    "SkipSample",
    "TaskDataset",
    "Tower",
    "Transform",
    "finish_sample",
    "require_mask_size",
]

Tower = Literal["vae", "vit"]
"""Which encoder a transform prepares pictures for."""

Transform = Callable[..., Tensor]
"""`(image, num_images=1) -> 3 hh ww` uint8, see data/transforms."""

PUBLISHED_PIXELS, PUBLISHED_SIDE = 20_000_000, 4096
"""UniMedVL leaves out rows with a picture of more pixels, or with a side of this many."""

RECORD_ERRORS = (
    LookupError, TypeError, ValueError, AttributeError, OverflowError, OSError, RecursionError, MemoryError,
)  # fmt: skip
"""What a dataset class raises on a record of another shape than it expects."""

BOX_TOLERANCE = 1e-4
"""How far a box may stand over the picture's edge (rounding in annotation tools)."""


class TaskDataset(ABC):
    """Turns records into samples.

    A subclass adds its own keyword arguments to `__init__` and hands on the others (`**base`); the YAML may set each of them by
    name.

    Args:
        tokenizer: encodes the texts.
        vit_transform: picture -> pixels for the ViT, or None if the YAML has no such block.
        vae_transform: the same for the VAE.
        head_transform: the same for an image encoder inside a perception head; None: there is none.
        upstream_compat: do what the published code does where that is odd; each class says what.
        augment: pictures and what is said of places in them are moved at random (`data/augment.py`).

    Raises:
        ValueError: if `augment` is given and wrong, or the class's samples cannot be moved.
    """

    source_format: ClassVar[str] = "jsonl"
    """What the class reads; a data location has it under `jsonl_path`, `tar_path`, `coco_path` or `parquet_path`."""

    limits_size: ClassVar[bool] = False
    """Under `upstream_compat`, large pictures are rejected, as UniMedVL's classes do."""

    image_transform_role: ClassVar[Tower] = "vae"
    """Which of them the YAML block `image_transform_args` means (published `vlm_sft`: that of the ViT)."""

    needs: ClassVar[tuple[Tower, ...]] = ()
    """Transforms the class cannot do without; checked when the YAML is read."""

    path_options: ClassVar[tuple[str, ...]] = ()
    """Arguments that may name a file, relative to the YAML."""

    moves: ClassVar[bool] = False
    """Whether its samples may be moved: all boxes and masks come from `box_in` and `mask_in` of data/transforms/boxes.py."""

    heads: tuple[str, ...] = ()
    """Perception heads that all its samples are for, as its arguments say; not those that single rows may ask for."""

    max_objects: int = 1
    """Most boxes of one region, as its arguments say; rows with more are rejected."""

    reads_videos: bool = False
    """Rows may have a video, as its arguments say."""

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        vit_transform: Transform | None = None,
        vae_transform: Transform | None = None,
        head_transform: Transform | None = None,
        upstream_compat: bool = False,
        augment: Mapping[str, Any] | None = None,
    ):
        if augment is not None and not self.moves:
            raise ValueError(f"augment: {type(self).__name__} has nothing that could be moved; leave it out")
        self.augment = None if augment is None else Augment.of(augment)
        self.tokenizer = tokenizer
        self.vit_transform = vit_transform
        self.vae_transform = vae_transform
        self.head_transform = head_transform
        self.upstream_compat = upstream_compat

    @abstractmethod
    def to_sample(self, record: Record, rng: np.random.Generator) -> Sample:
        """The sample of a record: a pure function of its two arguments.

        Raises:
            SkipSample: if the record cannot be used.
        """

    def sample(self, record: Record, rng: np.random.Generator) -> Sample:
        """`to_sample` of the record, moved if the group asks for it; of the whole picture if cutting would lose an object.

        Raises:
            SkipSample: if the record cannot be used.
        """
        if self.augment is None:
            return self.to_sample(record, rng)
        motion = self.augment.draw(record.data, rng)
        try:
            return self.to_sample(self.augment.moved(record, motion), rng)
        except SkipSample as e:
            if e.reason != CROPPED:
                raise
        return self.to_sample(self.augment.moved(record, replace(motion, window=WHOLE)), rng)

    def asked_heads(self, record: Record) -> tuple[str, ...]:
        """The perception heads that a single row asks for, where not all do (`heads`).

        Raises:
            SkipSample: if the row cannot be read.
        """
        return ()

    def video_file(self, record: Record) -> str:
        """The file of a row's video if it needs PyAV; else "".

        Raises:
            SkipSample: if the row cannot be read.
        """
        return ""

    def certain_texts(self, record: Record) -> Sequence[str]:
        """Texts that stand in the sample of a record whatever is drawn at random, found without opening a picture.

        A class may know of none: a sample that is too long is then made before it is rejected.
        """
        return ()

    def open_image(self, record: Record, name: str) -> RgbImage:
        """A picture of a record, by the name that the row gives it.

        Raises:
            SkipSample: if it is missing or broken, or too large for the published code that the group has to behave like.
        """
        image = record.open_image(name)
        large = image.width * image.height > PUBLISHED_PIXELS or max(image.size) >= PUBLISHED_SIDE
        if large and self.upstream_compat and self.limits_size:
            raise SkipSample(
                "too_large",
                f"a picture of {image.width}x{image.height} px; upstream_compat takes {PUBLISHED_PIXELS} px and sides below "
                f"{PUBLISHED_SIDE}",
            )
        return image

    @classmethod
    def options(cls) -> dict[str, inspect.Parameter]:
        """The keyword arguments that the YAML may set: those of `__init__`, and of the classes it hands `**base` on to."""
        named: dict[str, inspect.Parameter] = {}
        for owner in cls.__mro__:
            if "__init__" not in vars(owner):
                continue
            parameters = inspect.signature(vars(owner)["__init__"]).parameters
            named = {**parameters, **named}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                break
        own = {"self", "tokenizer", "vit_transform", "vae_transform", "head_transform"}
        by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return {n: p for n, p in named.items() if n not in own and p.kind in by_name}


@dataclass(frozen=True, slots=True, kw_only=True)
class DropoutSpec:
    """How often a droppable condition is left out, by what it is."""

    text: float = 0.0
    vit: float = 0.0
    vae: float = 0.0


def finish_sample(
    sample: Sample, rng: np.random.Generator, dropout: DropoutSpec, timestep_shift: float
) -> Sample:
    """Check a sample and make its random choices: dropped conditions, timesteps, noise seeds.

    Args:
        sample: what a dataset class made.
        rng: of this sample alone.
        dropout: probabilities of leaving out droppable segments.
        timestep_shift: `s` of `t -> s t / (1 + (s - 1) t)`; above 1 trains more on noisy latents.

    Raises:
        SkipSample: if a region is unusable, or there is nothing to learn.
    """
    check_sample(sample)
    probability = {
        "text": dropout.text,
        "und_image": dropout.vit,
        "cond_image": dropout.vae,
        "gen_image": 0.0,
    }
    segments: list[Segment] = []
    timestep = 0.0
    for segment in sample.segments:
        # Every segment draws all three, used or not: its noise does not change with the dropout
        # probabilities.
        uniform, normal, noise_seed = rng.random(), rng.standard_normal(), int(rng.integers(2**63 - 1))
        if segment.kind == "gen_image" and not segment.same_split:
            timestep = _timestep(normal, timestep_shift)
        is_vae = segment.kind in ("cond_image", "gen_image")
        segments.append(
            replace(
                segment,
                dropped=segment.droppable and uniform < probability[segment.kind],
                timestep=timestep if segment.kind == "gen_image" else 0.0,
                noise_seed=noise_seed if is_vae else 0,
            )
        )
    return replace(sample, segments=tuple(segments))


def check_sample(sample: Sample) -> None:
    """Raise `SkipSample` for what no dataset class may let through.

    Raises:
        SkipSample: "bad_box", "mask_size" or "no_target".
    """
    for region in sample.regions:
        _check_region(region, sample)
    supervised = any(s.kind == "gen_image" or s.supervised for s in sample.segments)
    if not supervised and not sample.regions:
        raise SkipSample(
            "no_target", f"{sample.origin.where}: nothing to learn: no answer, no target image, no region"
        )


def require_mask_size(mask_hw: Sequence[int], image: RgbImage, where: str) -> None:
    """A mask has to have its picture's size, before both are resized.

    Raises:
        SkipSample: "mask_size".
    """
    if tuple(mask_hw) != (image.height, image.width):
        height, width = mask_hw
        message = f"{where}: mask of {width}x{height} px on an image of {image.width}x{image.height} px"
        raise SkipSample("mask_size", message)


def _check_region(region: Region, sample: Sample) -> None:
    what = f"{sample.origin.where}: region {region.name!r}"
    has_mask = region.mask.numel() > 0
    for x0, y0, x1, y1 in region.boxes.tolist():
        box = (x0, y0, x1, y1)
        inside = all(-BOX_TOLERANCE <= v <= 1 + BOX_TOLERANCE for v in box)  # False for NaN
        if not inside or x0 >= x1 or y0 >= y1:
            corners = ", ".join(f"{v:.4g}" for v in box)
            raise SkipSample(
                "bad_box",
                f"{what}: box ({corners}) is empty or outside the image; x0 < x1, y0 < y1 in [0, 1]",
            )
    image_hw = sample.segments[region.image].pixels.shape[1:]
    if has_mask and region.mask.shape != image_hw:
        (mask_h, mask_w), (image_h, image_w) = region.mask.shape, image_hw
        raise SkipSample(
            "mask_size", f"{what}: mask of {mask_w}x{mask_h} px on an image of {image_w}x{image_h} px"
        )


def _timestep(normal: float, shift: float) -> float:
    t = 1.0 / (1.0 + np.exp(-normal))
    return float(shift * t / (1.0 + (shift - 1.0) * t))
