"""Next-token cross entropy."""

import torch.nn.functional as F
from torch import Tensor

from data.types import PackedBatch
from modeling.types import FlowState, ModelOutput


def ce_total(output: ModelOutput, batch: PackedBatch, flow: FlowState) -> Tensor:
    """Sum over labels of the negative log likelihood, float32 scalar."""
    return F.cross_entropy(output.logits.float(), batch.label_ids, reduction="sum")


def count_labels(batch: PackedBatch) -> int:
    """Supervised tokens of the pack."""
    return len(batch.label_ids)


def ce_reweighted_total(output: ModelOutput, batch: PackedBatch, flow: FlowState) -> Tensor:
    """The same, each token weighted by 1/sqrt(length of its text): `--ce_loss_reweighting`, in place of `ce`."""
    per_token = F.cross_entropy(output.logits.float(), batch.label_ids, reduction="none")
    return (per_token * batch.label_weight).sum()


def sum_label_weights(batch: PackedBatch) -> float:
    """Sum of the supervised tokens' weights."""
    return float(batch.label_weight.double().sum())
