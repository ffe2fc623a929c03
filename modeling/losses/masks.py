"""Mask losses on masks of any size, flattened one after the other."""

import torch
import torch.nn.functional as F
from torch import Tensor

from data.types import PackedBatch
from modeling.types import FlowState, LossValues, ModelOutput, Things

DICE_EPS = 1e-3


def _pixels(output: ModelOutput, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits `p`, truth `p`, mask of each pixel `p`, areas `r`."""
    logits = output.heads["mask"].mask_logits.float()  # thousands of pixels are summed
    region = batch.regions.get("mask")
    if region is None:
        nothing = torch.zeros(0, dtype=torch.int64, device=logits.device)
        return logits, logits.detach(), nothing, nothing
    area = region.mask_hw.prod(1)
    owner = torch.repeat_interleave(torch.arange(len(area), device=area.device), area)
    return logits, region.mask_values.to(logits.dtype), owner, area


def _per_mask(x: Tensor, owner: Tensor, area: Tensor) -> Tensor:
    return x.new_zeros(len(area)).index_add(0, owner, x)


def mask_bce(output: ModelOutput, batch: PackedBatch, flow: FlowState) -> LossValues:
    """Sum over masks of the mean over pixels of binary cross entropy."""
    logits, truth, owner, area = _pixels(output, batch)
    per_pixel = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return LossValues.of(_per_mask(per_pixel / area[owner], owner, area))


def mask_dice(output: ModelOutput, batch: PackedBatch, flow: FlowState) -> LossValues:
    """Sum over masks of 1 - Dice with linear sums and eps 1e-3 (LISA, arXiv 2308.00692)."""
    logits, truth, owner, area = _pixels(output, batch)
    p = logits.sigmoid()
    both, each = _per_mask(p * truth, owner, area), _per_mask(p, owner, area) + _per_mask(truth, owner, area)
    return LossValues.of(1 - (2 * both + DICE_EPS) / (each + DICE_EPS))


def masks(batch: PackedBatch) -> Things:
    """Masks of the pack."""
    return Things.alike(batch.regions["mask"].anchor if "mask" in batch.regions else batch.und_index[:0])
