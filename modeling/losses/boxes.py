"""Box regression: L1 and generalised IoU."""

from torch import Tensor

from data.types import PackedBatch
from modeling.ops.boxes import paired_giou
from modeling.types import FlowState, LossValues, ModelOutput, Things


def _pairs(output: ModelOutput, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    predicted = output.heads["box"].boxes.float()
    region = batch.regions.get("box")
    return predicted, region.boxes if region is not None else predicted.detach()


def box_l1(output: ModelOutput, batch: PackedBatch, flow: FlowState) -> LossValues:
    """Sum over boxes of the mean absolute error of their four coordinates (in [0, 1])."""
    predicted, truth = _pairs(output, batch)
    return LossValues.of((predicted - truth).abs().mean(1))


def box_giou(output: ModelOutput, batch: PackedBatch, flow: FlowState) -> LossValues:
    """Sum over boxes of 1 - GIoU (arXiv 1902.09630)."""
    predicted, truth = _pairs(output, batch)
    return LossValues.of(1 - paired_giou(predicted, truth)[1])


def boxes(batch: PackedBatch) -> Things:
    """Boxes of the pack."""
    return Things.alike(batch.regions["box"].anchor if "box" in batch.regions else batch.und_index[:0])
