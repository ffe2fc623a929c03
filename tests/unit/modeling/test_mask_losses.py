"""Mask losses against LISA's and the modified LISA's own numbers, and LISA's whole mask path."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data.types import RegionBatch
from modeling.heads.masks import MaskOutput, laid_out, unpadded
from modeling.heads.sam_mask import SamMaskHead
from modeling.losses.masks import mask_bce, mask_dice, mask_iou, mask_soft_iou
from tests.unit.modeling.test_sam import CONFIG, TOLERANCE

GOLDEN = Path(__file__).parents[2] / "golden" / "grounding"


def read(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")


LISA, LISA_TENSORS = read("lisa_losses")
MODIFIED, MODIFIED_TENSORS = read("modified_lisa")
FORWARD, FORWARD_TENSORS = read("lisa_forward")


def stand_ins(logits: list[Tensor], target: list[Tensor], iou: Tensor | None = None) -> tuple[Any, Any]:
    """A model's output and a pack with these masks, `hh ww` each; targets may be soft."""
    flat, hw = laid_out(list(enumerate(logits)), torch.zeros(0))
    nothing = torch.zeros(len(logits), dtype=torch.int64)
    regions = RegionBatch.unknown(nothing, nothing)
    values = torch.cat([t.flatten() for t in target] or [torch.zeros(0)])
    regions = SimpleNamespace(
        anchor=regions.anchor,
        mask_values=values,
        mask_hw=torch.tensor(hw, dtype=torch.int64).reshape(-1, 2),
    )
    found = MaskOutput(
        boxes=torch.zeros(0, 4), mask_logits=flat, mask_hw=hw, iou=torch.zeros(0) if iou is None else iou
    )
    output = SimpleNamespace(heads={"mask": found})
    return output, SimpleNamespace(regions={"mask": regions})


@pytest.mark.parametrize("case", LISA["cases"], ids=lambda c: c["kind"] + c["id"])
def test_lisa_losses(case: dict[str, Any]) -> None:
    logits, target = (LISA_TENSORS[f"{case['id']}.{n}"] for n in ("logits", "target"))
    for loss, name in ((mask_bce, "bce"), (mask_dice, "dice")):
        x = logits.clone().requires_grad_()
        values = loss(*stand_ins(list(x), list(target)), None)
        count = max(case["num_masks"], 1)  # the division is the objective's
        assert values.total.item() / count == pytest.approx(case[name], abs=1e-5, rel=1e-6)
        assert len(values.each) == case["num_masks"]
        if case["num_masks"]:
            values.total.backward()
        want = LISA_TENSORS[f"{case['id']}.grad_{name}"]
        torch.testing.assert_close(
            (torch.zeros_like(x) if x.grad is None else x.grad) / count, want, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("case", LISA["batches"], ids=lambda c: c["id"])
def test_lisa_batches(case: dict[str, Any]) -> None:
    keys = [f"{case['id']}.sample{i}" for i in range(len(case["masks_per_sample"]))]
    logits, target = (
        [mask for key in keys for mask in LISA_TENSORS[f"{key}.{n}"]] for n in ("logits", "target")
    )
    output, batch = stand_ins(logits, target)
    count = max(sum(case["masks_per_sample"]), 1)
    bce, dice = (loss(output, batch, None).total.item() / count for loss in (mask_bce, mask_dice))
    assert 2.0 * bce == pytest.approx(case["mask_bce_loss"], abs=1e-5)
    assert 0.5 * dice == pytest.approx(case["mask_dice_loss"], abs=1e-5)
    assert case["ce_unweighted"] + 2 * bce + 0.5 * dice == pytest.approx(case["loss"], abs=1e-5)


@pytest.mark.parametrize("case", MODIFIED["loss_cases"], ids=lambda c: c["id"])
def test_soft_iou_of_the_modified_lisa(case: dict[str, Any]) -> None:
    logits, target = (MODIFIED_TENSORS[f"{case['id']}.{n}"] for n in ("logits", "target"))
    output, batch = stand_ins(list(logits), list(target))
    mean = mask_soft_iou(output, batch, None).total.item() / len(logits)
    assert mean == pytest.approx(case["iou_per_mask_mean"], abs=1e-5)
    assert mask_bce(output, batch, None).total.item() / len(logits) == pytest.approx(case["bce"], abs=1e-5)


def test_what_a_head_thinks_of_its_masks() -> None:
    logits = [torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), torch.tensor([[-1.0]])]
    target = [torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0]])]
    claimed = torch.tensor([0.5, 0.25], requires_grad=True)
    values = mask_iou(*stand_ins(logits, target, claimed), None)
    assert values.each.tolist() == pytest.approx([(0.5 - 1 / 3) ** 2, 0.25**2])
    values.total.backward()
    assert claimed.grad is not None
    assert claimed.grad.tolist() == pytest.approx([2 * (0.5 - 1 / 3), 0.5])


