"""BagelConfig: everything that shapes the model, read from a model directory's JSON files."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from data.layout import LayoutSpec
from modeling.qwen2.config import Qwen2Config
from modeling.siglip.config import SiglipConfig
from modeling.weights import Weights, find_weights, open_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BagelConfig:
    """Sizes and choices of the model.

    Attributes:
        llm, vit: the decoder and the vision tower.
        latent_channels: channels of the VAE's latent.
        latent_patch_size: latent cells per side that make one token.
        vae_downsample: pixels per latent cell.
        max_latent_size, vit_max_num_patch_per_side: sides of the two position tables.
        heads: perception head name -> its options.
        head_reads: the state a head reads: of the anchor token itself (`self`) or of the token that predicts it (`previous`).
    """

    llm: Qwen2Config
    vit: SiglipConfig
    latent_channels: int = 16
    vae_downsample: int = 8
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

    @staticmethod
    def from_model_dir(path: str | Path) -> "BagelConfig":
        """Read `llm_config.json`, `vit_config.json`, and, where they are, `bagel_config.json` and `ae_config.json`.

        Published directories have no `bagel_config.json`, and their `vit_config.json` counts a layer that is not there: what
        the weights' keys and shapes say of the layers, the experts and the position tables comes first.

        Raises:
            ValueError: naming the file that is missing, unreadable or inconsistent.
        """
        root = Path(path)
        llm, vit = _read(root / "llm_config.json"), _read(root / "vit_config.json")
        given = root / "bagel_config.json"
        bagel = _read(given) if given.is_file() else {}
        ae = _read(root / "ae_config.json") if (root / "ae_config.json").is_file() else {}
        known = {f.name for f in fields(BagelConfig)} - {"llm", "vit", "latent_channels", "vae_downsample"}
        if unknown := sorted(set(bagel) - known):
            raise ValueError(
                f"{root / 'bagel_config.json'}: unknown key '{unknown[0]}'; known are {', '.join(sorted(known))}"
            )
        file = find_weights(root, "ema") or find_weights(root, "model")
        if file is not None:
            llm, vit, bagel = _as_stored(open_weights(file), llm, vit, bagel)
        if bagel.get("head_reads", "self") not in ("self", "previous"):
            raise ValueError(
                f"{root / 'bagel_config.json'}: head_reads must be 'self' or 'previous', not '{bagel['head_reads']}'"
            )
        try:
            return BagelConfig(
                llm=Qwen2Config.from_json(llm),
                vit=SiglipConfig.from_json(vit),
                latent_channels=ae.get("z_channels", 16),
                vae_downsample=2 ** (len(ae.get("ch_mult", (1, 2, 4, 4))) - 1),
                **bagel,
            )
        except TypeError as e:
            raise ValueError(f"{root}: a model file lacks a key: {e}") from e


TABLES = {
    "latent_pos_embed.pos_embed": "max_latent_size",
    "vit_pos_embed.pos_embed": "vit_max_num_patch_per_side",
}


def _as_stored(
    weights: Weights, llm: dict[str, Any], vit: dict[str, Any], bagel: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The configurations, corrected by what the weights hold."""
    sides = {TABLES[key]: side for key, side in weights.table_sides.items()}
    # Our own directories, which have a bagel_config.json, count right: a layer too few in the file is an error there.
    if weights.vit_depth and not bagel and weights.vit_depth != vit.get("num_hidden_layers"):
        logger.warning("%s: holds %d layers of the vision tower, vit_config.json says %s; the file counts",
                       weights.name, weights.vit_depth, vit.get("num_hidden_layers"))  # fmt: skip
        vit = {**vit, "num_hidden_layers": weights.vit_depth}
    if "layer_module" not in llm:
        experts = "MoT" if any("q_proj_moe_gen" in k for k in weights.shapes) else "MoE"
        split = any("_moe_gen" in k for k in weights.shapes)
        llm = {**llm, "layer_module": f"Qwen2{experts if split else ''}DecoderLayer"}
    if "qk_norm" not in llm:
        llm = {**llm, "qk_norm": any(k.endswith("self_attn.q_norm.weight") for k in weights.shapes)}
    return llm, vit, {**sides, **bagel}


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, json.JSONDecodeError) as e:
        raise ValueError(f"{file}: cannot be read ({e}); --model_path must name a model directory") from e
