"""Velocity regression of rectified flow."""

from torch import Tensor

from data.types import PackedBatch
from modeling.ops.flow import velocity_target
from modeling.types import FlowState, ModelOutput


def flow_total(output: ModelOutput, batch: PackedBatch, flow: FlowState) -> Tensor:
    """Sum over noised latent tokens of the mean squared error of their velocity, float32 scalar."""
    noised = batch.gen_timestep > 0
    error = output.velocity.float() - velocity_target(flow.latents, flow.noise)
    return error[noised].square().sum() / max(1, error.shape[1])


def count_noised(batch: PackedBatch) -> int:
    """Latent tokens of target images."""
    return int((batch.gen_timestep > 0).sum())
