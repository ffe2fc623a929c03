"""Which token comes next: the likeliest, or one drawn by chance."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Choose = Callable[[Tensor, Sequence[int]], Tensor]
"""(logits `b vocab`, which sequence of the batch each row belongs to) -> `b` ids."""


def likeliest(logits: Tensor, sequences: Sequence[int]) -> Tensor:
    """Greedy decoding."""
    return logits.argmax(-1)


class Drawn:
    """Tokens drawn from softmax(logits / temperature), every sequence by a random stream of its own.

    What a sequence draws depends on its seed and on how far it has come, not on its neighbours or on the device.

    Args:
        temperature: below 1 sharpens, above 1 flattens.
        seeds: one per sequence.

    Raises:
        ValueError: if the temperature is not positive.
    """

    def __init__(self, temperature: float, seeds: Sequence[int]):
        if not temperature > 0:
            raise ValueError(
                f"temperature must be positive, not {temperature}; for the likeliest tokens leave do_sample out"
            )
        self.temperature = temperature
        self._streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits: Tensor, sequences: Sequence[int]) -> Tensor:
        uniform = torch.stack(
            [torch.rand((), generator=self._streams[i], dtype=torch.float64) for i in sequences]
        )
        probabilities = (logits.float() / self.temperature).softmax(-1)
        # In double precision, or 150,000 small steps would not add up.
        reached = probabilities.cumsum(-1, dtype=torch.float64)
        at = uniform.to(logits.device)[:, None] * reached[:, -1:]
        return torch.searchsorted(reached, at, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


class Told:
    """Texts that are given: the model says them whatever it would have said, and can then be asked what it sees.

    Args:
        texts: token ids of each sequence's text, without begin and end.
        end: the token that ends a text.
    """

    def __init__(self, texts: Sequence[Sequence[int]], end: int):
        self._waiting, self._end = [list(text) for text in texts], end

    def __call__(self, logits: Tensor, sequences: Sequence[int]) -> Tensor:
        return torch.tensor([self._waiting[i].pop(0) if self._waiting[i] else self._end for i in sequences])
