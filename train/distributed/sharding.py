"""The finished model -> FSDP2 units, and what training does to sharded parameters. Everything peculiar to FSDP2 stands here.

Order of use: `shard_model` (on the meta device) -> `materialise` -> train. Gradients are SUMS over ranks: losses are divided by
global counts before backward, so nothing here divides.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils import _pytree as pytree

from modeling.bagel.shard_plan import ShardUnit
from modeling.heads.masks import MaskOutput
from modeling.types import DetrOutput, FeatureGrids, HeadInputs, HeadOutput, ModelOutput
from train.args import FsdpArgs
from train.distributed.units import ROOT, layers, units
from train.layers import prepare_layers

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

CARRIERS = (ModelOutput, HeadInputs, HeadOutput, MaskOutput, DetrOutput, FeatureGrids)
"""Dataclasses in which tensors enter or leave a sharded module. FSDP2 looks through pytrees and would miss their gradients."""

FillValue = Callable[[str, torch.Size], Tensor]
"""(name of a parameter, its full shape) -> its full value."""


def shard_model(
    model: nn.Module, plan: Sequence[ShardUnit], mesh: DeviceMesh, args: FsdpArgs
) -> tuple[str, ...]:
    """Shard a model in place, inner units before outer ones, the root last.

    Args:
        model: whole, on any device (best: meta); freezing must be done.
        plan: how it falls into units (`train.distributed.units.units`).
        mesh: of `build_mesh`.
        args: strategy, precision, and what is done to layers.

    Returns:
        names of the units that stand alone; the root is not among them.

    Raises:
        ValueError: if the plan parts tied weights, or there is nothing to compile with.
    """
    for carrier in CARRIERS:
        _make_transparent(carrier)
    prepare_layers(model, layers(plan, args), args, mesh.device_type)
    flat = (
        mesh["shard"] if mesh["replicate"].size() == 1 else mesh
    )  # a replica group of one would only cost a collective
    # Host memory can be pinned only where there is a GPU.
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if args.cpu_offload else OffloadPolicy()
    chosen = units(model, plan, args)
    for unit in chosen:
        module = model.get_submodule(unit.fqn)
        policy = MixedPrecisionPolicy() if unit.exact else _policy(args, root=unit.fqn == ROOT)
        fully_shard(
            module,
            mesh=flat,
            reshard_after_forward=unit.reshard,
            mp_policy=policy,
            offload_policy=offload,
        )
        _guard_outputs(module, unit.fqn or "the model")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has neither an average nor a pre-multiplied sum.
            module.set_force_sum_reduction_for_comms(mesh.device_type == "cpu")
    return tuple(unit.fqn for unit in chosen if unit.fqn != ROOT)


def materialise(model: nn.Module, device: torch.device | str, value: FillValue) -> None:
    """Give the parameters of a meta-device model memory, on `device` (`FsdpArgs.home`), and values.

    Every rank makes each full value in turn and keeps its own piece, so no rank ever holds the whole model and nothing is sent.

    Raises:
        ValueError: if a value has another shape than its parameter.
    """
    lost = [name for name, b in model.named_buffers() if b.is_meta]
    assert not lost, (
        f"buffers would come out of nowhere: {lost}; compute them in forward or make them parameters"
    )
    tied = _tied_names(model)
    model.to_empty(device=device)
    for first, *others in tied:  # `to_empty` parts them
        for name in others:
            module, _, own = name.rpartition(".")
            model.get_submodule(module).register_parameter(own, model.get_parameter(first))
    fill(model, value)


@torch.no_grad()
def fill(model: nn.Module, value: FillValue) -> None:
    """Write full values into a model, sharded or not; `value` is asked once per parameter, the same on every rank."""
    for name, p in model.named_parameters():
        full = value(name, p.shape)
        if full.shape != p.shape:
            raise ValueError(
                f"{name}: the value has shape {list(full.shape)}, the model needs {list(p.shape)}"
            )
        write_full(p, full)


@torch.no_grad()
def write_full(target: Tensor, full: Tensor) -> None:
    """Copy a full tensor, equal on all ranks, into this rank's piece of `target`."""
    full = full.to(device=target.device, dtype=target.dtype)
    if isinstance(target, DTensor):
        piece = distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(piece.to_local())
    else:
        target.copy_(full)


@torch.no_grad()
def full_tensor(x: Tensor) -> Tensor:
    """The whole of a tensor, on the device of the mesh; every rank must call."""
    if not isinstance(x, DTensor):
        return x
    # With `--cpu_offload` the pieces lie elsewhere than the mesh's ranks talk.
    return cast(DTensor, x.to(x.device_mesh.device_type)).full_tensor()


def local(x: Tensor) -> Tensor:
    """This rank's piece of a tensor, sharing its memory. Call it under `no_grad`."""
    return x.to_local() if isinstance(x, DTensor) else x


def divided_as(x: Tensor, piece: Tensor) -> Tensor:
    """A tensor that is divided over the ranks as `x` is, of this rank's piece of it, which may lie on another device.

    Asking DTensor for it (`zeros_like`, `clone`) takes about as long as reading it from a checkpoint, if it is small.
    """
    if not isinstance(x, DTensor):
        return piece
    alike = x if x.dtype == piece.dtype else cast(DTensor, x.detach().to(piece.dtype))
    return DTensor(piece, alike._spec, requires_grad=False)


