"""Sample plans -> one packed batch: tokens, places, positions, labels, weights, who sees whom."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from data.layout import LayoutSpec
from data.packing import pack
from data.tokens import SpecialTokens
from data.types import PackedBatch, Sample, Segment
from modeling.ops.attention import dense_allowed
from tests.parity.comparison import Comparison

WEIGHT_TOLERANCE = 1e-6
KINDS = {("vit_image", 0): "und_image", ("vae_image", 0): "cond_image", ("vae_image", 1): "gen_image"}
EXACT = {
    "packed_text_ids": "text_ids",
    "packed_text_indexes": "text_index",
    "packed_position_ids": "position",
    "packed_label_ids": "label_ids",
    "ce_loss_indexes": "label_index",
    "packed_vit_tokens": "und_patches",
    "packed_vit_position_ids": "und_position",
    "packed_vit_token_indexes": "und_index",
    "packed_latent_position_ids": "gen_position",
    "packed_vae_token_indexes": "gen_index",
}
"""Published name -> ours, of tensors that must be the same."""

Json = Mapping[str, Any]


def run(folder: Path) -> Comparison:
    """Everything of the batch; masks against the rule written out."""
    case = json.loads((folder / "inputs.json").read_text())
    facts = json.loads((folder / "expected.json").read_text())
    tensors = folder / "inputs.safetensors"
    images = load_file(tensors) if tensors.is_file() else {}
    expected = load_file(folder / "expected.safetensors")
    draws = iter(case["timestep_draws"])
    samples = [
        Sample(segments=tuple(_segments(s, case["data_config"], images, draws))) for s in case["samples"]
    ]
    batch = pack(samples, _spec(case), _special(case["special_tokens"]))

    found = Comparison()
    for theirs, ours in EXACT.items():
        value = getattr(batch, ours)
        if theirs in expected or len(value):
            found.equal(theirs, value, expected.get(theirs, torch.zeros(0)))
    if "ce_loss_weights" in expected:
        found.close("ce_loss_weights", batch.label_weight, expected["ce_loss_weights"], WEIGHT_TOLERANCE)
    if "packed_timesteps" in expected:
        found.close(
            "packed_timesteps", batch.gen_timestep, expected["packed_timesteps"].sigmoid(), WEIGHT_TOLERANCE
        )
        found.equal(
            "mse_loss_indexes",
            batch.gen_index[batch.gen_timestep > 0],
            expected.get("mse_loss_indexes", batch.gen_index[:0]),
        )
    found.equal(
        "patchified_vae_latent_shapes", batch.gen_hw.tolist(), facts.get("patchified_vae_latent_shapes", [])
    )
    for i, (ours, padded) in enumerate(zip(batch.gen_pixels, expected.get("padded_images", ()), strict=True)):
        found.equal(f"padded_images.{i}", ours, padded[:, : ours.shape[1], : ours.shape[2]])
    lens = expected["vit_token_seqlens"].tolist() if "vit_token_seqlens" in expected else []
    found.equal("vit_token_seqlens", batch.und_hw.prod(1).tolist(), lens)
    # The published packer's last sample of this form is padding up to the budget; ours is the sequence alone.
    padding = [case["max_num_tokens"] - batch.num_tokens] if case["use_flex"] else []
    found.equal("sequence_length", batch.num_tokens, facts["sequence_length"])
    found.equal("sample_lens", [*batch.sample_lens, *padding], facts["sample_lens"])
    if case["use_flex"]:
        found.equal("split_lens (padded)", [*batch.split_lens, *padding], facts["split_lens"])
        found.equal("attn_modes (padded)", [*batch.split_modes, "causal"], facts["attn_modes"])
    _compare_masks(found, batch, facts, expected)
    return found


def _segments(
    sample: Json, config: Json, images: Mapping[str, Tensor], draws: Iterator[float]
) -> Iterator[Segment]:
    texts, pictures = iter(sample["text_ids_list"]), iter(sample["image_tensor_list"])
    time = 0.0
    share = {"text": "text", "vit_image": "vit", "vae_image": "vae"}
    for item in sample["sequence_plan"]:
        dropped = bool(item["enable_cfg"]) and config[f"{share[item['type']]}_cond_dropout_prob"] == 1
        end_label = item["special_token_label"] if item["special_token_loss"] else None
        if item["type"] == "text":
            ids = torch.tensor(next(texts), dtype=torch.int64)
            yield Segment(
                kind="text", ids=ids, supervised=bool(item["loss"]), dropped=dropped, end_label=end_label
            )
            continue
        kind = KINDS[item["type"], item["loss"]]
        same_split = not item.get("split_start", True)
        if kind == "gen_image" and not same_split and not dropped:
            time = float(torch.tensor(next(draws)).sigmoid())
        yield Segment(
            kind=kind,  # type: ignore[arg-type]
            pixels=images[next(pictures)],
            timestep=time if kind == "gen_image" else 0.0,
            dropped=dropped,
            end_label=end_label,
            frame_delta=item.get("frame_delta"),
            same_split=same_split,
        )


def _compare_masks(
    found: Comparison, batch: PackedBatch, facts: Json, expected: Mapping[str, Tensor]
) -> None:
    splits = [n for s in facts["per_sample_split_lens"] for n in s]
    found.equal("split_lens", list(batch.split_lens), splits)
    found.equal("attn_modes", list(batch.split_modes), [m for s in facts["per_sample_attn_modes"] for m in s])
    allowed = dense_allowed(batch.sample_lens, batch.split_lens, batch.split_modes, batch.split_branches)
    start = 0
    for i, n in enumerate(batch.sample_lens):
        if (name := f"nested_attention_masks.{i}") in expected:
            found.equal(name, allowed[start : start + n, start : start + n], expected[name])
        start += n


def _spec(case: Json) -> LayoutSpec:
    config = case["data_config"]
    return LayoutSpec(
        vit_patch_size=config["vit_patch_size"],
        vit_positions_per_side=config["max_num_patch_per_side"],
        latent_stride=config["vae_image_downsample"],
        latent_positions_per_side=config["max_latent_size"],
        interpolate_pos=case["interpolate_pos"],
    )


def _special(ids: Json) -> SpecialTokens:
    return SpecialTokens(
        begin=ids["bos_token_id"],
        end=ids["eos_token_id"],
        image_start=ids["start_of_image"],
        image_end=ids["end_of_image"],
        anchors={},
    )
