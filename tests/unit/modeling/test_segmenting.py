"""Mask heads in the whole model: what learns, several <SEG> in an answer and none, borders and single pixels, starting values."""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.packing import pack
from data.types import PackedBatch, Region, Sample, Segment
from modeling.bagel.decode import Decoder
from modeling.bagel.regions import regions_of
from modeling.build import build_model, initial_values, starting_values
from modeling.heads.masks import unpadded
from modeling.mask_autoencoder import MaskAutoencoder, MaskAutoencoderConfig, save_mask_autoencoder
from modeling.source import read_source
from modeling.types import HeadOutput
from tests.unit.modeling.published import LLM, VIT, write_autoencoder, write_json
from tests.unit.modeling.test_sam import CONFIG, GOLDEN
from tests.unit.modeling.tiny import (
    MASK_HEADS,
    SMALL_CODES,
    SPEC,
    SPECIAL,
    made_up_latents,
    mask_config,
    picture,
    text,
    tiny_model,
)
from train.args import ParamArgs
from train.objective import Objective
from train.param_manager import freeze

KINDS = tuple(MASK_HEADS)
SEG = SPECIAL.anchors["mask"]
WEIGHTS = {"mask_bce": 1.0, "mask_dice": 1.0, "mask_iou": 1.0, "mask_code": 1.0, "mask_soft_iou": 1.0}


def pictured(seed: int, height: int, width: int) -> Segment:
    """A picture and, as SAM's encoder of 32 px wants it, its view."""
    pixels = picture(seed, height, width)
    scale = 32 / max(height, width)
    size = (round(height * scale), round(width * scale))
    view = torch.nn.functional.interpolate(pixels[None].float(), size=size)[0].to(torch.uint8)
    return Segment(kind="und_image", pixels=pixels, view=view)


def asked(masks: Sequence[Tensor], seed: int = 1) -> Sample:
    """A picture, a question, an answer with a <SEG> for each mask; none for none."""
    height, width = masks[0].shape if masks else (32, 64)
    answer = [t for _ in masks for t in (12, SEG)] or [13]
    return Sample(
        segments=(pictured(seed, height, width), text(10, 11), text(*answer, supervised=True)),
        regions=tuple(
            Region(head="mask", segment=2, token=2 * i + 1, image=0, mask=mask)
            for i, mask in enumerate(masks)
        ),
    )


def blob(height: int = 32, width: int = 64, seed: int = 0) -> Tensor:
    mask = torch.zeros(height, width, dtype=torch.uint8)
    mask[4 + seed : 20 + seed, 8:40] = 1
    return mask


def losses(model: Any, batch: PackedBatch) -> dict[str, Tensor]:
    flow = made_up_latents(batch)
    objective = Objective.build(WEIGHTS, model.config.heads)
    return {t.name: t.total for t in objective.terms(model(batch, flow.noised), batch, flow)}


@pytest.mark.parametrize("kind", KINDS)
def test_projections_and_neck_learn_and_what_is_frozen_does_not(kind: str) -> None:
    model = tiny_model(mask_config(kind))
    freeze(model, ParamArgs())
    batch = pack([asked([blob(), blob(seed=5)]), asked([blob(64, 40)], seed=2)], SPEC, SPECIAL)
    torch.stack(list(losses(model, batch).values())).sum().backward()
    head = model.heads["mask"]
    own = ("vision_encoder.", "autoencoder.")
    for name, p in head.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.any(), f"no gradient reaches {name}"
            assert not name.startswith(own)
        else:
            assert p.grad is None
    trained = {name.partition(".")[0] for name, p in head.named_parameters() if p.requires_grad}
    expected = {
        "sam": {"projection", "neck", "fine", "mask_decoder", "prompt_encoder"},
        "separate": {"projection", "mask_decoder", "prompt_encoder"},
        "autoencoder": {"to_code"},
    }
    assert trained == expected.get(kind, trained)
    reached = [p.grad is not None and bool(p.grad.any()) for p in model.vit_model.parameters()]
    assert any(reached), "the tower learns from masks"


