"""Moving average of the trained weights: float32, in the same shards as the weights, 4 bytes per parameter over all ranks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from train.distributed.sharding import local


class Ema:
    """`average <- decay * average + (1 - decay) * weight`, over the parameters that are trained.

    Args:
        model: after sharding and loading; its trainable parameters are averaged, starting from their present values.
        decay: constant, as published.
        warmup: cap the decay at `(1 + n) / (10 + n)` after `n` updates, so that a short run's average forgets its beginning.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = False):
        self.decay = decay
        self.warmup = warmup
        self._weights: dict[str, nn.Parameter] = {
            n: p for n, p in model.named_parameters() if p.requires_grad
        }
        self.averages: dict[str, Tensor] = {n: p.detach().float().clone() for n, p in self._weights.items()}

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the present weights (after loading others)."""
        for average, weight in self._pairs():
            average.copy_(weight)

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Take in the weights after an optimizer step.

        Args:
            num_updates: updates taken in before this one.
        """
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates)) if self.warmup else self.decay
        averages, weights = zip(*self._pairs(), strict=True) if self._weights else ((), ())
        if averages:
            torch._foreach_lerp_(list(averages), [w.float() for w in weights], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes with the averages for the time of the block; its weights come back unchanged.

        Needs room for a copy of the trained weights' pieces. Sharded weights that are gathered now or at the end of the block
        have to be gathered anew (`train.distributed.sharding.regather`).
        """
        held = [weight.detach().clone() for _, weight in self._pairs()]
        with torch.no_grad():
            for average, weight in self._pairs():
                weight.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for before, (_, weight) in zip(held, self._pairs(), strict=True):
                    weight.copy_(before)

    def with_frozen(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Every parameter of the model by name: averages, and frozen parameters as they are. For export."""
        return {n: self.averages.get(n, p.detach()) for n, p in model.named_parameters()}

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        # Asked anew each time: FSDP2 may replace a parameter's local tensor when it first runs.
        return [(local(self.averages[n]), local(p)) for n, p in self._weights.items()]
