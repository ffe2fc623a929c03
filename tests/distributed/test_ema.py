"""The sharded average is the closed form."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.launch import run_distributed
from tests.distributed.toy import build, toy_args
from train.distributed.sharding import full_tensors, write_full
from train.ema import Ema

GOLDEN = Path(__file__).parents[1] / "golden" / "schedulers.json"


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


@pytest.mark.parametrize(
    "case", json.loads(GOLDEN.read_text())["ema"]["cases"], ids=lambda c: f"decay={c['decay']}"
)
def test_published_numbers(case: dict) -> None:
    model = nn.ParameterList(
        nn.Parameter(torch.tensor(x), requires_grad=grad)
        for x, grad in zip(case["initial_ema"], case["requires_grad"], strict=True)
    )
    ema = Ema(model, case["decay"])
    for n, (weights, expected) in enumerate(
        zip(case["model_params_per_update"], case["ema_after_each_update"], strict=True)
    ):
        with torch.no_grad():
            for p, value in zip(model, weights, strict=True):
                if p.requires_grad:
                    p.copy_(torch.tensor(value))
        ema.update(n)
        averages = ema.with_frozen(model)
        for i, value in enumerate(expected):
            torch.testing.assert_close(averages[str(i)], torch.tensor(value), rtol=1e-6, atol=1e-7)
