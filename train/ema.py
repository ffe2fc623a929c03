"""Moving average of the trained weights: float32, in the same shards as the weights, 4 bytes per parameter over all ranks."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from train.distributed.sharding import divided_as, local
from train.streams import beside, present


class Ema:
    """`average <- decay * average + (1 - decay) * weight`, over the parameters that are trained.

    Args:
        model: after sharding and loading; its trainable parameters are averaged, starting from their present values.
        decay: constant, as published.
        warmup: cap the decay at `(1 + n) / (10 + n)` after `n` updates, so that a short run's average forgets its beginning.
        on_cpu: keep the averages in host memory, and beside them room for a copy of the weights: 8 bytes per parameter there,
            none on the GPU. An update copies the weights while the next step computes, and averages in a thread; the numbers are
            the same.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = False, on_cpu: bool = False):
        self.decay = decay
        self.warmup = warmup
        self._weights: dict[str, nn.Parameter] = {
            n: p for n, p in model.named_parameters() if p.requires_grad
        }
        self._averages: dict[str, Tensor] = {
            n: divided_as(p, local(p.detach()).to("cpu" if on_cpu else p.device, torch.float32, copy=True))
            for n, p in self._weights.items()
        }
        self._thread = ThreadPoolExecutor(1, "average") if on_cpu else None
        self._copies: list[Tensor] = []
        self._copied: torch.cuda.Event | None = None
        self._averaging: Future[None] | None = None

    @property
    def averages(self) -> dict[str, Tensor]:
        """By name of the parameter; waits for the update that is under way."""
        self._finish()
        return self._averages

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the present weights (after loading others)."""
        for average, weight in self._pairs():
            average.copy_(weight)

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Take in the weights after an optimizer step. With `on_cpu`, they must not change before `release`.

        Args:
            num_updates: updates taken in before this one.
        """
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates)) if self.warmup else self.decay
        pairs = self._pairs()
        averages, weights = [average for average, _ in pairs], [weight for _, weight in pairs]
        if self._thread is None:
            _take_in(averages, weights, decay)
            return
        if not self._copies:
            self._copies = [torch.empty_like(w, device="cpu", pin_memory=w.is_cuda) for w in weights]
        with beside(present()) as stream:
            torch._foreach_copy_(self._copies, weights, non_blocking=True)
            self._copied = present() if stream is not None else None
        copied = self._copied

        def average_copies() -> None:
            if copied is not None:
                copied.synchronize()
            _take_in(averages, self._copies, decay)

        self._averaging = self._thread.submit(average_copies)

    def release(self) -> None:
        """From here on the weights may change: what the GPU does next waits for the copy, this thread does not."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes with the averages for the time of the block; its weights come back unchanged.

        Needs room for a copy of the trained weights' pieces. Sharded weights that are gathered now or at the end of the block
        have to be gathered anew (`train.distributed.sharding.regather`).
        """
        self.release()
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

    def _finish(self) -> None:
        averaging, self._averaging = self._averaging, None
        if averaging is not None:
            averaging.result()

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        # Asked anew each time: FSDP2 may replace a parameter's local tensor when it first runs.
        averages = self.averages
        return [(local(averages[n]), local(p.detach())) for n, p in self._weights.items()]


@torch.no_grad()
def _take_in(averages: Sequence[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    if averages:
        torch._foreach_lerp_(list(averages), [w.float() for w in weights], 1 - decay)
