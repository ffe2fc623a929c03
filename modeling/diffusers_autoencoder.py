"""A diffusers `AutoencoderKL` directory as the source of the image autoencoder: its `config.json` and names in our terms.

In: a directory with `config.json` (`_class_name` AutoencoderKL) and `diffusion_pytorch_model.safetensors`. Out: the keys of an
`ae_config.json`, and tensors under our names. The two describe the same network; they differ in names, in the numbering of the
decoder's levels (theirs counts from the lowest resolution, ours from the full one) and in the attention's projections (matrices
there, 1x1 convolutions here). diffusers itself is not needed; the tests compare with it.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

CONFIG_NAME, WEIGHTS_NAME = "config.json", "diffusion_pytorch_model.safetensors"
DEFAULTS: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
"""What diffusers' AutoencoderKL has where its file is silent."""

RENAMES = (
    (r"^(encoder|decoder)\.conv_norm_out\.", r"\1.norm_out."),
    (r"^encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r"encoder.down.\1.block.\2."),
    (r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
    (r"^decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.", r"decoder.up.\1.block.\2."),
    (r"^decoder\.up_blocks\.(\d+)\.upsamplers\.0\.", r"decoder.up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.group_norm\.", ".norm."),
    # The second names are those of directories that old versions wrote.
    (r"\.(?:to_q|query)\.", ".q."),
    (r"\.(?:to_k|key)\.", ".k."),
    (r"\.(?:to_v|value)\.", ".v."),
    (r"\.(?:to_out\.0|proj_attn)\.", ".proj_out."),
)


def read_diffusers_config(path: Path) -> dict[str, Any]:
    """The keys of an `ae_config.json`.

    Raises:
        ValueError: naming the key whose value the autoencoder here cannot have.
    """
    file = path / CONFIG_NAME
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ValueError(f"{file}: cannot be read ({e}); a diffusers autoencoder needs it") from e
    if not isinstance(stored, dict) or stored.get("_class_name") != "AutoencoderKL":
        name = stored.get("_class_name") if isinstance(stored, dict) else None
        raise ValueError(f"{file}: _class_name is {name!r}; only AutoencoderKL can be read")
    values = {**DEFAULTS, **stored}
    needed = {
        "act_fn": "silu",
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": True,
        "latents_mean": None,
        "latents_std": None,
    }
    for key, usual in needed.items():
        if values[key] != usual:
            raise ValueError(
                f"{file}: {key} is {values[key]!r}; an autoencoder of the FLUX kind has {usual!r}, and no other can be read"
            )
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if odd := [found for found in values.get(key, ()) if found != kind]:
            raise ValueError(f"{file}: {key} has {odd[0]}; only {kind} can be read")
    widths = values["block_out_channels"]
    if any(width % widths[0] for width in widths):
        raise ValueError(f"{file}: block_out_channels {widths} are no multiples of the first")
    return {
        "in_channels": values["in_channels"],
        "out_ch": values["out_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": values["layers_per_block"],
        "z_channels": values["latent_channels"],
        "num_groups": values["norm_num_groups"],
        "scale_factor": values["scaling_factor"],
        "shift_factor": values["shift_factor"] or 0.0,
        "resolution": values["sample_size"],
    }


def from_diffusers(tensors: Mapping[str, Tensor], num_levels: int) -> dict[str, Tensor]:
    """Tensors under our names; what has no counterpart keeps its name, for the check of keys to find.

    Args:
        tensors: as in the directory.
        num_levels: resolutions of the autoencoder.
    """
    return {_our_name(name, num_levels): _our_form(name, tensor) for name, tensor in tensors.items()}


def _our_name(name: str, num_levels: int) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"^decoder\.up\.(\d+)", lambda found: f"decoder.up.{num_levels - 1 - int(found[1])}", name)


def _our_form(name: str, tensor: Tensor) -> Tensor:
    is_projection = ".attentions." in name and name.endswith(".weight") and tensor.ndim == 2
    return tensor[:, :, None, None] if is_projection else tensor
