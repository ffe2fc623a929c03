"""Matrices that are sharded move as whole ones do, on every shape of the mesh."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.distributed.gather import full_tensors
from tests.distributed.launch import run_distributed
from train.args import OptimArgs, ParamArgs
from train.distributed.collectives import world_size
from train.optim import build_optimizer
from train.param_manager import optimizer_groups

SHAPES = ((64, 80), (64, 80), (70, 64), (65, 90))
"""More matrices of one shape than ranks, rows that ranks cannot share evenly, and both orientations."""


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.connector = nn.ModuleList(nn.Linear(n, m) for m, n in SHAPES)


def after_three_steps(replicate: int) -> dict[str, Tensor]:
    model = Layers()
    if world_size() > 1:
        shape = (replicate, world_size() // replicate)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh["shard"] if replicate == 1 else mesh)
    args = OptimArgs(lr=0.01, optimizer="muon", weight_decay=0.1)
    optimizer = build_optimizer(optimizer_groups(model, ParamArgs(), args.lr, matrices=True), args)
    for step in range(3):
        for name, p in model.named_parameters():
            whole = torch.randn(p.shape, generator=torch.Generator().manual_seed(sum(name.encode()) + step))
            p.grad = _as(p, whole)
        optimizer.step()
    return full_tensors(model.named_parameters())


def _as(p: Tensor, whole: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor, distribute_tensor

    return distribute_tensor(whole, p.device_mesh, p.placements) if isinstance(p, DTensor) else whole


@pytest.mark.parametrize(("ranks", "replicate"), [(3, 1), (4, 2)])
def test_sharded_matrices_move_as_whole_ones(ranks: int, replicate: int) -> None:
    whole = after_three_steps(1)
    for rank in run_distributed(after_three_steps, ranks, replicate):
        for name, value in rank.items():
            torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6, msg=name)
