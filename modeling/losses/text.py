"""Next-token cross entropy."""

from data.types import PackedBatch
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


def _weighted(output: ModelOutput, batch: PackedBatch, things: Things) -> LossValues:
    total, nll = output.vocabulary.cross_entropy(output.label_states, batch.label_ids, things.amount)
    return LossValues(total=total, each=nll * things.amount)
