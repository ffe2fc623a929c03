"""Learning rates on their way into the optimizer. The published schedules: tests/parity."""

import pytest
import torch
from torch import nn

from train.config import build_args
from train.optim import build_optimizer, lr_factor, set_learning_rates, trained_parameters


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
