"""What a step's sums are divided by."""

import torch

from modeling.types import LossTerm, Things
from train.objective import Objective, divisors

COUNTS = torch.tensor([[30.0, 4.0], [10.0, 0.0]], dtype=torch.float64)
"""Of two micro-batches and two losses, over all ranks."""


def test_a_step_is_divided_by_all_it_has() -> None:
    assert divisors(COUNTS, "step").tolist() == [[40.0, 4.0], [40.0, 4.0]]


def test_as_published_the_micro_batches_means_are_averaged() -> None:
    found = divisors(COUNTS, "micro_batch")
    sums = torch.tensor([[60.0, 8.0], [5.0, 0.0]], dtype=torch.float64)
    mean_of_means = (60 / 30 + 5 / 10) / 2
    assert (sums[:, 0] / found[:, 0]).sum() == mean_of_means
    assert found[1, 1] == 0  # a loss that a micro-batch has nothing of adds nothing (`Objective.scalar`)


def test_one_micro_batch_is_divided_the_same_either_way() -> None:
    assert torch.equal(divisors(COUNTS[:1], "step"), divisors(COUNTS[:1], "micro_batch"))


def test_a_loss_that_a_step_has_nothing_of_sends_back_exactly_nothing() -> None:
    """Also in float16, where a huge factor would be infinite, and infinity times 0 not a number."""
    total = torch.zeros((), requires_grad=True)
    term = LossTerm(
        name="ce", total=total.half().float(), each=torch.zeros(0), things=Things.alike(torch.zeros(0))
    )
    scaled = Objective({"ce": 1.0}).scalar((term,), torch.tensor([0.0])) * 65536.0
    scaled.backward()
    assert scaled.item() == 0.0 and total.grad is not None and total.grad.item() == 0.0
