"""The blockwise cross entropy against the one that has all logits: the same loss and the same gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.ops import cross_entropy
from modeling.ops.cross_entropy import linear_cross_entropy


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of four tokens, so that a few tokens make several blocks and a rest."""
    monkeypatch.setattr(cross_entropy, "BLOCK_NUMBERS", 0)
    monkeypatch.setattr(cross_entropy, "MIN_TOKENS", {"cpu": 4, "cuda": 4})


def inputs(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    states = torch.randn(count, 8, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(50, 8, generator=g).to(dtype).requires_grad_()
    return states, weight, torch.randint(50, (count,), generator=g), torch.rand(count, generator=g)


def plain(states: Tensor, weight: Tensor, labels: Tensor, amount: Tensor) -> tuple[Tensor, Tensor]:
    nll = F.cross_entropy((states @ weight.T).float(), labels, reduction="none")
    return (nll * amount).sum(), nll


@pytest.mark.parametrize("count", [0, 3, 11])
@pytest.mark.parametrize("scale", [1.0, 0.03])
def test_loss_and_gradients_are_those_of_all_logits(count: int, scale: float) -> None:
    ours, theirs = inputs(count), inputs(count)
    (a, nll), (b, expected) = linear_cross_entropy(*ours), plain(*theirs)
    assert a.dtype == torch.float32 and a.item() == pytest.approx(b.item(), rel=1e-6)
    torch.testing.assert_close(nll, expected.detach(), rtol=1e-6, atol=1e-6)
    (scale * a).backward()
    (scale * b).backward()
    for x, y in zip(ours[:2], theirs[:2], strict=True):  # worst measured: 4.8e-7 beside entries of about 3
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-6, atol=1e-6)


def test_bfloat16_is_rounded_no_more_than_with_all_logits() -> None:
    exact, ours, theirs = inputs(11, torch.float64), inputs(11, torch.bfloat16), inputs(11, torch.bfloat16)
    with torch.no_grad():
        for x, y in zip(exact[:2], ours[:2], strict=True):
            x.copy_(y)
    plain(*exact)[0].backward()
    linear_cross_entropy(*ours)[0].backward()
    plain(*theirs)[0].backward()
    for x, y, z in zip(exact[:2], ours[:2], theirs[:2], strict=True):
        assert y.grad.dtype == torch.bfloat16
        assert (y.grad - x.grad).norm() < 1.5 * (z.grad - x.grad).norm()


def test_in_float16_sums_over_tokens_and_large_scales_stay_finite() -> None:
    """What all tokens together do to a word is beyond float16, and so may be the loss's scale."""
    count, scale = 4096, 2.0**18
    states = torch.full((count, 8), 64.0, dtype=torch.float16).requires_grad_()
    weight = torch.zeros(2, 8, dtype=torch.float16).requires_grad_()
    labels, amount = torch.zeros(count, dtype=torch.int64), torch.ones(count)
    total, _ = linear_cross_entropy(states, weight, labels, amount)
    (total * (1 / count)).backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float16
    torch.testing.assert_close(weight.grad, torch.tensor([[-32.0], [32.0]]).half().expand(2, 8))

    states = torch.zeros(1, 8, dtype=torch.float16).requires_grad_()
    weight = torch.full((2, 8), 2.0**-6).mul_(torch.tensor([[1.0], [-1.0]])).half()
    total, _ = linear_cross_entropy(states, weight, labels[:1], amount[:1])
    (total * scale).backward()
    assert states.grad is not None and states.grad.dtype == torch.float16
    torch.testing.assert_close(states.grad, torch.full((1, 8), -(2.0**12)).half())


def test_extreme_logits_stay_finite() -> None:
    states, weight, labels, amount = inputs(5)
    total, nll = linear_cross_entropy(states * 1e4, weight, labels, amount)
    total.backward()
    assert nll.isfinite().all() and states.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen: int) -> None:
    values = inputs(5)
    values[frozen].requires_grad_(False)
    linear_cross_entropy(*values)[0].backward()
    assert values[frozen].grad is None and values[1 - frozen].grad is not None


def test_without_gradient_only_the_loss_is_computed() -> None:
    with torch.no_grad():
        total, _ = linear_cross_entropy(*inputs(5))
    assert not total.requires_grad and total.item() == pytest.approx(plain(*inputs(5))[0].item(), rel=1e-6)


def test_the_gradient_in_the_states_can_be_asked_for_many_times_and_that_of_the_weights_once() -> None:
    states, weight, labels, amount = inputs(5)
    total, _ = linear_cross_entropy(states, weight, labels, amount)
    first = torch.autograd.grad(total, states, retain_graph=True)[0].clone()
    (2 * total).backward(retain_graph=True)
    assert torch.equal(states.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second backward"):
        total.backward()