def test_the_encoders_of_masks_are_trained_when_asked() -> None:
    for kind, part in (
        ("separate", "vision_encoder.layers.0.attn.qkv.weight"),
        ("autoencoder", "autoencoder.linear_dec.weight"),
    ):
        model = tiny_model(mask_config(kind))
        freeze(model, ParamArgs(freeze_mask_encoder=False))
        batch = pack([asked([blob()])], SPEC, SPECIAL)
        torch.stack(list(losses(model, batch).values())).sum().backward()
        grad = model.heads["mask"].get_parameter(part).grad
        assert grad is not None and grad.any(), part


def test_losses_are_those_that_the_head_gives() -> None:
    names = {kind: set(Objective.build(WEIGHTS, mask_config(kind).heads).weights) for kind in KINDS}
    plain = {"mask_bce", "mask_dice", "mask_soft_iou"}
    assert names == {
        "mask": plain, "sam": plain | {"mask_iou"}, "separate": plain | {"mask_iou"}, "autoencoder": plain | {"mask_code"},
    }  # fmt: skip
    silent = Objective.build(
        {**WEIGHTS, "mask_code": 0.0, "mask_soft_iou": 0.0}, mask_config("autoencoder").heads
    )
    assert set(silent.weights) == {"mask_bce", "mask_dice"}


def decoder(kind: str) -> Decoder:
    return Decoder(tiny_model(mask_config(kind)).eval(), made_up_latents, SPEC, SPECIAL)  # type: ignore[arg-type]


def perceived(d: Decoder, sample: Sample) -> list[tuple[str, HeadOutput]]:
    """What inference finds, if the model writes the sample's answer."""
    context = d.start(1)
    for segment in sample.segments[:2]:
        d.prefill(context, [segment])
    answer = iter(sample.segments[2].ids.tolist())
    written = d.write(context, 10, choose=lambda logits, rows: torch.tensor([next(answer, SPECIAL.end)]))
    return d.perceive(context, written)[0]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_several_segs_in_an_answer_each_have_their_mask(kind: str) -> None:
    sample, d = asked([blob(), blob(seed=7), blob(seed=3)]), decoder(kind)
    batch = pack([sample], SPEC, SPECIAL)
    trained = d.model(batch, made_up_latents(batch).noised).heads["mask"]
    found = perceived(d, sample)
    assert [name for name, _ in found] == ["mask"] * 3
    for (_, one), want in zip(found, trained.each(), strict=True):
        assert one.mask_hw == want.mask_hw == ((32, 64),)
        torch.testing.assert_close(one.mask_logits, want.mask_logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0][1].mask_logits, found[1][1].mask_logits)
    boxes, masks = regions_of(found, (150, 90))  # the original picture
    assert not boxes and [m.shape for m in masks] == [(90, 150)] * 3


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_no_seg_is_no_mask(kind: str) -> None:
    d = decoder(kind)
    assert perceived(d, asked([])) == []
    terms = losses(d.model, pack([asked([])], SPEC, SPECIAL))
    assert all(total.item() == 0 for total in terms.values())


