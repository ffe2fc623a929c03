"""Forecast states: which steps are computed, what is exact, and that nothing is left behind."""

import math

import pytest
import torch

from data.types import Segment
from modeling.bagel.decode import DrawOptions
from modeling.bagel.forecast import Forecast
from tests.unit.modeling.tiny import picture, text, tiny_decoder


def run(state, steps: int) -> tuple[list[int], list[float]]:
    """Which steps were computed, and the state at every step."""
    forecast, computed, found = Forecast(), [], []
    for step in range(steps):

        def compute(step: int = step) -> torch.Tensor:
            computed.append(step)
            return torch.tensor([state(step)], dtype=torch.float64)

        found.append(float(forecast(compute)))
    return computed, found


def test_five_steps_then_every_third_is_computed() -> None:
    computed, _ = run(float, 49)
    assert computed == [0, 1, 2, 3, 4, *range(7, 49, 3)]


def test_a_straight_line_is_forecast_exactly() -> None:
    _, found = run(lambda step: 3.0 - 0.25 * step, 20)
    assert found == pytest.approx([3.0 - 0.25 * step for step in range(20)])


def test_the_series_is_that_of_the_finite_differences() -> None:
    computed, found = run(lambda step: math.exp(0.1 * step), 9)
    f = [math.exp(0.1 * step) for step in range(9)]
    first = [f[4] - f[3], (f[7] - f[4]) / 3]
    second = (first[1] - first[0]) / 3
    assert computed == [0, 1, 2, 3, 4, 7]
    assert found[5:7] == pytest.approx([f[4] + first[0], f[4] + 2 * first[0]])
    assert found[8] == pytest.approx(f[7] + first[1] + second / 2)


def test_a_drawing_with_forecasts_leaves_nothing_behind() -> None:
    d = tiny_decoder()
    options = DrawOptions(num_timesteps=12, cfg_text_scale=2.0)
    plain = DrawOptions(num_timesteps=12, cfg_text_scale=2.0, taylorseer=False)

    def draw(options: DrawOptions) -> torch.Tensor:
        context, before = d.start(1), d.start(1)
        for c in (context, before):
            d.prefill(c, [Segment(kind="und_image", pixels=picture(1))])
        d.prefill(context, [text(10, 11)])
        (image,) = d.draw(context, [(32, 32)], [5], options, before)
        return image.int()

    first = draw(plain)
    forecast = draw(DrawOptions(num_timesteps=12, cfg_text_scale=2.0, taylorseer=True))
    assert torch.equal(draw(options), first)
    assert torch.equal(draw(DrawOptions(num_timesteps=12, cfg_text_scale=2.0, taylorseer=True)), forecast)
    assert not torch.equal(first, forecast)  # or nothing was forecast
    assert (first - forecast).abs().float().mean() < 10
