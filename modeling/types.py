"""What comes out of the model and of the losses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.types import RegionBatch
from modeling.qwen2.model import Vocabulary
from modeling.qwen2.mot import filled


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureGrids:
    """The understanding images' features, one row per patch, images one after the other.

    Attributes:
        values: `v d`, of the vision tower.
        states: `v e`, the trunk's last state at each patch: what it made of the picture after all that precedes it. No answer is
            in it, attention being causal; the question is, where it stands before the picture.
        pixels: `v (p p 3)` uint8, the patches themselves, for heads that need edges.
        hw: patch rows and columns of each image.
        patch_size: side of a patch in pixels.
        views: `3 hh ww` uint8 each, the images as encoders inside heads want them; `3 0 0` where none was asked for.
    """

    values: Tensor
    states: Tensor
    pixels: Tensor
    hw: tuple[tuple[int, int], ...]
    patch_size: int
    views: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadInputs:
    """What a perception head is given for its `r` regions.

    Attributes:
        hidden: `r e`, the trunk's state at each anchor.
        regions: which image each is about, and, in training, what is there. At inference and for heads that have nothing in
            this pack it says nothing (`RegionBatch.unknown`).
        grids: features of all images.
        embed: token ids `t` -> `t e`, the language model's input embeddings.
        vocabulary: states `t e` -> `t vocab`, its output layer.
    """

    hidden: Tensor
    regions: RegionBatch
    grids: FeatureGrids
    embed: Callable[[Tensor], Tensor]
    vocabulary: Vocabulary


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

    def each(self) -> list["HeadOutput"]:
        """What it says of each region, one by one."""
        count = max(len(self.boxes), len(self.mask_hw))
        masks = self.mask_logits.split([h * w for h, w in self.mask_hw]) if self.mask_hw else ()
        # All but the masks' pixels has a row for each region, or none.
        rows = {
            f.name: value
            for f in fields(self)
            if f.name != "mask_logits"
            and isinstance(value := getattr(self, f.name), Tensor)
            and len(value) == count
        }
        return [
            replace(
                self,
                **{name: value[i : i + 1] for name, value in rows.items()},
                mask_logits=masks[i] if masks else self.mask_logits,
                mask_hw=self.mask_hw[i : i + 1],
            )
            for i in range(count)
        ]


class DetrStage(NamedTuple):
    """What the queries of a detector say after one of its layers.

    Attributes:
        logits: `r q c` float32: of an object, of each class, or of these and "no object" as the last.
        boxes: `r q 4` float32 cx cy w h in [0, 1].
        valid: `r q` bool; False where a small picture has no cell.
    """

    logits: Tensor
    boxes: Tensor
    valid: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DetrOutput:
    """What a detector says of the pictures of its `r` regions.

    Attributes:
        stages: from the first look to the answer, which is the last.
        matched: per stage `b` int64, which prediction stands for each true box: `region x q + query`; -1: none is left for it.
        classes: `b` int64, of the true boxes; 0 where there is no table.
        no_object_weight: of `DetrHead`.
        states: `r q d`, of the last stage's queries.
        picture: what they looked at, for phrases at inference.
        phrase_states: `t e`, from which the vocabulary tells each token of the true phrases; 0 rows of a head without words.
        phrase_known: `t` bool, whether the phrase's box has a prediction.
    """

    stages: tuple[DetrStage, ...]
    matched: tuple[Tensor, ...]
    classes: Tensor
    no_object_weight: float | None
    states: Tensor
    picture: tuple[Tensor, ...]
    phrase_states: Tensor
    phrase_known: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOutput:
    """Predictions of one forward pass; the model computes no loss.

    Attributes:
        hidden: `s d`, the trunk's last state of every token after the final norm.
        label_states: `c d`, those at the batch's `label_index`.
        vocabulary: the projection that makes logits of them. It belongs to the root unit (modeling/bagel/shard_plan.py), whose
            weights are whole from forward to backward; so the loss can make logits block by block, and no pack's exist whole.
        velocity: `l (p p z)`, at every latent patch.
        gen_stream: `l d`, the trunk's state of every latent patch before the final norm; for inference, without gradient.
        grids: the understanding images' features.
        heads: per perception head of the model, `HeadOutput` or what else it gives.
    """

    hidden: Tensor
    label_states: Tensor
    vocabulary: Vocabulary
    velocity: Tensor
    gen_stream: Tensor
    grids: FeatureGrids
    heads: Mapping[str, Any] = field(default_factory=dict)

    @property
    def logits(self) -> Tensor:
        """All of them, `c vocab`: for inference."""
        states = filled(self.label_states).to(self.vocabulary.weight.dtype)
        logits: Tensor = self.vocabulary(states)
        return logits[: len(self.label_states)]


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowState:
    """The straight path of the pack's latents. All `l (p p z)`; clean patches have `t` 0, so `noised` is `latents` there."""

    latents: Tensor
    noise: Tensor
    noised: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LossValues:
    """What a loss says of a pack.

    Attributes:
        total: float32 scalar with gradient.
        each: `n` float32 without gradient, what every thing (`Things`) adds to the total.
    """

    total: Tensor
    each: Tensor

    @staticmethod
    def of(each: Tensor) -> "LossValues":
        """Of a loss that is computed thing by thing, `n`."""
        return LossValues(total=each.sum(), each=each.detach())


@dataclass(frozen=True, slots=True, kw_only=True)
class Things:
    """What a loss sums over, known from the batch alone.

    Attributes:
        place: `n` int64, place in the packed sequence of a token of each (which says whose sample it is).
        amount: `n` float32, how much each counts in the divisor.
    """

    place: Tensor
    amount: Tensor

    @staticmethod
    def alike(place: Tensor) -> "Things":
        """All count 1."""
        return Things(place=place, amount=torch.ones(len(place), device=place.device))


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerm:
    """A loss of a pack by its name, and over what it sums; the division happens once, in `train/objective.py`."""

    name: str
    total: Tensor
    each: Tensor
    things: Things
