"""BagelConfig: everything that shapes the model; `modeling/source.py` reads it from files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from data.layout import LayoutSpec
from modeling.heads import head_class
from modeling.qwen2.config import Qwen2Config
from modeling.towers import TowerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class BagelConfig:
    """Sizes and choices of the model.

    Attributes:
        llm, vit: the decoder and the vision tower.
        latent_channels: channels of the VAE's latent.
        latent_patch_size: latent cells per side that make one token.
        vae_downsample: pixels per latent cell.
        max_latent_size, vit_max_num_patch_per_side: sides of the two position tables.
        heads: what a perception head predicts (`box`, `mask`) -> its `type`, a row of HEADS (left out: the row of that name), and
            that row's options.
        visual_gen, visual_und: whether pictures can be made, and seen: without, the parts for it are not there.
        head_reads: the state a head reads: of the anchor token itself (`self`) or of the token that predicts it (`previous`).

    Raises:
        ValueError: if `heads` names a type or an option that there is not, or a head cannot look at the tower's grid.
    """

    llm: Qwen2Config
    vit: TowerConfig
    latent_channels: int = 16
    vae_downsample: int = 8
    latent_patch_size: int = 2
    max_latent_size: int = 64
    vit_max_num_patch_per_side: int = 70
    connector_act: str = "gelu_pytorch_tanh"
    interpolate_pos: bool = False
    visual_gen: bool = True
    visual_und: bool = True
    heads: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    head_reads: Literal["self", "previous"] = "self"

    def __post_init__(self) -> None:
        for name, options in self.heads.items():
            head_class(name, options).require_tower(options, self.vit)

    @property
    def latent_token_width(self) -> int:
        return self.latent_channels * self.latent_patch_size**2

    @property
    def layout(self) -> LayoutSpec:
        """What the sequence layout has to know of the model."""
        return LayoutSpec(
            vit_patch_size=self.vit.patch_size,
            vit_positions_per_side=self.vit_max_num_patch_per_side,
            latent_stride=self.vae_downsample * self.latent_patch_size,
            latent_positions_per_side=self.max_latent_size,
            interpolate_pos=self.interpolate_pos,
        )
