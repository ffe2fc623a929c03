"""SiglipConfig: what a `vit_config.json` says of the vision tower."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SiglipConfig:
    """Sizes of the tower; names as in `vit_config.json`. `num_hidden_layers` counts the layers that are really built.

    `rope`: rotary positions instead of learned ones. `stem_width` is ours: channels of a convolutional stem whose output is
    added to the linear patch embedding; 0, as published: none.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    image_size: int
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    rope: bool = False
    stem_width: int = 0

    @property
    def positions_per_side(self) -> int:
        return self.image_size // self.patch_size

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "SiglipConfig":
        """Keep the keys that shape the network."""
        return SiglipConfig(**{f.name: values[f.name] for f in fields(SiglipConfig) if f.name in values})
