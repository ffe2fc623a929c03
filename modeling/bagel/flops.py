"""Floating-point operations that a training step of a pack needs: for the MFU.

What is computed twice (recompute) or in vain (padding) is not counted, nor are the frozen autoencoder and the perception heads,
so the figure is on the low side.
"""

from data.layout import visible_pairs
from data.types import PackedBatch
from modeling.bagel.config import BagelConfig

TRAINED, FROZEN = 3, 1
"""Forward and two products of its size in backward; forward alone."""


def step_flops(config: BagelConfig, batch: PackedBatch, *, vit_trained: bool = True) -> float:
    """Operations of forward and backward over one pack; a multiplication and an addition are two.

    Args:
        config: sizes of the model.
        batch: the pack; every token goes through one expert, logits are made at labels only.
        vit_trained: whether gradients go through the vision tower.
    """
    llm, vit = config.llm, config.vit
    width, kv = llm.hidden_size, llm.num_key_value_heads * llm.head_dim
    layer = 3 * width * llm.intermediate_size + 2 * width * width + 2 * width * kv
    pairs = visible_pairs(batch.sample_lens, batch.split_lens, batch.split_modes, batch.split_branches)
    trunk = llm.num_hidden_layers * (layer * batch.num_tokens + 2 * width * pairs)
    head = width * llm.vocab_size * len(batch.label_ids)
    # Into and out of the trunk, and the timestep's two layers.
    latent = len(batch.gen_index) * (2 * config.latent_token_width * width + 256 * width + width * width)

    patches = len(batch.und_index)
    own = sum((h * w) ** 2 for h, w in batch.und_hw.tolist())
    block = 4 * vit.hidden_size**2 + 2 * vit.hidden_size * vit.intermediate_size
    tower = vit.num_hidden_layers * (block * patches + 2 * vit.hidden_size * own)
    tower += patches * vit.hidden_size * 3 * vit.patch_size**2
    connector = patches * (vit.hidden_size * width + width * width)
    return 2.0 * (
        TRAINED * (trunk + head + latent + connector) + (TRAINED if vit_trained else FROZEN) * tower
    )