@pytest.mark.parametrize("kind", KINDS)
def test_single_pixels_and_borders_have_finite_losses_and_gradients(kind: str) -> None:
    pixel, border, whole = (torch.zeros(32, 64, dtype=torch.uint8) for _ in range(3))
    pixel[31, 63] = 1
    border[0], border[:, 0], border[-1], border[:, -1] = 1, 1, 1, 1
    whole[:] = 1
    model = tiny_model(mask_config(kind))
    terms = losses(model, pack([asked([pixel, border, whole])], SPEC, SPECIAL))
    torch.stack(list(terms.values())).sum().backward()
    assert all(t.isfinite() for t in terms.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("hw", [(41, 64), (64, 41), (64, 64), (5, 64)])
def test_what_touches_the_border_still_does_after_the_square(hw: tuple[int, int]) -> None:
    size = (3 * hw[0], 3 * hw[1])
    for edge in ("top", "bottom", "left", "right"):
        square = torch.full((1, 64, 64), -4.0)
        inside = square[:, : hw[0], : hw[1]]
        width = 4
        {
            "top": inside[:, :width],
            "bottom": inside[:, -width:],
            "left": inside[..., :width],
            "right": inside[..., -width:],
        }[edge].fill_(4.0)
        full = unpadded(square, 64, hw, size)[0] > 0
        line = {"top": full[0], "bottom": full[-1], "left": full[:, 0], "right": full[:, -1]}[edge]
        assert full.shape == size and bool(line.all())
        share = float(full.float().mean())
        along = hw[0] if edge in ("top", "bottom") else hw[1]
        assert share == pytest.approx(min(1.0, width / along), abs=0.02)


def test_one_pixel_of_a_mask_comes_back_at_the_original_size() -> None:
    logits = torch.full((8, 8), -1.0)
    logits[7, 0] = 1.0
    found = HeadOutput(boxes=torch.zeros(0, 4), mask_logits=logits.flatten(), mask_hw=((8, 8),))
    (mask,) = regions_of([("mask", found)], (8, 8))[1]
    assert mask.sum() == 1 and mask[7, 0]
    (mask,) = regions_of([("mask", found)], (80, 40))[1]
    assert mask[-1, 0] and 0 < mask.mean() < 0.05


def test_a_picture_without_its_view_is_named() -> None:
    sample = asked([blob()])
    blind = replace(
        sample, segments=(replace(sample.segments[0], view=torch.zeros(3, 0, 0)), *sample.segments[1:])
    )
    batch = pack([blind], SPEC, SPECIAL)
    with pytest.raises(ValueError, match="head_image_transform_args {type: sam, image_size: 32}"):
        losses(tiny_model(mask_config("separate")), batch)


# ------------------------------------------------------------------------------------------------ --mask_path


def model_directory(folder: Path, mask: dict[str, Any]) -> Path:
    folder.mkdir()
    write_json(folder / "llm_config.json", LLM)
    write_json(folder / "vit_config.json", VIT)
    write_json(
        folder / "bagel_config.json",
        {"max_latent_size": 6, "vit_max_num_patch_per_side": 8, "heads": {"mask": mask}},
    )
    write_autoencoder(folder)
    return folder


def sam_directory(folder: Path) -> Path:
    """A Hugging Face SAM directory: random weights, every key."""
    folder.mkdir()
    write_json(folder / "config.json", {"model_type": "sam", **CONFIG})
    (folder / "model.safetensors").write_bytes((GOLDEN / "hf_sam_tiny_state_dict.safetensors").read_bytes())
    return folder


def test_a_sam_directory_loads_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sam = sam_directory(tmp_path / "sam")
    base = model_directory(tmp_path / "base", {"type": "sam", "vision_sharing": "separate"})
    source = read_source(base, mask_path=sam, from_scratch=True)
    assert source.config.heads["mask"]["encoder"]["hidden_size"] == 48
    model = build_model(source.config)
    with caplog.at_level(logging.INFO):
        value = starting_values(source, model, weights="model", seed=0)
    # Every tensor of the file but the second copy of the code of places, and all that the head has but its projection.
    stored = load_file(sam / "model.safetensors")
    assert any(
        re.search(r"heads\.mask: 174 of 178 tensors loaded, 0 in the file not used, 4 start", m)
        for m in caplog.messages
    ), caplog.messages
    for key, tensor in stored.items():
        if key != "prompt_encoder.shared_embedding.positional_embedding":
            assert torch.equal(value(f"heads.mask.{key}", tensor.shape), tensor), key
    drawn = initial_values(source.config, 0)
    name = "heads.mask.projection.0.weight"
    assert torch.equal(value(name, torch.Size((32, 32))), drawn(name, torch.Size((32, 32))))


def test_a_shared_grid_takes_the_decoder_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sam = sam_directory(tmp_path / "sam")
    source = read_source(
        model_directory(tmp_path / "base", {"type": "sam"}), mask_path=sam, from_scratch=True
    )
    model = build_model(source.config)
    with caplog.at_level(logging.INFO):
        value = starting_values(source, model, weights="model", seed=0)
    # Encoder and neck of the file are not for a grid of the tower.
    assert any("heads.mask: 137 of" in m and "37 in the file not used" in m for m in caplog.messages)
    token = "mask_decoder.iou_token.weight"
    stored = load_file(sam / "model.safetensors")[token]
    assert torch.equal(value(f"heads.mask.{token}", stored.shape), stored)


def test_a_mask_autoencoder_loads_whole(tmp_path: Path) -> None:
    trained = tmp_path / "codes"
    trained.mkdir()
    torch.manual_seed(0)
    small = MaskAutoencoder(MaskAutoencoderConfig.from_json(SMALL_CODES, "here"))
    save_mask_autoencoder(small, trained)
    source = read_source(
        model_directory(tmp_path / "base", {"type": "autoencoder"}), mask_path=trained, from_scratch=True
    )
    assert source.config.heads["mask"]["autoencoder"]["code"] == 16
    value = starting_values(source, build_model(source.config), weights="model", seed=0)
    for name, p in small.named_parameters():
        assert torch.equal(value(f"heads.mask.autoencoder.{name}", p.shape), p.detach()), name


def test_what_is_wrong_with_a_directory_is_named(tmp_path: Path) -> None:
    sam = sam_directory(tmp_path / "sam")
    base = model_directory(tmp_path / "base", {"type": "sam", "vision_sharing": "separate"})

    def read(**changes: Any) -> None:
        config = {"model_type": "sam", **CONFIG, **changes}
        write_json(sam / "config.json", config)
        source = read_source(base, mask_path=sam, from_scratch=True)
        starting_values(source, build_model(source.config), weights="model", seed=0)

    with pytest.raises(ValueError, match="model_type is 'clip'; only sam and sam2"):
        read(model_type="clip")
    with pytest.raises(ValueError, match="SAM 2's image encoder is not built"):
        read(model_type="sam2")
    with pytest.raises(ValueError, match=r"lacks heads\.mask\.vision_encoder\.layers\.2"):
        read(vision_config={**CONFIG["vision_config"], "num_hidden_layers": 3})
    stored = load_file(sam / "model.safetensors")
    stored["shared_image_embedding.positional_embedding"] += 1
    save_file(stored, sam / "model.safetensors")
    with pytest.raises(ValueError, match="differ; they are one tensor in SAM"):
        read()
    plain = model_directory(tmp_path / "plain", {})
    with pytest.raises(ValueError, match="the mask head is MaskHead, which starts from no directory"):
        read_source(plain, mask_path=sam, from_scratch=True)
    assert json.loads((plain / "bagel_config.json").read_text())["heads"] == {"mask": {}}


def test_a_sam_2_directory_gives_its_decoder_to_a_shared_grid(tmp_path: Path) -> None:
    sizes = json.loads((GOLDEN / "hf_sam2_decoder_tiny_io.json").read_text())["config"]
    folder = tmp_path / "sam2"
    folder.mkdir()
    write_json(folder / "config.json", {"model_type": "sam2", "mask_decoder_config": sizes})
    decoder = load_file(GOLDEN / "hf_sam2_decoder_tiny_state_dict.safetensors")
    stored = {f"mask_decoder.{key}": tensor for key, tensor in decoder.items()}
    stored["shared_image_embedding.positional_embedding"] = torch.randn(2, 16)
    save_file(stored, folder / "model.safetensors")
    head = {"type": "sam", "stability": True}
    source = read_source(model_directory(tmp_path / "base", head), mask_path=folder, from_scratch=True)
    model = build_model(source.config)
    value = starting_values(source, model, weights="model", seed=0)
    for ours, theirs in (
        ("obj_score_token.weight", "obj_score_token.weight"),
        ("transformer.layers.1.mlp.lin2.weight", "transformer.layers.1.mlp.proj_out.weight"),
        (
            "transformer.final_attn_token_to_image.out_proj.bias",
            "transformer.final_attn_token_to_image.o_proj.bias",
        ),
    ):
        assert torch.equal(value(f"heads.mask.mask_decoder.{ours}", decoder[theirs].shape), decoder[theirs])
    config = source.config.heads["mask"]["decoder"]
    assert config["iou_sigmoid"] and config["object_score"] and config["layer_norm_eps"] == 1e-5
