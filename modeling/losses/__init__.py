"""Losses: pure functions of predictions and targets that return sums; nothing here divides by a count.

To add one: a function and a row in LOSSES. The row's name is the loss's name in logs and its weight's name in flags
(`--NAME_weight`).
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from data.types import PackedBatch
from modeling.losses.boxes import box_giou_total, box_l1_total, count_boxes
from modeling.losses.flow import count_noised, flow_total
from modeling.losses.masks import count_masks, mask_bce_total, mask_dice_total
from modeling.losses.text import ce_reweighted_total, ce_total, count_labels, sum_label_weights
from modeling.types import FlowState, ModelOutput


@dataclass(frozen=True, slots=True)
class Loss:
    """`total` sums over the pack; `count` says, from the batch alone, over how many; `head` is the perception head needed."""

    total: Callable[[ModelOutput, PackedBatch, FlowState], Tensor]
    count: Callable[[PackedBatch], float]
    head: str | None = None


LOSSES: dict[str, Loss] = {
    "ce": Loss(ce_total, count_labels),
    "ce_reweighted": Loss(ce_reweighted_total, sum_label_weights),
    "mse": Loss(flow_total, count_noised),
    "box_l1": Loss(box_l1_total, count_boxes, "box"),
    "box_giou": Loss(box_giou_total, count_boxes, "box"),
    "mask_bce": Loss(mask_bce_total, count_masks, "mask"),
    "mask_dice": Loss(mask_dice_total, count_masks, "mask"),
}
