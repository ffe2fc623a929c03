"""Velocity regression of rectified flow."""

from data.types import PackedBatch
from modeling.ops.flow import velocity_target
from modeling.types import FlowState, LossValues, ModelOutput, Things


def flow_error(output: ModelOutput, batch: PackedBatch, flow: FlowState) -> LossValues:
    """Sum over noised latent tokens of the mean squared error of their velocity."""
    noised = batch.gen_timestep > 0
    error = output.velocity.float() - velocity_target(flow.latents, flow.noise)
    return LossValues.of(error[noised].square().sum(1) / max(1, error.shape[1]))


def noised_tokens(batch: PackedBatch) -> Things:
    """Latent tokens of target images."""
    return Things.alike(batch.gen_index[batch.gen_timestep > 0])
