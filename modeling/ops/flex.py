"""The attention rule through FlexAttention: blocks of 128 tokens that nobody sees are never computed. Needs a GPU to train.

The block table is worked out from the splits' borders, so no token-by-token mask of the pack's size squared is built, neither on
the host nor on the device.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from modeling.ops.attention import Visibility

BLOCK = 128


@dataclass(frozen=True, slots=True)
class FlexPlan:
    """The visibility rule of one pack, which is filled up with samples that nobody sees."""

    mask: BlockMask
    filled_up: int

    @staticmethod
    def build(
        sample_lens: Sequence[int],
        split_lens: Sequence[int],
        split_modes: Sequence[str],
        split_branches: Sequence[int],
        device: torch.device,
        block: int = BLOCK,
    ) -> "FlexPlan":
        """Plan for samples laid end to end.

        Args:
            sample_lens: tokens of each sample.
            split_lens, split_modes, split_branches: the splits of all samples, in order.
            device: where the plan goes.
            block: tokens per side of a block.
        """
        filler = filler_lens(sum(sample_lens), block)
        samples, splits = [*sample_lens, *filler], [*split_lens, *filler]
        modes, branches = [*split_modes, *["causal"] * len(filler)], [*split_branches, *[0] * len(filler)]
        rule = Visibility.build(samples, splits, modes, branches, device)
        counts = pairs_by_block(samples, splits, modes, branches, block)
        full = counts == block**2
        partial = (counts > 0) & ~full
        mask = BlockMask.from_kv_blocks(
            *_block_list(partial, device),
            *_block_list(full, device),
            BLOCK_SIZE=block,
            mask_mod=lambda b, h, query, key: rule.allowed(query, key),
            seq_lengths=(sum(samples),) * 2,
        )
        return FlexPlan(mask, sum(filler))


def filler_lens(num_tokens: int, block: int) -> list[int]:
    """Lengths of the samples that fill a pack up: the kernel is compiled per length, so lengths within an eighth share one."""
    step = max(block, 1 << max(0, num_tokens.bit_length() - 4))
    extra = -num_tokens % step if num_tokens else step
    # Of a block each: one long sample would cost the square of its length.
    return [n for n in (extra % block, *[block] * (extra // block)) if n]


def pairs_by_block(
    sample_lens: Sequence[int],
    split_lens: Sequence[int],
    split_modes: Sequence[str],
    split_branches: Sequence[int],
    block: int,
) -> Tensor:
    """`blocks blocks` int64: how many (query, key) pairs of two blocks see each other.

    Args:
        sample_lens, split_lens, split_modes, split_branches: as for `FlexPlan.build`.
        block: tokens per side of a block; divides the number of tokens.
    """
    lens = torch.tensor(split_lens, dtype=torch.int64)
    ends = lens.cumsum(0)
    edges = torch.arange(0, int(lens.sum()) + 1, block)
    # `blocks splits`: tokens of a split that lie in a block. Whole numbers up to `block` squared: exact in float32.
    shared = torch.minimum(edges[1:, None], ends) - torch.maximum(edges[:-1, None], ends - lens)
    shared = shared.clamp(min=0).float()
    sample = torch.bucketize(ends - lens, torch.tensor(sample_lens).cumsum(0), right=True)
    branch = torch.tensor(split_branches)
    causal = torch.tensor([mode == "causal" for mode in split_modes])
    hidden = torch.tensor([mode == "noise" for mode in split_modes])
    earlier = torch.ones(len(lens), len(lens), dtype=torch.bool).tril(-1)
    sees = earlier & (sample[:, None] == sample) & ~hidden & ((branch == 0) | (branch == branch[:, None]))
    among_splits = shared @ sees.float() @ shared.T
    within = shared[:, ~causal] @ shared[:, ~causal].T
    # Of a causal split, a block sees all that is in earlier blocks, and a triangle of what is in itself.
    own = shared[:, causal]
    triangle = (own @ own.T).tril(-1) + torch.diag((own * (own + 1) / 2).sum(1))
    return (among_splits + within + triangle).long()


def _block_list(chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Per row of blocks, how many are chosen, and their columns first."""
    order = chosen.int().argsort(dim=1, descending=True, stable=True)
    counts, columns = (x.to(device, torch.int32)[None, None] for x in (chosen.sum(1), order))
    return counts, columns


def flex_packed_attention(q: Tensor, k: Tensor, v: Tensor, plan: FlexPlan) -> Tensor:
    """Scaled dot-product attention under the plan's rule.

    Args:
        q: `s h e`; k, v: `s g e` with `h` a multiple of `g` (grouped queries).
        plan: of this pack.

    Returns:
        `s h e`.

    Raises:
        NotImplementedError: on a CPU, if a gradient is wanted.
    """
    if not len(q):
        return q + 0 * (k.sum() + v.sum())
    qf, kf, vf = (F.pad(x, (0, 0, 0, 0, 0, plan.filled_up)).transpose(0, 1)[None] for x in (q, k, v))
    out = _kernel(q.device.type)(qf, kf, vf, block_mask=plan.mask, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)[: len(q)]


@functools.cache
def _kernel(device_type: str) -> Callable[..., Tensor]:
    # On a CPU there is no backward pass, and compiling the forward takes minutes: it is there to be compared with.
    kernel: Callable[..., Any] = flex_attention
    return kernel if device_type == "cpu" else torch.compile(kernel, dynamic=False)
