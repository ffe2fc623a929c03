"""Starting values of every parameter, by name: pure functions of (seed, name), the same on any number of ranks."""

import hashlib
import math

import torch
from torch import Tensor

from modeling.bagel.config import BagelConfig
from modeling.ops.patch import sincos_table

ZERO_START = (
    "llm2vae.", "heads.box.out.2.", "heads.box.layers.2.", "heads.detr.box.4.", "heads.detr.cell_box.4.",
    "heads.detr.adapters.grid.up.", "heads.detr.adapters.states.up.",
)  # fmt: skip
"""The velocity, what the box head and the detector correct, and the detector's adapters start at nothing."""
FREQUENCIES = "positional_embedding"
"""Of SAM's code of places: normal with deviation 1, and never trained."""
RESIDUAL_OUTPUTS = ("o_proj", "down_proj", "out_proj", "fc2")


def fixed_tables(config: BagelConfig) -> dict[str, Tensor]:
    """The position tables, which are computed and never trained."""
    width = config.llm.hidden_size
    return {
        "latent_pos_embed.pos_embed": sincos_table(config.max_latent_size, width),
        "vit_pos_embed.pos_embed": sincos_table(config.vit_max_num_patch_per_side, width),
    }


def initial_value(name: str, shape: torch.Size, config: BagelConfig, seed: int) -> Tensor:
    """Starting value of one parameter.

    Args:
        name: its key.
        shape: its full shape.
        config: the model's.
        seed: of the run.

    Returns:
        float32. Norms 1, biases and what is in ZERO_START 0, matrices normal: the decoder's with `initializer_range`, others with
        1/sqrt(fan in); projections back into a residual stream are scaled by 1/sqrt(2 layers) (GPT-2). The ViT's learned
        positions start as a sine table.
    """
    if name.endswith("position_embedding.weight"):
        # Learned, but from a start in which neighbours are alike: the tower need not find out first what lies where.
        return sincos_table(config.vit.positions_per_side, config.vit.hidden_size)
    tables = fixed_tables(config) if name.endswith("pos_embed.pos_embed") else {}
    if name in tables:
        return tables[name]
    if name.endswith("bias") or name.startswith(ZERO_START):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("running_mean") else torch.ones(shape)
    std = 1.0 if name.endswith(FREQUENCIES) else 1 / math.sqrt(math.prod(shape[1:]))
    layers = config.vit.num_hidden_layers
    if name.startswith("language_model."):
        std, layers = config.llm.initializer_range, config.llm.num_hidden_layers
    if ".layers." in name and name.split(".")[-2].removesuffix("_moe_gen") in RESIDUAL_OUTPUTS:
        std /= math.sqrt(2 * layers)
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") % 2**63)
    return torch.randn(shape, generator=generator) * std
