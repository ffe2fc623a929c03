"""BagelConfig: everything that shapes the model, read from a model directory's JSON files."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from modeling.qwen2.config import Qwen2Config
from modeling.siglip.config import SiglipConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class BagelConfig:
    """Sizes and choices of the model.

    Attributes:
        llm, vit: the decoder and the vision tower.
        latent_channels: channels of the VAE's latent.
        latent_patch_size: latent cells per side that make one token.
        max_latent_size, vit_max_num_patch_per_side: sides of the two position tables.
        heads: perception head name -> its options.
        head_reads: the state a head reads: of the anchor token itself (`self`) or of the token that predicts it (`previous`).
    """

    llm: Qwen2Config
    vit: SiglipConfig
    latent_channels: int = 16
    latent_patch_size: int = 2
    max_latent_size: int = 64
    vit_max_num_patch_per_side: int = 70
    connector_act: str = "gelu_pytorch_tanh"
    interpolate_pos: bool = False
    heads: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    head_reads: Literal["self", "previous"] = "self"

    @property
    def latent_token_width(self) -> int:
        return self.latent_channels * self.latent_patch_size**2

    @staticmethod
    def from_model_dir(path: str | Path) -> "BagelConfig":
        """Read `llm_config.json`, `vit_config.json`, `bagel_config.json` and, for its channels, `ae_config.json`.

        Raises:
            ValueError: naming the file that is missing, unreadable or inconsistent.
        """
        root = Path(path)
        llm, vit = _read(root / "llm_config.json"), _read(root / "vit_config.json")
        bagel = _read(root / "bagel_config.json")
        ae = _read(root / "ae_config.json") if (root / "ae_config.json").is_file() else {}
        known = {f.name for f in fields(BagelConfig)}
        if unknown := sorted(set(bagel) - known):
            raise ValueError(
                f"{root / 'bagel_config.json'}: unknown key '{unknown[0]}'; known are {', '.join(sorted(known))}"
            )
        if bagel.get("head_reads", "self") not in ("self", "previous"):
            raise ValueError(
                f"{root / 'bagel_config.json'}: head_reads must be 'self' or 'previous', not '{bagel['head_reads']}'"
            )
        try:
            return BagelConfig(
                llm=Qwen2Config.from_json(llm),
                vit=SiglipConfig.from_json(vit),
                latent_channels=ae.get("z_channels", 16),
                **bagel,
            )
        except TypeError as e:
            raise ValueError(f"{root}: a model file lacks a key: {e}") from e


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, json.JSONDecodeError) as e:
        raise ValueError(f"{file}: cannot be read ({e}); --model_path must name a model directory") from e
