"""Whole matrices of which every rank has some rows: each goes to one rank, is worked on there, and comes back in pieces."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def each_whole(
    like: Sequence[Tensor], values: Sequence[Tensor], work: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Apply `work` to matrices that are sharded as parameters are.

    The matrices of one shape are dealt out to the ranks that share them, so that none does another's work, and travel once
    there and once back. Every rank of a mesh must call with the same parameters.

    Args:
        like: parameters `m n`, plain or sharded by rows.
        values: this rank's rows of a matrix beside each.
        work: whole matrices `k m n` -> `k m n`.

    Returns:
        this rank's rows of the results, in order.

    Raises:
        ValueError: if a parameter is sharded otherwise than by rows.
    """
    results: dict[int, Tensor] = {}
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, p in enumerate(like):
        by_shape.setdefault(tuple(p.shape), []).append(i)
    for (rows, _), members in by_shape.items():
        own = [values[i] for i in members]
        group = _shard_group(like[members[0]])
        worked = work(torch.stack(own)).unbind() if group is None else _dealt(own, rows, group, work)
        results.update(zip(members, worked, strict=True))
    return [results[i] for i in range(len(like))]


def _shard_group(p: Tensor) -> dist.ProcessGroup | None:
    """The ranks that hold the rows of a parameter between them; None if this one has them all."""
    if not isinstance(p, DTensor):
        return None
    axes = [axis for axis, placement in enumerate(p.placements) if isinstance(placement, Shard)]
    shared = [axis for axis in axes if p.device_mesh.size(axis) > 1]
    if not shared:
        return None
    placement = p.placements[shared[0]]
    if len(shared) > 1 or not isinstance(placement, Shard) or placement.dim != 0:
        raise ValueError(f"a matrix of {tuple(p.shape)} is not sharded by rows alone: {p.placements}")
    return p.device_mesh.get_group(shared[0])


def _dealt(
    own: Sequence[Tensor], rows: int, group: dist.ProcessGroup, work: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """`work` on matrices of `rows` rows; matrix i is worked on by rank i modulo the group's size."""
    ranks, columns = dist.get_world_size(group), own[0].shape[1]
    share, rounds = -(-rows // ranks), -(-len(own) // ranks)
    # Rows are shared out as torch.chunk does: the last ranks may have fewer, or none.
    sent = own[0].new_zeros(ranks, rounds, share, columns)
    for i, x in enumerate(own):
        sent[i % ranks, i // ranks, : len(x)] = x
    # On a GPU run whose parameters lie in host memory, work and travel are the GPU's.
    device = dist.distributed_c10d._get_pg_default_device(group)
    pieces = _exchange(sent.to(device), group)
    whole = pieces.transpose(0, 1).reshape(rounds, ranks * share, columns)[:, :rows]
    back = torch.zeros_like(pieces).transpose(0, 1).reshape(rounds, ranks * share, columns)
    back[:, :rows] = work(whole)
    received = _exchange(back.view(rounds, ranks, share, columns).transpose(0, 1), group).to(own[0].device)
    return [received[i % ranks, i // ranks, : len(x)] for i, x in enumerate(own)]


def _exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`ranks …`: entry r goes to rank r, and rank r's entry for this one takes its place."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(y, x.contiguous(), group=group)
    return y
