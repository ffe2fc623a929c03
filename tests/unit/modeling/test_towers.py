"""SAM's encoder as the language model's tower: the same states as the encoder gives, from packed patches."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.packing import pack
from data.types import Sample
from modeling.bagel.config import BagelConfig
from modeling.bagel.shard_plan import shard_plan
from modeling.build import build_model, starting_values
from modeling.ops.attention import AttentionPlan
from modeling.sam.config import SamVisionConfig
from modeling.sam.encoder import normalised
from modeling.sam.tower import SamTower
from modeling.source import read_source
from tests.unit.modeling.published import LLM, write_autoencoder, write_json
from tests.unit.modeling.test_sam import GOLDEN, tiny_sam
from tests.unit.modeling.test_segmenting import asked, blob, losses, sam_directory
from tests.unit.modeling.tiny import (
    SMALL_DECODER,
    SMALL_ENCODER,
    SPEC,
    SPECIAL,
    picture,
    text_sample,
    tiny_config,
    tiny_model,
)

CONFIG = SamVisionConfig.from_json({**SMALL_ENCODER, "image_size": 64}, "here")
PLAN = AttentionPlan.build([1], [1], ["full"], [0], torch.device("cpu"))


def shared() -> BagelConfig:
    head = {"type": "sam", "vision_sharing": "sam", "decoder": SMALL_DECODER, "fine_channels": 8}
    return replace(tiny_config(), vit=CONFIG, heads={"box": {"width": 16}, "mask": head})


@torch.no_grad()
def test_packed_pictures_of_any_size_are_encoded_as_alone() -> None:
    tower = SamTower(CONFIG)
    for p in tower.parameters():
        torch.nn.init.normal_(p, std=0.1)
    pictures = [picture(1, 64, 64), picture(2, 32, 48), picture(3, 64, 64)]
    batch = pack(
        [Sample(segments=asked([torch.ones(*p.shape[1:], dtype=torch.uint8)]).segments) for p in pictures],
        SPEC,
        SPECIAL,
    )
    hw = tuple((int(h), int(w)) for h, w in batch.und_hw.tolist())
    patches = batch.und_patches.float() / 127.5 - 1
    states = tower(patches, batch.und_position, hw, PLAN)
    alone = [
        tower(part, part, (size,), PLAN)
        for part, size in zip(patches.split([h * w for h, w in hw]), hw, strict=True)
    ]
    torch.testing.assert_close(states, torch.cat(alone), rtol=1e-5, atol=1e-5)
    pixels = normalised(
        batch.und_patches[: hw[0][0] * hw[0][1]]
        .view(hw[0][0], hw[0][1], 8, 8, 3)
        .permute(4, 0, 2, 1, 3)
        .reshape(3, 64, 64)
    )
    direct = tower.vision_model["encoder"](pixels[None]).flatten(0, 2)
    torch.testing.assert_close(states[: len(direct)], direct, rtol=1e-4, atol=1e-4)


def test_masks_and_language_share_it_and_it_learns_from_both() -> None:
    model = tiny_model(shared())
    terms = losses(model, pack([asked([blob(), blob(seed=5)]), asked([blob(64, 40)])], SPEC, SPECIAL))
    torch.stack(list(terms.values())).sum().backward()
    for name in (
        "vit_model.vision_model.encoder.layers.0.attn.qkv.weight",
        "connector.fc1.weight",
        "heads.mask.neck.conv1.weight",
    ):
        grad = model.get_parameter(name).grad
        assert grad is not None and grad.any(), name
    nothing = losses(model, pack([text_sample()], SPEC, SPECIAL))
    assert all(total.item() == 0 and total.requires_grad for total in nothing.values())
    # Run as often as there are sizes of pictures, its layers cannot be units of their own.
    names = [unit.fqn for unit in shard_plan(model.config)]
    assert "vit_model" in names and not any("vision_model" in name for name in names)


def test_mode_and_tower_have_to_agree() -> None:
    with pytest.raises(
        ValueError, match="vision_sharing is 'sam', and the vision tower .* is not SAM's: say vlm"
    ):
        replace(tiny_config(), heads={"mask": {"type": "sam", "vision_sharing": "sam"}})
    with pytest.raises(
        ValueError, match="vision_sharing is 'vlm', and the vision tower .* is SAM's: say sam"
    ):
        replace(tiny_config(), vit=CONFIG, heads={"mask": {"type": "sam"}})


def test_a_sam_directory_gives_tower_neck_and_decoder(tmp_path: Path) -> None:
    sam = sam_directory(tmp_path / "sam")
    base = tmp_path / "base"
    base.mkdir()
    write_json(base / "llm_config.json", LLM)
    head = {"type": "sam", "vision_sharing": "sam", "fine_channels": 0}
    write_json(base / "bagel_config.json", {"max_latent_size": 6, "heads": {"mask": head}})
    write_autoencoder(base)
    source = read_source(base, vit_path=sam, mask_path=sam, from_scratch=True)
    assert isinstance(source.config.vit, SamVisionConfig) and source.config.vit.num_hidden_layers == 2
    assert source.config.vit_max_num_patch_per_side == 4
    model = build_model(source.config)
    value = starting_values(source, model, weights="model", seed=0)
    parts = tiny_sam()
    for name, p in model.named_parameters():
        for ours, theirs in (
            ("vit_model.vision_model.encoder.", "vision_encoder."),
            ("heads.mask.neck.", "vision_encoder.neck."),
            ("heads.mask.mask_decoder.", "mask_decoder."),
        ):
            if name.startswith(ours):
                assert torch.equal(value(name, p.shape), parts.get_parameter(name.replace(ours, theirs))), (
                    name
                )
    with pytest.raises(ValueError, match=re.escape("--vit_rope True: the tower of")):
        read_source(base, vit_path=sam, mask_path=sam, from_scratch=True, flags={"vit_rope": True})
    assert (GOLDEN / "hf_sam_tiny_config.json").is_file()


def test_bf16_weights_see_the_same_places() -> None:
    code = tiny_sam()["shared_image_embedding"]
    exact = code.grid(7, 9)
    rounded = code.bfloat16().grid(7, 9)
    assert rounded.dtype == torch.bfloat16
    # What is left is the rounding of frequencies (0.4 %) and of the result.
    assert float((rounded.float() - exact).abs().mean()) < 0.02
