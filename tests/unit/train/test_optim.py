"""Learning rates on their way into the optimizer. The published schedules: tests/parity."""

import pytest
import torch
from torch import nn

from train.config import build_args
from train.distributed.sharding import grad_norm
from train.optim import build_optimizer, clip_factor, lr_factor, set_learning_rates, trained_parameters


def test_groups_keep_their_proportion() -> None:
    args = build_args(
        {"lr": 1e-3, "min_lr": 1e-4, "lr_scheduler": "cosine", "warmup_steps": 2, "total_steps": 10}
    ).optim
    model = nn.Linear(2, 2)
    groups = [
        {"name": "a", "params": [model.weight], "peak_lr": 1e-3},
        {"name": "b", "params": [model.bias], "peak_lr": 4e-3},
    ]
    optimizer = build_optimizer(groups, args)
    assert set_learning_rates(optimizer, 1, args) == pytest.approx({"a": 5e-4, "b": 2e-3})
    assert set_learning_rates(optimizer, 10, args) == pytest.approx({"a": 1e-4, "b": 4e-4})
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-4, 4e-4])
    assert trained_parameters(optimizer) == [model.weight, model.bias]


@pytest.mark.parametrize(("decay", "begins"), [(16, 84), (None, 80)])
def test_a_decay_at_the_end(decay: int | None, begins: int) -> None:
    flags = {"lr": 1e-3, "min_lr": 1e-4, "lr_scheduler": "wsd", "warmup_steps": 10, "total_steps": 100}
    args = build_args({**flags, **({"decay_steps": decay} if decay else {})}).optim
    assert [lr_factor(step, args) for step in (0, 5, 10, 50, begins)] == [0, 0.5, 1, 1, 1]
    quarter = begins + (100 - begins) // 4
    assert lr_factor(quarter, args) == pytest.approx(0.1 + 0.9 * 0.5), (
        "the square root of a quarter is a half"
    )
    assert lr_factor(100, args) == pytest.approx(0.1)
    falling = [lr_factor(step, args) for step in range(begins, 101)]
    assert falling == sorted(falling, reverse=True) and len(set(falling)) == len(falling)


def test_adamw_is_the_textbook_formula() -> None:
    args = build_args({"lr": 0.1, "weight_decay": 0.5, "warmup_steps": 0}).optim
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = build_optimizer([{"name": "a", "params": [p], "peak_lr": 0.1}], args)
    set_learning_rates(optimizer, 0, args)
    p.grad = torch.tensor([3.0, 0.0])
    optimizer.step()
    # First step: the bias-corrected moments are the gradient and its square; a zero gradient leaves only the decay.
    torch.testing.assert_close(p.detach(), torch.tensor([1.0 * 0.95 - 0.1, -2.0 * 0.95]))


@pytest.mark.parametrize("size", [0.1, 10.0])
def test_a_step_is_torchs_after_clipping(size: float) -> None:
    """`factor` is what `clip_grad_norm_` does before, within the optimizer's own call."""
    args = build_args({"lr": 1e-2, "weight_decay": 0.1, "warmup_steps": 0}).optim
    torch.manual_seed(0)
    first = nn.Linear(40, 30)
    second = nn.Linear(40, 30)
    second.load_state_dict(first.state_dict())
    ours = build_optimizer([{"name": "all", "params": list(first.parameters()), "peak_lr": 1e-2}], args)
    theirs = torch.optim.AdamW(
        second.parameters(), lr=1e-2, betas=(args.beta1, args.beta2), eps=args.eps, weight_decay=0.1
    )
    for step in range(3):
        for p, q in zip(first.parameters(), second.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            p.grad *= size / 40
            q.grad = p.grad.clone()
        norm = nn.utils.clip_grad_norm_(second.parameters(), 1.0)
        assert float(norm) == pytest.approx(size, rel=0.3)
        set_learning_rates(ours, step, args)
        ours.step(factor=clip_factor(float(grad_norm(first.parameters())), 1.0))
        theirs.step()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_nothing_is_clipped_below_the_limit_or_without_one() -> None:
    assert clip_factor(0.5, 1.0) == clip_factor(100.0, 0.0) == 1.0
    assert clip_factor(4.0, 1.0) == pytest.approx(0.25)
