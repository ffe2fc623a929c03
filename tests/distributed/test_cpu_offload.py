"""`--cpu_offload`: shards, gradients and optimizer state in host memory. It acts on a GPU; on a CPU, that every unit is told."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from tests.distributed.gather import full_tensors
from tests.distributed.launch import run_distributed
from tests.distributed.toy import UNITS, build, rows, toy_args
from train.distributed import sharding
from train.distributed.session import session
from train.distributed.sharding import grad_norm, local
from train.optim import clip_factor, set_learning_rates


def policies(flags: dict[str, object]) -> list[OffloadPolicy]:
    """What FSDP2 is told of every unit."""
    told: list[OffloadPolicy] = []
    real = sharding.fully_shard

    def remember(*args: Any, offload_policy: OffloadPolicy, **rest: Any) -> Any:
        told.append(offload_policy)
        return real(*args, offload_policy=offload_policy, **rest)

    try:
        sharding.fully_shard = remember
        build(toy_args(**flags))
    finally:
        sharding.fully_shard = real
    return told


def both() -> list[list[OffloadPolicy]]:
    return [policies({}), policies({"cpu_offload": True})]


def test_the_flag_reaches_every_unit() -> None:
    ((without, told),) = run_distributed(both, 1)
    assert [type(policy) for policy in without] == [OffloadPolicy] * (len(UNITS) + 1)
    assert told == [CPUOffloadPolicy(pin_memory=False)] * (len(UNITS) + 1)


def test_where_shards_lie() -> None:
    assert toy_args(cpu_offload=True).fsdp.home("cuda:1") == "cpu"
    assert toy_args().fsdp.home("cuda:1") == "cuda:1"


def one_step(device: torch.device, **flags: object) -> tuple[dict[str, Tensor], set[str], set[str]]:
    """Weights after a step; where the shards lie; where the optimizer's moments lie."""
    args = toy_args(warmup_steps=0, **flags)
    state = build(args, device=str(device))
    x, y = (part.to(device) for part in rows(12))
    ((state.model(x).boxes - y).square().sum() / 12).backward()
    factor = clip_factor(float(grad_norm(state.model.parameters())), 0.1)
    set_learning_rates(state.optimizer, 0, args.optim)
    state.optimizer.step(factor=factor)
    state.ema.update(0)
    shards = {local(p.detach()).device.type for p in state.model.parameters()}
    moments = {local(x).device.type for name, x in state.moments().items() if "exp_avg" in name}
    return full_tensors((n, p.detach()) for n, p in state.model.named_parameters()), shards, moments


@pytest.mark.gpu
def test_a_step_on_a_gpu_with_the_shards_in_host_memory() -> None:
    with session(timeout_s=60, seed=1) as world:
        expected, *lie = one_step(world.device)
        found, *offloaded = one_step(world.device, cpu_offload=True)
    assert (lie, offloaded) == ([{"cuda"}] * 2, [{"cpu"}] * 2)
    assert expected.keys() == found.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6, msg=name)
