"""The tiny models and packs of golden cases in this project's types."""

import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data.types import PackedBatch
from modeling.autoencoder import AutoEncoder, load_autoencoder
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig
from modeling.ops.flow import interpolate_path, shift_time
from modeling.ops.patch import patchify_latent
from modeling.qwen2.config import Qwen2Config
from modeling.siglip.config import SiglipConfig
from modeling.types import FlowState

NO_VIT = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "patch_size": 14,
    "image_size": 112,
}  # fmt: skip
"""A tower for cases that have none; its weights are zero."""


def build_model(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Bagel:
    """The case's model with its weights.

    Raises:
        ValueError: if the weights and the configuration do not belong together.
    """
    model = Bagel(
        BagelConfig(
            llm=Qwen2Config.from_json(config["llm_config"]),
            vit=SiglipConfig.from_json(config["vit_config"] or NO_VIT),
            latent_channels=(config["vae_config"] or {"z_channels": 4})["z_channels"],
            latent_patch_size=config["latent_patch_size"],
            max_latent_size=config["max_latent_size"],
            vit_max_num_patch_per_side=config["vit_max_num_patch_per_side"],
            connector_act=config["connector_act"],
            interpolate_pos=config["interpolate_pos"],
            visual_gen=config["visual_gen"],
            visual_und=config["visual_und"],
        )
    )
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    # The tower's rotary tables are computed here, not stored.
    kept = {k: v for k, v in weights.items() if ".rope." not in k}
    found = model.load_state_dict(kept, strict=False)
    if found.unexpected_keys or found.missing_keys:
        raise ValueError(f"weights: unexpected {found.unexpected_keys[:3]}, missing {found.missing_keys[:3]}")
    frozen = config.get("frozen", {})
    if frozen.get("freeze_llm"):
        model.language_model.requires_grad_(False)
    if frozen.get("freeze_vit"):
        model.vit_model.requires_grad_(False)
    return model


def build_autoencoder(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> AutoEncoder:
    """The case's VAE, loaded as any `ae.safetensors`."""
    with tempfile.TemporaryDirectory() as directory:
        save_file(dict(weights), Path(directory) / "ae.safetensors")
        (Path(directory) / "ae_config.json").write_text(json.dumps(config))
        return load_autoencoder(directory).eval().requires_grad_(False)


def pack_of(
    x: Mapping[str, Tensor], shape: Mapping[str, Any], config: BagelConfig, shift: float
) -> PackedBatch:
    """A golden pack as ours; `shape` holds its lists of lengths, modes and latent sizes.

    The padding that the published packer appends (a last sample of one causal split) is no part of ours.
    """
    total = shape["sequence_length"]
    sample_lens = _until(shape["sample_lens"], total)
    split_lens, split_modes = _splits(shape, total)
    none, patch = torch.zeros(0, dtype=torch.int64), config.vit.patch_size
    lens = x.get("vit_token_seqlens", none).tolist()
    raw = x.get("packed_timesteps", torch.zeros(0))
    return PackedBatch(
        text_ids=x["packed_text_ids"],
        text_index=x["packed_text_indexes"],
        position=x["packed_position_ids"],
        label_ids=x.get("packed_label_ids", none),
        label_index=x.get("ce_loss_indexes", none),
        label_weight=x.get("ce_loss_weights", torch.zeros(0)),
        label_role=torch.zeros_like(x.get("packed_label_ids", none)),
        und_patches=x.get("packed_vit_tokens", torch.zeros(0, 3 * patch**2)),
        und_position=x.get("packed_vit_position_ids", none),
        und_index=x.get("packed_vit_token_indexes", none),
        und_hw=torch.tensor([[1, n] for n in lens], dtype=torch.int64).reshape(-1, 2),
        und_views=(),
        gen_pixels=(),
        gen_hw=torch.tensor(shape.get("patchified_vae_latent_shapes", []), dtype=torch.int64).reshape(-1, 2),
        gen_position=x.get("packed_latent_position_ids", none),
        gen_index=x.get("packed_vae_token_indexes", none),
        gen_timestep=shift_time(raw.sigmoid(), shift),
        gen_seed=none,
        gen_key=none,
        regions={},
        sample_lens=sample_lens,
        split_lens=split_lens,
        split_modes=split_modes,
        split_branches=(0,) * len(split_lens),
    )


def _splits(shape: Mapping[str, Any], total: int) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    if "per_sample_split_lens" in shape:
        lens = [n for s in shape["per_sample_split_lens"] for n in s]
        modes = [m for s in shape["per_sample_attn_modes"] for m in s]
    else:
        lens, modes = shape["split_lens"], shape["attn_modes"]
    kept = _until(lens, total)
    return kept, tuple(modes[: len(kept)])


def _until(lens: Sequence[int], total: int) -> tuple[int, ...]:
    """The first lengths that add up to `total`."""
    ends = list(itertools.accumulate(lens))
    return tuple(lens[: ends.index(total) + 1])


def flow_of(
    x: Mapping[str, Tensor], noise: Tensor | None, batch: PackedBatch, config: BagelConfig
) -> FlowState:
    """Clean and noised latents of a golden pack, from its padded latents."""
    p, width = config.latent_patch_size, config.latent_token_width
    latents = [torch.zeros(0, width)]
    for padded, (rows, cols) in zip(x.get("padded_latent", []), batch.gen_hw.tolist(), strict=True):
        latents.append(patchify_latent(padded[:, : rows * p, : cols * p], p))
    clean = torch.cat(latents)
    noise = torch.zeros(0, width) if noise is None else noise
    return FlowState(latents=clean, noise=noise, noised=interpolate_path(clean, noise, batch.gen_timestep))
