"""Losses: pure functions of predictions and targets that return sums; nothing here divides by a count.

To add one: two functions and a row in LOSSES. The row's name is the loss's name in logs and its weight's name in flags
(`--NAME_weight`). The losses on decoded pictures need flags and the VAE besides:
`train/objective.py` makes them of `modeling/losses/pictures.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from data.types import PackedBatch
from modeling.losses.boxes import box_giou, box_l1, boxes
from modeling.losses.detection import (
    det_caption,
    det_giou,
    det_l1,
    det_objectness,
    detected,
    phrase_tokens,
    pictures,
)
from modeling.losses.flow import flow_error, noised_tokens
from modeling.losses.masks import mask_bce, mask_code, mask_dice, mask_iou, mask_soft_iou, masks
from modeling.losses.text import (
    cross_entropy,
    cross_entropy_reweighted,
    labels,
    student_labels,
    student_lm,
    teacher_labels,
    teacher_lm,
    weighted_labels,
)
from modeling.types import FlowState, LossValues, ModelOutput, Things


@dataclass(frozen=True, slots=True)
class Loss:
    """`values` sums over the pack; `things` says, from the batch alone, over what; `head` is the perception head needed.

    `watched`: a part of another loss, to look at; with a weight of 0 it costs no gradient.
    `least`: what it is divided by at least, where it has something to say about a step in which nothing counts. `field`: what the
    head has to give (`PerceptionHead.gives`) beyond boxes and masks. `optional`: left out, not only unweighted, at weight 0.
    """

    values: Callable[[ModelOutput, PackedBatch, FlowState], LossValues]
    things: Callable[[PackedBatch], Things]
    head: str | None = None
    least: float = 0.0
    watched: bool = False
    field: str | None = None
    optional: bool = False


LOSSES: dict[str, Loss] = {
    "ce": Loss(cross_entropy, labels),
    "ce_reweighted": Loss(cross_entropy_reweighted, weighted_labels),
    "mse": Loss(flow_error, noised_tokens),
    "box_l1": Loss(box_l1, boxes, "box"),
    "box_giou": Loss(box_giou, boxes, "box"),
    "mask_bce": Loss(mask_bce, masks, "mask"),
    "mask_dice": Loss(mask_dice, masks, "mask"),
    "mask_soft_iou": Loss(mask_soft_iou, masks, "mask", optional=True),
    "mask_iou": Loss(mask_iou, masks, "mask", field="iou"),
    "mask_code": Loss(mask_code, masks, "mask", field="code", optional=True),
    "teacher_lm": Loss(teacher_lm, teacher_labels, "detr", watched=True),
    "student_lm": Loss(student_lm, student_labels, "detr", watched=True),
    "det_objectness": Loss(det_objectness, pictures, "detr", least=1.0),
    "det_l1": Loss(det_l1, detected, "detr"),
    "det_giou": Loss(det_giou, detected, "detr"),
    "det_caption": Loss(det_caption, phrase_tokens, "detr"),
}
