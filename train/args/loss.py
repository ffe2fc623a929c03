"""Losses and their weights."""

from dataclasses import dataclass
from typing import Literal

from train.args.flag import flag


@dataclass(frozen=True, slots=True, kw_only=True)
class LossArgs:
    """Losses. Each is divided by its own count over all ranks."""

    ce_weight: float = flag(1.0, "Weight of the text's cross-entropy.", low=0)
    mse_weight: float = flag(1.0, "Weight of the flow's squared error.", low=0)
    box_l1_weight: float = flag(1.0, "Weight of the boxes' L1 distance.", low=0)
    box_giou_weight: float = flag(1.0, "Weight of the boxes' 1 - GIoU.", low=0)
    mask_bce_weight: float = flag(1.0, "Weight of the masks' binary cross-entropy.", low=0)
    mask_dice_weight: float = flag(1.0, "Weight of the masks' Dice loss.", low=0)
    mask_soft_iou_weight: float = flag(
        0.0, "Weight of the masks' 1 - IoU of probabilities (modified LISA: 1).", low=0
    )
    mask_iou_weight: float = flag(
        1.0, "Weight of the squared error of the IoU that SAM's decoder thinks it has.", low=0
    )
    mask_code_weight: float = flag(
        0.0,
        "Weight of the squared error of a mask's code beside that of the true mask (PerceptionGPT's l2_loss_weight).",
        low=0,
    )
    teacher_lm_weight: float = flag(
        0.0, "Weight of the cross-entropy of demonstrations, beyond their share in --ce_weight's.", low=0
    )
    student_lm_weight: float = flag(
        0.0, "Weight of the cross-entropy of answers that may follow some, likewise.", low=0
    )
    det_objectness_weight: float = flag(
        2.0, "Weight of a detector's objectness, per true box and layer.", low=0
    )
    det_l1_weight: float = flag(5.0, "Weight of a detector's L1 distance, per true box and layer.", low=0)
    det_giou_weight: float = flag(2.0, "Weight of a detector's 1 - GIoU, per true box and layer.", low=0)
    det_caption_weight: float = flag(1.0, "Weight of the cross-entropy of a detector's phrases.", low=0)
    loss_divisor: Literal["step", "micro_batch"] = flag(
        "step",
        "`step`: each loss is divided by its count over all ranks and micro-batches of a step; `micro_batch`, as published: each "
        "micro-batch by its own count over all ranks, and they are averaged.",
    )
    ce_loss_reweighting: bool = flag(
        False, "Weigh the tokens of a text by 1/sqrt(its length), not all the same."
    )

    gradient_share_every: int = flag(
        0,
        "Steps between looks at each loss's share of the gradient at the trunk's end (`grad_share/`); 0: never. A look costs a "
        "backward pass per loss through what comes after the trunk.",
        low=0,
    )

    def weights(self) -> dict[str, float]:
        """Weight of each row of `modeling.losses.LOSSES` that is used."""
        ce = "ce_reweighted" if self.ce_loss_reweighting else "ce"
        return {
            ce: self.ce_weight,
            "mse": self.mse_weight,
            "box_l1": self.box_l1_weight,
            "box_giou": self.box_giou_weight,
            "mask_bce": self.mask_bce_weight,
            "mask_dice": self.mask_dice_weight,
            "mask_soft_iou": self.mask_soft_iou_weight,
            "mask_iou": self.mask_iou_weight,
            "mask_code": self.mask_code_weight,
            "teacher_lm": self.teacher_lm_weight,
            "student_lm": self.student_lm_weight,
            "det_objectness": self.det_objectness_weight,
            "det_l1": self.det_l1_weight,
            "det_giou": self.det_giou_weight,
            "det_caption": self.det_caption_weight,
        }
