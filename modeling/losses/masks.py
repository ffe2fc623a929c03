"""Mask losses on masks of any size, flattened one after the other."""

import torch
import torch.nn.functional as F
from torch import Tensor

from data.types import PackedBatch
from modeling.types import FlowState, ModelOutput

DICE_EPS = 1e-3


def _pixels(output: ModelOutput, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits `p`, truth `p`, mask of each pixel `p`, areas `r`."""
    logits = output.heads["mask"].mask_logits
    region = batch.regions.get("mask")
    if region is None:
        nothing = torch.zeros(0, dtype=torch.int64, device=logits.device)
        return logits, logits.detach(), nothing, nothing
    area = region.mask_hw.prod(1)
    owner = torch.repeat_interleave(torch.arange(len(area), device=area.device), area)
    return logits, region.mask_values.to(logits.dtype), owner, area


def mask_bce_total(output: ModelOutput, batch: PackedBatch, flow: FlowState) -> Tensor:
    """Sum over masks of the mean over pixels of binary cross entropy."""
    logits, truth, owner, area = _pixels(output, batch)
    per_pixel = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return (per_pixel / area[owner]).sum()


def mask_dice_total(output: ModelOutput, batch: PackedBatch, flow: FlowState) -> Tensor:
    """Sum over masks of 1 - Dice with linear sums and eps 1e-3 (LISA, arXiv 2308.00692)."""
    logits, truth, owner, area = _pixels(output, batch)
    p = logits.sigmoid()

    def per_mask(x: Tensor) -> Tensor:
        return x.new_zeros(len(area)).index_add(0, owner, x)

    return (1 - (2 * per_mask(p * truth) + DICE_EPS) / (per_mask(p) + per_mask(truth) + DICE_EPS)).sum()


def count_masks(batch: PackedBatch) -> int:
    """Masks of the pack."""
    return len(batch.regions["mask"].anchor) if "mask" in batch.regions else 0
