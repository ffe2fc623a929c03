"""Ways to compute the attention rule of `modeling/ops/attention.py`. All agree to rounding, and differ in where they are fast."""

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from modeling.ops.attention import BATCHED_UP_TO, AttentionPlan, packed_attention
from modeling.ops.flex import FlexPlan, flex_packed_attention

Apply = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q `s h e`, k `s g e`, v `s g e`) of one pack -> `s h e`."""

Layout = tuple[Sequence[int], Sequence[int], Sequence[str], Sequence[int]]
"""Sample lengths; lengths, modes and branches of the splits of all samples, in order."""


def _by_length(batched_up_to: int, layout: Layout, device: torch.device) -> Apply:
    plan = AttentionPlan.build(*layout, device, batched_up_to)
    return lambda q, k, v: packed_attention(q, k, v, plan)


def _flex(layout: Layout, device: torch.device) -> Apply:
    plan = FlexPlan.build(*layout, device)
    return lambda q, k, v: flex_packed_attention(q, k, v, plan)


ATTENTION: Mapping[str, Callable[[Layout, torch.device], Apply]] = {
    "auto": functools.partial(_by_length, BATCHED_UP_TO),
    "split": functools.partial(_by_length, 0),
    "batched": functools.partial(_by_length, 1 << 62),
    "flex": _flex,
}
"""Value of --attention -> what builds the rule of one pack: `split` calls scaled-dot-product attention for every split, `batched`
one masked call for all samples of about one length, `auto` the second for short samples and the first for long ones, `flex`
FlexAttention."""


def usable_backend(name: str, device_type: str) -> str:
    """The row of `ATTENTION` to train with.

    Raises:
        ValueError: if the device cannot train with it.
    """
    if name == "flex" and device_type == "cpu":
        raise ValueError(
            "--attention flex needs a GPU: FlexAttention has no backward pass on a CPU; leave the flag out"
        )
    return name
