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


def mask_soft_iou(output: ModelOutput, batch: PackedBatch, flow: FlowState) -> LossValues:
    """Sum over masks of 1 - intersection over union of probabilities, 1 added above and below (modified LISA)."""
    logits, truth, owner, area = _pixels(output, batch)
    p = logits.sigmoid()
    both, each = _per_mask(p * truth, owner, area), _per_mask(p, owner, area) + _per_mask(truth, owner, area)
    return LossValues.of(1 - (both + 1) / (each - both + 1))


def mask_iou(output: ModelOutput, batch: PackedBatch, flow: FlowState) -> LossValues:
    """Sum over masks of the squared error of what the head thinks its intersection over union is (SAM, arXiv 2304.02643)."""
    logits, truth, owner, area = _pixels(output, batch)
    found = (logits.detach() > 0).to(truth.dtype)
    both = _per_mask(found * truth, owner, area)
    union = _per_mask(found, owner, area) + _per_mask(truth, owner, area) - both
    claimed: Tensor = output.heads["mask"].iou.float()
    return LossValues.of((claimed - both / union.clamp(min=1)).square())


def mask_code(output: ModelOutput, batch: PackedBatch, flow: FlowState) -> LossValues:
    """Sum over masks of the mean squared error of their code, beside what the autoencoder makes of the true mask."""
    head = output.heads["mask"]
    return LossValues.of((head.code.float() - head.true_code.float()).square().mean(1))


def masks(batch: PackedBatch) -> Things:
    """Masks of the pack."""
    return Things.alike(batch.regions["mask"].anchor if "mask" in batch.regions else batch.und_index[:0])
