"""Losses of a detector (head `detr`): every layer has its own matching, and all layers count alike.

Divided by the number of true boxes, of all pictures together: also the objectness, to which a picture without boxes adds errors
and nothing to the divisor. Source: arXiv 2005.12872; with yes-or-no scores 2010.04159.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from data.types import PackedBatch, RegionBatch
from modeling.ops.boxes import centre_to_corners, corners_to_centre, paired_giou
from modeling.ops.matching import focal
from modeling.types import DetrOutput, DetrStage, FlowState, LossValues, ModelOutput, Things

HEAD = "detr"


def det_objectness(output: ModelOutput, batch: PackedBatch, flow: FlowState) -> LossValues:
    """Sum over pictures, layers and queries of what their scores get wrong: focal loss, or cross entropy with "no object"."""
    detr: DetrOutput = output.heads[HEAD]
    each = [
        _score_errors(stage, matched, detr.classes, detr.no_object_weight).sum((1, 2))
        for stage, matched in zip(detr.stages, detr.matched, strict=True)
    ]
    return LossValues.of(torch.stack(each).sum(0))


def _score_errors(
    stage: DetrStage, matched: Tensor, classes: Tensor, no_object_weight: float | None
) -> Tensor:
    """`r q 1` or `r q c`."""
    kinds = stage.logits.shape[-1]
    taken, called = matched[matched >= 0], classes[matched >= 0]
    if no_object_weight is not None and kinds > 1:
        truth = torch.full_like(stage.valid, kinds - 1, dtype=torch.int64).flatten()
        truth[taken] = called
        weight = torch.where(truth == kinds - 1, no_object_weight, 1.0)
        errors = F.cross_entropy(stage.logits.flatten(0, 1), truth, reduction="none") * weight
        return (errors.view_as(stage.valid) * stage.valid)[..., None]
    yes = torch.zeros_like(stage.logits).flatten(0, 1)
    yes[taken, called.clamp(max=kinds - 1)] = 1
    return focal(stage.logits, yes.view_as(stage.logits)) * stage.valid[..., None]


def det_l1(output: ModelOutput, batch: PackedBatch, flow: FlowState) -> LossValues:
    """Sum over true boxes and layers of the absolute errors of cx, cy, w, h (in [0, 1]) of what is matched with them."""
    truth = corners_to_centre(_regions(output, batch).boxes.float())
    return _over_boxes(output.heads[HEAD], truth, lambda boxes, true: (boxes - true).abs().sum(1))


def det_giou(output: ModelOutput, batch: PackedBatch, flow: FlowState) -> LossValues:
    """Sum over true boxes and layers of 1 - GIoU with what is matched with them."""
    truth = _regions(output, batch).boxes.float()
    return _over_boxes(
        output.heads[HEAD], truth, lambda boxes, true: 1 - paired_giou(centre_to_corners(boxes), true)[1]
    )


def det_caption(output: ModelOutput, batch: PackedBatch, flow: FlowState) -> LossValues:
    """Sum over the tokens of the true phrases of the negative log likelihood; 0 of a head that says none."""
    detr: DetrOutput = output.heads[HEAD]
    if not len(detr.phrase_states):
        none = detr.phrase_states.float().sum()
        return LossValues(total=none, each=torch.zeros(len(phrase_tokens(batch).place), device=none.device))
    amount = detr.phrase_known.float()
    ids = batch.regions[HEAD].phrase_ids
    total, nll = output.vocabulary.cross_entropy(detr.phrase_states, ids, amount)
    return LossValues(total=total, each=nll * amount)


def _over_boxes(detr: DetrOutput, truth: Tensor, error: Callable[[Tensor, Tensor], Tensor]) -> LossValues:
    each = truth.new_zeros(len(truth))
    for stage, matched in zip(detr.stages, detr.matched, strict=True):
        known = matched >= 0
        found = stage.boxes.flatten(0, 1)[matched[known]]
        each = each.index_add(0, known.nonzero()[:, 0], error(found, truth[known]))
    return LossValues.of(each)


def _regions(output: ModelOutput, batch: PackedBatch) -> RegionBatch:
    none = batch.und_index[:0]
    return batch.regions.get(HEAD) or RegionBatch.unknown(none, none)


def pictures(batch: PackedBatch) -> Things:
    """Pictures that were looked through, each with the number of its boxes."""
    regions = batch.regions.get(HEAD)
    if regions is None:
        return Things.alike(batch.und_index[:0])
    return Things(place=regions.anchor, amount=regions.num_boxes.float())


def detected(batch: PackedBatch) -> Things:
    """True boxes of these pictures."""
    regions = batch.regions.get(HEAD)
    if regions is None:
        return Things.alike(batch.und_index[:0])
    return Things.alike(regions.anchor[regions.box_region])


def phrase_tokens(batch: PackedBatch) -> Things:
    """Tokens of the boxes' phrases."""
    regions = batch.regions.get(HEAD)
    if regions is None:
        return Things.alike(batch.und_index[:0])
    box = torch.repeat_interleave(regions.box_region, regions.phrase_lens)
    return Things.alike(regions.anchor[box])
