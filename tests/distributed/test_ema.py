"""The sharded average is the closed form. The published numbers: tests/parity."""

import pytest
import torch
from torch import Tensor

from tests.distributed.gather import full_tensors
from tests.distributed.launch import run_distributed
from tests.distributed.toy import build, toy_args
from train.distributed.sharding import write_full


def average_of_known_weights(decay: float, warmup: bool) -> dict[str, Tensor]:
    state = build(toy_args(ema=decay, ema_warmup=warmup))
    trained = [(n, p) for n, p in state.model.named_parameters() if p.requires_grad]
    for n in range(5):
        for _, p in trained:
            write_full(p, torch.full(p.shape, float(n + 1)))
        state.ema.update(n)
    return full_tensors(state.ema.averages.items())


@pytest.mark.parametrize(("decay", "warmup"), [(0.9, False), (0.9999, True)])
def test_closed_form_on_two_ranks(decay: float, warmup: bool) -> None:
    average, _ = run_distributed(average_of_known_weights, 2, decay, warmup)
    first = full_tensors((n, p) for n, p in build(toy_args(), sharded=False).model.named_parameters())
    assert "vit_pos_embed" in first
    assert "vit_pos_embed" not in average
    for name, value in average.items():
        expected = first[name]
        for n in range(5):
            d = min(decay, (1 + n) / (10 + n)) if warmup else decay
            expected = d * expected + (1 - d) * (n + 1)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6, msg=name)
