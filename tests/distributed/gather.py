"""Whole tensors of sharded models, for comparisons."""

from collections.abc import Iterable

import torch
from torch import Tensor

from train.distributed.collectives import rank
from train.distributed.sharding import full_tensor


@torch.no_grad()
def full_tensors(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors on the CPU of rank 0, one gathered at a time; every rank must call. Other ranks get an empty dict."""
    whole = {}
    for name, x in named:
        full = full_tensor(x)
        if rank() == 0:
            whole[name] = full.detach().to("cpu", copy=True)
    return whole
