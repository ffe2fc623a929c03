"""Next-token cross entropy."""

import torch
from torch import Tensor

from data.types import ROLES, PackedBatch, Role
from modeling.types import FlowState, LossValues, ModelOutput, Things


def cross_entropy(output: ModelOutput, batch: PackedBatch, flow: FlowState) -> LossValues:
    """Sum over labels of the negative log likelihood."""
    return _weighted(output, batch, labels(batch))


def labels(batch: PackedBatch) -> Things:
    """Supervised tokens of the pack."""
    return Things.alike(batch.label_index)


def cross_entropy_reweighted(output: ModelOutput, batch: PackedBatch, flow: FlowState) -> LossValues:
    """The same, each token weighted by 1/sqrt(length of its text): `--ce_loss_reweighting`, in place of `ce`."""
    return _weighted(output, batch, weighted_labels(batch))


def weighted_labels(batch: PackedBatch) -> Things:
    """Supervised tokens of the pack, each with its weight."""
    return Things(place=batch.label_index, amount=batch.label_weight)


def teacher_lm(output: ModelOutput, batch: PackedBatch, flow: FlowState) -> LossValues:
    """Sum over the labels of demonstrations of the negative log likelihood, which is in `ce` as well."""
    return _of_role(output, batch, "teacher")


def student_lm(output: ModelOutput, batch: PackedBatch, flow: FlowState) -> LossValues:
    """The same of the answers that follow demonstrations, or stand where some could be."""
    return _of_role(output, batch, "student")


def teacher_labels(batch: PackedBatch) -> Things:
    """Supervised tokens of demonstrations."""
    return Things.alike(batch.label_index[_has_role(batch, "teacher")])


def student_labels(batch: PackedBatch) -> Things:
    """Supervised tokens of what is answered after them."""
    return Things.alike(batch.label_index[_has_role(batch, "student")])


def _has_role(batch: PackedBatch, role: Role) -> Tensor:
    return batch.label_role == ROLES.index(role)


def _of_role(output: ModelOutput, batch: PackedBatch, role: Role) -> LossValues:
    chosen = _has_role(batch, role)
    states, ids = output.label_states[chosen], batch.label_ids[chosen]
    total, nll = output.vocabulary.cross_entropy(states, ids, torch.ones(len(ids), device=ids.device))
    return LossValues(total=total, each=nll)


def _weighted(output: ModelOutput, batch: PackedBatch, things: Things) -> LossValues:
    total, nll = output.vocabulary.cross_entropy(output.label_states, batch.label_ids, things.amount)
    return LossValues(total=total, each=nll * things.amount)
