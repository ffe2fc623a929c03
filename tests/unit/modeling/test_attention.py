"""Every way to compute packed attention against the rule written out as a dense mask, on 200 random split layouts."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.ops.attention import AttentionPlan, dense_allowed, packed_attention
from modeling.ops.attention_backends import ATTENTION, Layout
from modeling.ops.flex import FlexPlan, filler_lens

CPU = torch.device("cpu")


def random_layout(seed: int) -> Layout:
    rng = random.Random(seed)
    sample_lens, split_lens, modes, branches = [], [], [], []
    for _ in range(rng.randint(1, 5)):
        lens = [rng.randint(1, 20) for _ in range(rng.randint(1, 5))]
        split_lens += lens
        modes += [rng.choice(["causal", "full", "noise"]) for _ in lens]
        branches += [rng.choice([0, 0, 1, 2]) for _ in lens]
        sample_lens.append(sum(lens))
    return sample_lens, split_lens, modes, branches


def dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)[0].transpose(0, 1)


def random_pack(*seeds: int, device: str = "cpu") -> tuple[Layout, list[Tensor], Tensor, Tensor]:
    """Layouts laid end to end; q, k, v (4 and 2 heads) and a gradient to send back; who sees whom."""
    layout = tuple(sum(parts, []) for parts in zip(*map(random_layout, seeds), strict=True))
    generator = torch.Generator().manual_seed(seeds[0])
    n = sum(layout[0])
    q, k, v, g = (torch.randn(n, h, 16, generator=generator).to(device) for h in (4, 2, 2, 4))
    return layout, [x.requires_grad_() for x in (q, k, v)], g, dense_allowed(*layout).to(device)


NUM_LAYOUTS = 200
TRAINING = [name for name in ATTENTION if name != "flex"]
"""Back ends that have a backward pass on a CPU."""


def assert_agree(backend: str, seed: int, device: str = "cpu") -> None:
    """One random pack through a back end and through a dense mask, forward and backward. Largest errors over the 200 layouts on a
    CPU: 9.5e-7 and 1.9e-6.
    """
    layout, qkv, g, allowed = random_pack(seed, device=device)
    ours = ATTENTION[backend](layout, torch.device(device))(*qkv)
    theirs = dense(*qkv, allowed)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    for a, b in zip(torch.autograd.grad(ours, qkv, g), torch.autograd.grad(theirs, qkv, g), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-6)


@pytest.mark.parametrize("backend", TRAINING)
def test_back_ends_agree_with_a_dense_mask_forward_and_backward(backend: str) -> None:
    for seed in range(NUM_LAYOUTS):
        assert_agree(backend, seed)


def test_long_and_short_samples_of_one_pack_go_different_ways() -> None:
    for seed in range(40):
        layout, qkv, _, allowed = random_pack(seed)
        plan = AttentionPlan.build(*layout, CPU, 40)
        torch.testing.assert_close(packed_attention(*qkv, plan), dense(*qkv, allowed), rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_agrees_with_a_dense_mask_forward() -> None:
    together = 8  # in one pack: every call costs a fixed 40 ms
    for seed in range(0, NUM_LAYOUTS, together):
        layout, qkv, _, allowed = random_pack(*range(seed, seed + together))
        ours = ATTENTION["flex"](layout, CPU)(*qkv)
        torch.testing.assert_close(ours, dense(*qkv, allowed), rtol=0, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ATTENTION)
def test_back_ends_agree_on_a_gpu(backend: str) -> None:
    for seed in range(NUM_LAYOUTS):
        assert_agree(backend, seed, "cuda")


@pytest.mark.parametrize("block", [4, 16])
def test_flex_computes_the_blocks_that_see_something_and_masks_those_that_see_a_part(block: int) -> None:
    """On a CPU the kernel looks at every pair; a GPU's looks only where the block table says."""
    for seed in range(NUM_LAYOUTS):
        layout = random_layout(seed)
        filler = filler_lens(sum(layout[0]), block)
        mask = FlexPlan.build(*layout, CPU, block).mask
        alone = [torch.ones(n, n, dtype=torch.bool).tril() for n in filler]
        allowed = torch.block_diag(dense_allowed(*layout), *alone).bool()
        pairs = allowed.unflatten(1, (-1, block)).unflatten(0, (-1, block)).sum((1, 3))
        assert torch.equal(listed(mask.kv_num_blocks, mask.kv_indices), (pairs > 0) & (pairs < block**2))
        assert torch.equal(listed(mask.full_kv_num_blocks, mask.full_kv_indices), pairs == block**2)


def test_packs_of_about_one_length_share_a_kernel() -> None:
    lengths = {n + sum(filler_lens(n, 128)) for n in range(32769, 36865)}
    assert lengths == {36864}
    assert {n + sum(filler_lens(n, 128)) for n in range(1, 129)} == {128}
    assert sum(filler_lens(1_000, 128)) == 24 and max(filler_lens(33_000, 128)) == 128


def listed(counts: Tensor | None, columns: Tensor | None) -> Tensor:
    """`blocks blocks` bool of a block table."""
    assert counts is not None and columns is not None
    table = torch.zeros(columns.shape[2:], dtype=torch.bool)
    for row, (count, order) in enumerate(zip(counts[0, 0].tolist(), columns[0, 0].tolist(), strict=True)):
        table[row, order[:count]] = True
    return table


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


@pytest.mark.parametrize("backend", ATTENTION)
def test_no_tokens_still_connect_the_projections(backend: str) -> None:
    q, k, v = (torch.zeros(0, h, 8, requires_grad=True) for h in (4, 2, 2))
    out = ATTENTION[backend](([], [], [], []), CPU)(q, k, v)
    out.sum().backward()
    assert all(x.grad is not None for x in (q, k, v))


def test_splits_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="splits cover 3 tokens, samples 4"):
        AttentionPlan.build([4], [3], ["causal"], [0], CPU)