def lisa_head() -> SamMaskHead:
    """LISA's: its projection of states of width 24 and the golden SAM decoder, with LISA's eps."""
    decoder = {k: v for k, v in CONFIG["mask_decoder_config"].items()}
    head = SamMaskHead(
        hidden_size=24, grid_size=48, patch_size=16, vision_sharing="separate", mask_channels=8,
        decoder={**decoder, "layer_norm_eps": 1e-5},
        encoder={k: v for k, v in CONFIG["vision_config"].items() if k != "num_pos_feats"},
    )  # fmt: skip
    weights = load_file(GOLDEN / "hf_sam_tiny_state_dict.safetensors")
    weights.pop("prompt_encoder.shared_embedding.positional_embedding")
    for layer in ("0", "2"):
        for part in ("weight", "bias"):
            weights[f"projection.{layer}.{part}"] = FORWARD_TENSORS[f"text_hidden_fcs.{layer}.{part}"]
    head.load_state_dict(weights)
    return head


@pytest.mark.parametrize("case", FORWARD["cases"], ids=lambda c: c["id"])
def test_lisa_forward(case: dict[str, Any]) -> None:
    t = {k.removeprefix(f"{case['id']}."): x for k, x in FORWARD_TENSORS.items() if k.startswith(case["id"])}
    head, seg = lisa_head(), FORWARD["seg_token_id"]
    hidden = t["hidden_states"].clone().requires_grad_()
    # LISA reads the token that predicts <SEG>; the picture's placeholder stands for `image_tokens` positions.
    image_of = [i for i, n in enumerate(case["conversations_per_image"]) for _ in range(n)]
    read_at = [
        (row, place + FORWARD["image_tokens"] - 2)
        for row, ids in enumerate(case["input_ids"])
        for place, token in enumerate(ids)
        if token == seg
    ]
    which = torch.tensor([image_of[row] for row, _ in read_at])
    prompts = head.projection(torch.stack([hidden[at] for at in read_at]))
    logits, _ = head.decode(t["image_embeddings"], which, prompts)

    masks, truth = [], []
    for image, (view, size) in enumerate(zip(case["resized_sizes"], case["original_sizes"], strict=True)):
        mine = logits[which == image]
        full = unpadded(mine, FORWARD["img_size"], tuple(view), tuple(size))
        torch.testing.assert_close(full, t[f"img{image}.pred_masks"], rtol=0, atol=TOLERANCE)
        masks += list(full)
        truth += list(t[f"img{image}.gt_masks"].float())
    output, batch = stand_ins(masks, truth)
    weights = FORWARD["weights"]
    bce, dice = (
        weights[n] * loss(output, batch, None).total / len(masks)
        for n, loss in (("bce", mask_bce), ("dice", mask_dice))
    )
    assert bce.item() == pytest.approx(case["mask_bce_loss"], abs=1e-5)
    assert dice.item() == pytest.approx(case["mask_dice_loss"], abs=1e-5)
    assert case["ce_loss"] + (bce + dice).item() == pytest.approx(case["loss"], abs=1e-5)

    (bce + dice).backward()
    expected = {
        "grad_hidden_states": hidden.grad,
        "grad.mask_decoder.upscale_conv2.weight": head.mask_decoder.upscale_conv2.weight.grad,
        **{
            f"grad.text_hidden_fcs.{i}.{n}": head.projection.get_parameter(f"{i}.{n}").grad
            for i in (0, 2)
            for n in ("weight", "bias")
        },
    }
    for name, found in expected.items():
        assert found is not None
        torch.testing.assert_close(found, t[name], rtol=0, atol=5e-5)


def test_indexes_of_seg_tokens() -> None:
    """LISA's token and the one before it, on sequences with one placeholder: what `head_reads` calls self and previous."""
    for case in json.loads((GOLDEN / "seg_token_index.json").read_text())["cases"]:
        for row, ids in enumerate(case["input_ids"]):
            picture = ids.index(case["image_placeholder_id"])
            places = [p for p, token in enumerate(ids) if token == case["seg_token_id"]]
            own = [p + (case["image_tokens"] - 1) * (p > picture) for p in places]
            assert own == case["seg_own_index_per_row"][row]
            assert [p - 1 for p in own] == case["gather_index_per_row"][row]