def sync_gradients(model: nn.Module, args: FsdpArgs, *, last: bool) -> None:
    """Say before each backward whether it is the last of the step.

    Every micro-batch's gradients are summed over the shards at once and added up in float32 there: no rank ever keeps the whole
    model's gradient. Between replicas they are summed once a step, with the last micro-batch. Until then they wait in the type of
    sums, so that holds for float32 sums only: in another type the micro-batches would be added up with its rounding, and are
    summed one by one instead.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last or args.reduce_dtype != "fp32")


def regather(model: nn.Module) -> None:
    """Let go of all gathered weights: what is changed in the pieces counts from the next forward pass on."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def extra_backward(model: nn.Module) -> Iterator[None]:
    """Inside, backward passes that stop before the parameters leave the model ready for the one that trains."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.set_is_last_backward(False)
    model.set_reshard_after_backward(False)
    yield
    model.set_is_last_backward(True)
    model.set_reshard_after_backward(True)


@torch.no_grad()
def grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Joint L2 norm of the gradients; one collective for all of them.

    Args:
        parameters: all of one model.

    Returns:
        float32 scalar, equal on all ranks.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    return joint_norms([grads])[0].to(grads[0].device) if grads else torch.zeros(())


@torch.no_grad()
def joint_norms(groups: Sequence[Sequence[Tensor]]) -> Tensor:
    """L2 norm of each group of tensors, taken together; one collective for all of them.

    Args:
        groups: of tensors of one model, none empty.

    Returns:
        `n` float32, equal on all ranks.
    """
    squares = [
        torch.stack(torch._foreach_norm([local(x) for x in group], 2, dtype=torch.float64)).square().sum()
        for group in groups
    ]  # in float64, so that it rounds to the same number however the tensors are cut
    square, first = torch.stack(squares), groups[0][0]
    if isinstance(first, DTensor):
        # The last mesh axis is `shard`; replicas hold the same pieces and must not be counted twice. Its group may know only the
        # mesh's device, where the pieces do not lie with `--cpu_offload`.
        square = square.to(first.device_mesh.device_type)
        dist.all_reduce(square, group=first.device_mesh.get_group(first.device_mesh.ndim - 1))
    return square.sqrt().float()


Phase = Callable[[str], AbstractContextManager[None]]
"""Name of a phase of a step -> what counts the time of a block as that phase's (`train.clock.Clock.phase`)."""


def time_collectives(model: nn.Module, phase: Phase, name: str) -> None:
    """Count the time of gathering weights and of summing gradients as a phase of its own.

    On a CPU the calls wait until all is there, so this is time that training is held up. The all-reduce between replicas
    (`HYBRID_SHARD`) has no such place and stays in the backward pass.

    Args:
        model: after `shard_model`.
        phase: of the run's clock.
        name: of the phase.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(_TimedGather(phase, name))
            module.set_custom_reduce_scatter(_TimedScatter(phase, name))


class _TimedComm:
    def __init__(self, phase: Phase, name: str):
        self._phase, self._name = phase, name

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _TimedGather(_TimedComm, AllGather):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        with self._phase(self._name):
            return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)


class _TimedScatter(_TimedComm, ReduceScatter):
    def __call__(self, output_tensor, input_tensor, group, op, async_op: bool = False):
        with self._phase(self._name):
            return dist.reduce_scatter_tensor(
                output_tensor, input_tensor, op=op, group=group, async_op=async_op
            )


def _policy(args: FsdpArgs, *, root: bool) -> MixedPrecisionPolicy:
    # Only the root casts its outputs: a nested unit would feed float32 activations to the next unit's bf16 parameters. The root
    # does not cast its inputs: it would reach into the batch and round the flow's timesteps.
    param, reduce, output = DTYPES[args.param_dtype], DTYPES[args.reduce_dtype], DTYPES[args.output_dtype]
    mixed = param is not torch.float32
    return MixedPrecisionPolicy(
        param_dtype=param if mixed else None,
        reduce_dtype=reduce if reduce is not param else None,
        output_dtype=output if root and output is not param else None,
        cast_forward_inputs=mixed and not root,
    )


def _tied_names(model: nn.Module) -> list[list[str]]:
    """Names of every parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return [group for group in names.values() if len(group) > 1]


@functools.cache
def _make_transparent(carrier: type) -> None:
    names = tuple(f.name for f in fields(carrier))
    pytree.register_pytree_node(
        carrier,
        lambda x: ([getattr(x, n) for n in names], None),
        lambda values, _: carrier(**dict(zip(names, values, strict=True))),
    )


def _guard_outputs(module: nn.Module, fqn: str) -> None:
    """Refuse an output in which FSDP2 would see no tensor: its gradients would silently stay unsummed."""

    def check(module: nn.Module, args: object, output: object) -> None:
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(output)):
            raise AssertionError(
                f"{fqn} returns {type(output).__name__}, which is not in CARRIERS of train/distributed/sharding.py"
            )

    module.register_forward_hook(check)
