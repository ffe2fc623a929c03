"""Layers of heads that look at a picture with queries: sine codes of places, attention, a pre-norm decoder layer."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FINEST = 64.0
"""The finest wave of a place's code has this many half periods across the picture, the coarsest one."""


def sine_code(values: Tensor, width: int) -> Tensor:
    """Codes of numbers in [0, 1], one after the other.

    Args:
        values: `... k`.
        width: of each number's code; even.

    Returns:
        `... (k width)` float32: sines, then cosines, of half periods from 1 to `FINEST`.
    """
    steps = torch.arange(width // 2, device=values.device, dtype=torch.float32) / max(1, width // 2 - 1)
    angles = values.float()[..., None] * math.pi * FINEST**steps
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class Attention(nn.Module):
    """Multi-head attention from some rows to others."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        # A bias on every key would cancel in the softmax.
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """`r q d` of queries `r q d`, keys and values `r n d`; `bias`: `(r or 1) (heads or 1) q n`, added to the scores."""
        q, k, v = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x in (self.query(queries), self.key(keys), self.value(values))
        )
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        weights = (scores if bias is None else scores + bias).softmax(-1)
        return self.out((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))


class QueryLayer(nn.Module):
    """Queries look at each other, then at the picture, then think; normed before each (pre-norm)."""

    def __init__(self, width: int, num_heads: int, feed_forward: int):
        super().__init__()
        self.among, self.at = Attention(width, num_heads), Attention(width, num_heads)
        self.among_norm, self.at_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.think = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, feed_forward), nn.GELU(), nn.Linear(feed_forward, width)
        )

    def forward(
        self,
        x: Tensor,
        place: Tensor,
        memory: Tensor,
        memory_place: Tensor,
        *,
        among: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            x, place: `r q d`, what the queries hold and the codes of where they are.
            memory, memory_place: `r n d`, likewise of the picture.
            among, at: biases of the two attentions' scores, see `Attention`.
        """
        y = self.among_norm(x)
        x = x + self.among(y + place, y + place, y, among)
        y = self.at_norm(x)
        x = x + self.at(y + place, memory + memory_place, memory, at)
        return x + self.think(x)


def perceptron(width: int, out: int, layers: int = 3) -> nn.Sequential:
    """`layers` linear layers with ReLU between them."""
    parts: list[nn.Module] = []
    for _ in range(layers - 1):
        parts += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(width, out))


def closed(valid: Tensor) -> Tensor:
    """Bias that keeps what is not valid out of sight: 0 or minus a large number (a row without anything valid stays finite)."""
    return torch.zeros(valid.shape, device=valid.device).masked_fill(~valid, -1e9)


def causal(length: int, device: torch.device) -> Tensor:
    """Bias `1 1 length length` under which each place sees itself and what is before it."""
    return closed(torch.ones(length, length, dtype=torch.bool, device=device).tril())[None, None]


class Adapter(nn.Module):
    """A residual bottleneck that starts as nothing."""

    def __init__(self, width: int, ratio: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down, self.up = (
            nn.Linear(width, max(1, width // ratio)),
            nn.Linear(max(1, width // ratio), width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`... d` -> `... d`."""
        out: Tensor = x + self.up(F.silu(self.down(self.norm(x))))
        return out
