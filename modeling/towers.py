"""Vision towers by the `model_type` of `vit_config.json`: a new one is a module, a config and a row here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from modeling.sam.config import SamVisionConfig
from modeling.sam.tower import SamTower
from modeling.siglip.config import SiglipConfig
from modeling.siglip.model import SiglipVisionModel

TowerConfig = SiglipConfig | SamVisionConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """A kind of tower.

    Attributes:
        config: class of its sizes.
        read: the keys of `vit_config.json` -> its sizes.
        build: sizes -> module, `(patches, position, hw, plan) -> v d`.
        layers: its layers, by name in the model, if each can be a unit of sharding: a unit has to be run equally often on every
            rank, whatever sizes of pictures there are; "": they cannot.
        select_layer: `--vit_select_layer` of a fresh one, if it is not said.
    """

    config: type[TowerConfig]
    read: Callable[[Mapping[str, Any]], TowerConfig]
    build: Callable[[Any], nn.Module]
    layers: str = ""
    select_layer: int = -2


TOWERS: Mapping[str, Tower] = {
    "siglip_vision_model": Tower(
        config=SiglipConfig,
        read=SiglipConfig.from_json,
        build=SiglipVisionModel,
        layers="vit_model.vision_model.encoder.layers",
    ),
    "sam_vision_model": Tower(
        config=SamVisionConfig,
        read=lambda values: SamVisionConfig.from_json(values, "vit_config.json"),
        build=SamTower,
        select_layer=-1,  # the neck was trained on the last one
    ),
}


def tower_named(values: Mapping[str, Any]) -> Tower:
    """The row that a `vit_config.json` means; files that do not say are SigLIP's, as published."""
    return TOWERS.get(str(values.get("model_type")), TOWERS["siglip_vision_model"])


def tower_of(config: TowerConfig) -> Tower:
    """The row of a tower's sizes."""
    return next(row for row in TOWERS.values() if isinstance(config, row.config))
