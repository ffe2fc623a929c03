"""TaylorSeer: most steps of sampling an image need no forward pass, because the last state can be forecast from earlier ones."""

import math
from collections.abc import Callable

from torch import Tensor

WARM_UP, INTERVAL, ORDER = 5, 3, 6
"""Steps computed at the start; every so many-th step computed from there on; highest difference used."""


class Forecast:
    """States of successive steps behind one context: computed at some of them, a Taylor series of finite differences between.

    With the step number as time, the i-th difference at a computed step is that of the (i-1)-th ones there and at the computed
    step before, over the steps between; differences are taken from the last warm-up step on, so the order grows by one with every
    computed step. One object serves one drawing behind one context: nothing is left behind for the next.

    Source: TaylorSeer, arXiv 2503.06923; warm-up, interval and order as upstream Bagel 056b5fd, which forecasts the output of
    every layer; as all layers are left out together, the last one's is the only one that anything depends on.
    """

    def __init__(self) -> None:
        self._step = 0
        self._computed_at = 0
        self._differences: list[Tensor] = []

    def __call__(self, compute: Callable[[], Tensor]) -> Tensor:
        """The state of the next step; `compute` is called if it is not forecast."""
        step, self._step = self._step, self._step + 1
        since = step - self._computed_at
        if step >= WARM_UP and since < INTERVAL:
            terms = (d * since**i / math.factorial(i) for i, d in enumerate(self._differences))
            return sum(terms, start=self._differences[0].new_zeros(()))
        found = [compute()]
        if step >= WARM_UP - 1:
            for before in self._differences[:ORDER]:
                found.append((found[-1] - before) / since)
        self._differences, self._computed_at = found, step
        return found[0]
