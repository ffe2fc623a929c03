"""Normalisations of maps `i c h w` that several parts use."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.Module):
    """Layer norm over the channels of every place; parameters as `nn.LayerNorm` names them."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`i c h w`."""
        last = x.movedim(1, -1)
        normed = F.layer_norm(last, last.shape[-1:], self.weight, self.bias, self.eps)
        # Channels first in memory again: on CPUs torch 2.11 writes beyond its buffers in the backward pass of transposed
        # convolutions (stride 2, output padding) of maps that lie channels last.
        return normed.movedim(-1, 1).contiguous()


class FixedBatchNorm(nn.Module):
    """Batch norm with the statistics it was given: what one picture becomes never depends on the others beside it.

    Its statistics are parameters that are not trained, under the names of `nn.BatchNorm2d`'s, so that published files fit.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.running_mean = nn.Parameter(torch.zeros(channels), requires_grad=False)
        self.running_var = nn.Parameter(torch.ones(channels), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`i c h w`."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]
