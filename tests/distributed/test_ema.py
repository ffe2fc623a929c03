"""The sharded average is the closed form. The published numbers: tests/parity."""

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.gather import full_tensors
from tests.distributed.launch import run_distributed
from tests.distributed.toy import build, toy_args
from train.distributed.sharding import write_full
from train.ema import Ema


def average_of_known_weights(decay: float, warmup: bool, on_cpu: bool) -> dict[str, Tensor]:
    state = build(toy_args(ema=decay, ema_warmup=warmup, ema_on_cpu=on_cpu))
    trained = [(n, p) for n, p in state.model.named_parameters() if p.requires_grad]
    for n in range(5):
        state.ema.release()
        for _, p in trained:
            write_full(p, torch.full(p.shape, float(n + 1)))
        state.ema.update(n)
    return full_tensors(state.ema.averages.items())


@pytest.mark.parametrize(
    ("decay", "warmup", "on_cpu"), [(0.9, False, False), (0.9999, True, False), (0.9, False, True)]
)
def test_closed_form_on_two_ranks(decay: float, warmup: bool, on_cpu: bool) -> None:
    average, _ = run_distributed(average_of_known_weights, 2, decay, warmup, on_cpu)
    first = full_tensors((n, p) for n, p in build(toy_args(), sharded=False).model.named_parameters())
    assert "vit_pos_embed" in first
    assert "vit_pos_embed" not in average
    for name, value in average.items():
        expected = first[name]
        for n in range(5):
            d = min(decay, (1 + n) / (10 + n)) if warmup else decay
            expected = d * expected + (1 - d) * (n + 1)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6, msg=name)


def test_averages_in_host_memory_are_the_same_to_the_bit() -> None:
    """Also while they are being made: whoever asks for them waits."""
    torch.manual_seed(0)
    model = nn.Linear(300, 300)
    averages = [Ema(model, 0.9, on_cpu=False), Ema(model, 0.9, on_cpu=True)]
    for n in range(4):
        for ema in averages:
            ema.update(n)
            ema.release()
        with torch.no_grad():
            model.weight.normal_()
        beside, aside = (ema.averages for ema in averages)
        assert all(torch.equal(x, aside[name]) for name, x in beside.items())
    before = model.weight.detach().clone()
    with averages[1].applied():
        assert torch.equal(model.weight, averages[0].averages["weight"])
    assert torch.equal(model.weight, before)
    averages[1].reset()
    assert torch.equal(averages[1].averages["weight"], before)


@pytest.mark.gpu
def test_averages_of_weights_on_a_gpu_in_host_memory() -> None:
    model = nn.Linear(2000, 2000, device="cuda")
    there, here = Ema(model, 0.9), Ema(model, 0.9, on_cpu=True)
    for n in range(4):
        for ema in (there, here):
            ema.update(n)
            ema.release()
        with torch.no_grad():
            model.weight.normal_()  # waits for the copy
    assert here.averages["weight"].device.type == "cpu"
    torch.testing.assert_close(here.averages["weight"], there.averages["weight"].cpu(), rtol=1e-6, atol=1e-7)
