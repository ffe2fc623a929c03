"""Packed attention against the rule written out as a dense mask."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.ops.attention import AttentionPlan, dense_allowed, packed_attention

CPU = torch.device("cpu")


def random_layout(seed: int) -> tuple[list[int], list[int], list[str], list[int]]:
    rng = random.Random(seed)
    sample_lens, split_lens, modes, branches = [], [], [], []
    for _ in range(rng.randint(1, 5)):
        lens = [rng.randint(1, 30) for _ in range(rng.randint(1, 5))]
        split_lens += lens
        modes += [rng.choice(["causal", "full", "noise"]) for _ in lens]
        branches += [rng.choice([0, 0, 1, 2]) for _ in lens]
        sample_lens.append(sum(lens))
    return sample_lens, split_lens, modes, branches


def dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)[0].transpose(0, 1)


@pytest.mark.parametrize("batched_up_to", [0, 40, 10_000], ids=["by split", "mixed", "batched"])
def test_agrees_with_a_dense_mask_forward_and_backward(batched_up_to: int) -> None:
    for seed in range(70):
        layout = random_layout(seed)
        generator = torch.Generator().manual_seed(seed)
        n = sum(layout[0])
        q, k, v, g = (torch.randn(n, h, 8, generator=generator, requires_grad=h != 5) for h in (4, 2, 2, 4))
        ours = packed_attention(q, k, v, AttentionPlan.build(*layout, CPU, batched_up_to))
        theirs = dense(q, k, v, dense_allowed(*layout))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
        mine = torch.autograd.grad(ours, (q, k, v), g)
        for a, b in zip(mine, torch.autograd.grad(theirs, (q, k, v), g), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=5e-6)


def test_the_rule_itself() -> None:
    # One sample of text 2, target image 2, text 1; then another sample of text 1.
    allowed = dense_allowed([5, 1], [2, 2, 1, 1], ["causal", "noise", "causal", "causal"], [0, 0, 0, 0])
    assert allowed.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_branches_see_the_trunk_and_themselves() -> None:
    # Trunk 1, branch 1 of two splits, branch 2.
    allowed = dense_allowed([4], [1, 1, 1, 1], ["causal"] * 4, [0, 1, 1, 2])
    assert allowed.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]


def test_no_tokens_still_connect_the_projections() -> None:
    q, k, v = (torch.zeros(0, h, 8, requires_grad=True) for h in (4, 2, 2))
    out = packed_attention(q, k, v, AttentionPlan.build([], [], [], [], CPU))
    out.sum().backward()
    assert all(x.grad is not None for x in (q, k, v))


def test_splits_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="splits cover 3 tokens, samples 4"):
        AttentionPlan.build([4], [3], ["causal"], [0], CPU)
