"""Cross entropy of a vocabulary projection whose logits never exist whole.

A block of tokens at a time: its logits, from them the loss and both gradients, then the block is forgotten. The gradients are
ready when the forward pass is over, so backward multiplies nothing twice: three matrix products, as with all logits at hand.
"""

import torch
from torch import Tensor

from modeling.ops.ready_gradient import ready_gradient
from modeling.qwen2.mot import filled

BLOCK_NUMBERS = 3 * 2**20
"""Logits of a block, where that makes blocks of enough tokens to keep the matrix products fast."""
MIN_TOKENS = {"cpu": 64, "cuda": 1024}
"""Fewest tokens of a block: each block reads and writes the whole gradient of the projection."""


def linear_cross_entropy(
    states: Tensor, weight: Tensor, labels: Tensor, amount: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross entropy of `states @ weight.T`.

    Args:
        states: `c d`; the product is made in the type of `weight`, the rest in float32.
        weight: `vocab d`, whole (not one of its shards).
        labels: `c` int64.
        amount: `c` float32, how much each token counts.

    Returns:
        sum over tokens of amount x negative log likelihood, float32 scalar with gradient; and every token's negative log
        likelihood, `c` float32 without.
    """
    on = torch.is_grad_enabled()
    learns, passes_on = on and weight.requires_grad, on and states.requires_grad
    nll, d_states, d_weight = _by_blocks(states, weight, labels, amount, learns=learns, passes_on=passes_on)
    total = (nll * amount).sum()
    if passes_on:
        total = total + ready_gradient(states, d_states, keep=True)
    if learns:
        total = total + ready_gradient(weight, d_weight, keep=False)
    return total, nll


@torch.no_grad()
def _by_blocks(
    states: Tensor, weight: Tensor, labels: Tensor, amount: Tensor, *, learns: bool, passes_on: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Negative log likelihoods, gradient in `states` and in `weight` (each empty if it is not wanted)."""
    size, count = block_size(len(weight), states.device.type), len(states)
    states, labels, amount = filled(states), filled(labels), filled(amount)
    nll = torch.empty(len(states), device=states.device)
    d_states = torch.empty(
        states.shape if passes_on else (0,), dtype=_kept(states.dtype), device=states.device
    )
    # Summed in float32 over the blocks, whatever the type of the weights.
    d_weight = torch.zeros(weight.shape if learns else (0,), device=weight.device)
    whole = torch.empty(min(size, len(states)), len(weight), dtype=weight.dtype, device=weight.device)
    for start in range(0, len(states), size):
        block = slice(start, start + size)
        x, label = states[block].to(weight.dtype), labels[block, None]
        logits = torch.mm(x, weight.T, out=whole[: len(x)]).float()
        # From here on in place: `logits` becomes exp(logits - largest), then the gradient.
        largest = logits.amax(1, keepdim=True)
        chosen = logits.gather(1, label)
        total = logits.sub_(largest).exp_().sum(1, keepdim=True)
        nll[block] = (total.log() + largest - chosen).squeeze(1)
        if not (learns or passes_on):
            continue
        gradient = logits.mul_(amount[block, None] / total)
        gradient.scatter_add_(1, label, -amount[block, None])
        gradient = gradient.to(weight.dtype)
        if passes_on:
            d_states[block] = gradient @ weight
        if learns and weight.dtype == torch.float32:
            d_weight.addmm_(gradient.T, x)
        elif learns:
            d_weight += gradient.T @ x
    return nll[:count], d_states[:count], d_weight.to(_kept(weight.dtype))


def _kept(dtype: torch.dtype) -> torch.dtype:
    """In which type a gradient waits for its scale: sums over tokens, not divided by their number, may be beyond fp16."""
    return torch.float32 if dtype == torch.float16 else dtype


def block_size(vocab: int, device_type: str) -> int:
    """Tokens of a block."""
    fewest = MIN_TOKENS.get(device_type, MIN_TOKENS["cuda"])
    return max(fewest, BLOCK_NUMBERS // vocab // 32 * 32)
