"""What comes out of the model and of the losses."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureGrids:
    """The understanding images' features, one row per patch, images one after the other.

    Attributes:
        values: `v d`.
        pixels: `v (p p 3)` uint8, the patches themselves, for heads that need edges.
        hw: patch rows and columns of each image.
        patch_size: side of a patch in pixels.
    """

    values: Tensor
    pixels: Tensor
    hw: tuple[tuple[int, int], ...]
    patch_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadOutput:
    """What a perception head says of its `r` regions.

    Attributes:
        boxes: `r 4` xyxy in [0, 1] (0 rows from a head that gives none).
        mask_logits: `p`, every region's logits at its image's full size, one after the other, row by row.
        mask_hw: height and width of each region's mask.
    """

    boxes: Tensor
    mask_logits: Tensor
    mask_hw: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOutput:
    """Predictions of one forward pass; the model computes no loss.

    Attributes:
        hidden: `s d`, the trunk's last state of every token after the final norm.
        logits: `c vocab`, at the batch's `label_index`.
        velocity: `l (p p z)`, at every latent patch.
        gen_stream: `l d`, the trunk's state of every latent patch before the final norm; for inference, without gradient.
        grids: the understanding images' features.
        heads: per perception head of the model.
    """

    hidden: Tensor
    logits: Tensor
    velocity: Tensor
    gen_stream: Tensor
    grids: FeatureGrids
    heads: Mapping[str, HeadOutput] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowState:
    """The straight path of the pack's latents. All `l (p p z)`; clean patches have `t` 0, so `noised` is `latents` there."""

    latents: Tensor
    noise: Tensor
    noised: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerm:
    """A summed loss and how many things it was summed over; the division happens once, in `train/objective.py`."""

    name: str
    total: Tensor
    count: Tensor
