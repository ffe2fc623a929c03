"""What a step's sums are divided by."""

import torch

from train.objective import divisors

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
