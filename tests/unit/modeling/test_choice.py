"""Tokens drawn by chance: of the right distribution, reproducible, each sequence by itself."""

import pytest
import torch

from modeling.bagel.choice import Drawn, likeliest


def test_draws_follow_the_tempered_softmax() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, -torch.inf, 1.0])
    counts = torch.zeros(5)
    drawn = Drawn(2.0, range(500))
    for _ in range(20):
        ids = drawn(logits.expand(500, 5), range(500))
        counts += torch.bincount(ids, minlength=5)
    expected = (logits / 2.0).softmax(-1)
    # Ten thousand draws: three standard errors are 0.015.
    assert ((counts / counts.sum()) - expected).abs().max() < 0.015
    assert counts[3] == 0


def test_a_sequence_draws_the_same_whoever_is_beside_it() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together, alone = Drawn(1.0, [7, 8, 9]), Drawn(1.0, [9])
    for sequences in ([0, 1, 2], [1, 2], [2], [0, 2]):
        ids = together(logits[sequences], sequences)
        assert ids[-1] == alone(logits[2:], [0])[0]


def test_little_temperature_is_greedy_and_none_is_refused() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(Drawn(1e-4, range(4))(logits, range(4)), likeliest(logits, range(4)))
    with pytest.raises(ValueError, match="temperature must be positive, not 0"):
        Drawn(0, [1])
