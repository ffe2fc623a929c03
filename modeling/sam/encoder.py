"""SAM's image encoder: a ViT whose layers see windows, four of them everything, with relative positions; then a neck."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from modeling.norms import ChannelNorm
from modeling.sam.config import SamVisionConfig

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
"""Of ImageNet's colours, 0 to 255: what pictures are normalised with."""


class SamPatchEmbed(nn.Module):
    """Cells of pixels -> states."""

    def __init__(self, config: SamVisionConfig):
        super().__init__()
        size = config.patch_size
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, size, stride=size)

    def forward(self, pixels: Tensor) -> Tensor:
        """`i 3 hh ww` -> `i h w d`."""
        return rearrange(self.projection(pixels), "i d h w -> i h w d")


class SamVisionAttention(nn.Module):
    """Every cell sees every other; how far they are apart, in rows and in columns, adds to the scores.

    Args:
        config: of the encoder.
        side: cells per side that the tables of relative positions cover.
    """

    def __init__(self, config: SamVisionConfig, side: int):
        super().__init__()
        width = config.hidden_size
        self.num_heads, self.side = config.num_attention_heads, side
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, width // self.num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, width // self.num_heads))

    def forward(self, x: Tensor) -> Tensor:
        """`b h w d`, h and w at most `side`."""
        _, h, w, _ = x.shape
        q, k, v = rearrange(self.qkv(x), "b h w (three n e) -> three b n (h w) e", three=3, n=self.num_heads)
        grid = rearrange(q, "b n (h w) e -> b n h w e", h=h)
        rows = torch.einsum("bnhwe,hke->bnhwk", grid, self._apart(self.rel_pos_h, h))
        columns = torch.einsum("bnhwe,wke->bnhwk", grid, self._apart(self.rel_pos_w, w))
        bias = (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(rearrange(out, "b n (h w) e -> b h w (n e)", h=h))

    def _apart(self, table: Tensor, count: int) -> Tensor:
        """`count count e`, the table's entry for each pair. A smaller grid uses the middle of the table: nothing is stretched."""
        at = torch.arange(count, device=table.device)
        return table[at[:, None] - at[None] + self.side - 1]


class SamMLP(nn.Module):
    """Two layers."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.gelu(self.lin1(x)))


class SamVisionLayer(nn.Module):
    """Pre-norm block on `i h w d`, over windows or over everything."""

    def __init__(self, config: SamVisionConfig, index: int):
        super().__init__()
        self.window = 0 if index in config.global_attn_indexes else config.window_size
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = SamVisionAttention(config, self.window or config.positions_per_side)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SamMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.layer_norm1(x)
        x = x + (self._in_windows(normed) if self.window else self.attn(normed))
        return x + self.mlp(self.layer_norm2(x))

    def _in_windows(self, x: Tensor) -> Tensor:
        """Cells that fill up the last windows are zeros, which take part, as published."""
        size, (_, h, w, _) = self.window, x.shape
        rows, columns = -(-h // size), -(-w // size)
        x = F.pad(x, (0, 0, 0, columns * size - w, 0, rows * size - h))
        cut = rearrange(x, "i (r p) (c q) d -> (i r c) p q d", p=size, q=size)
        whole = rearrange(self.attn(cut), "(i r c) p q d -> i (r p) (c q) d", r=rows, c=columns)
        return whole[:, :h, :w]


class SamNeck(nn.Module):
    """Grid of the encoder -> grid of the decoder: 1x1 and 3x3 convolutions without biases, each normed."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, channels, 1, bias=False)
        self.layer_norm1 = ChannelNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.layer_norm2 = ChannelNorm(channels)

    def forward(self, states: Tensor) -> Tensor:
        """`i h w d` -> `i c h w`."""
        x = self.layer_norm1(self.conv1(rearrange(states, "i h w d -> i d h w")))
        return self.layer_norm2(self.conv2(x))


class SamVisionEncoder(nn.Module):
    """Pictures -> grid of states; `neck` makes of it what the mask decoder looks at.

    A picture that is smaller than `image_size` lies in the upper left corner of it, as SAM pads: its cells have the positions
    that they would have there, and the empty cells beside it are not computed.
    """

    def __init__(self, config: SamVisionConfig, *, with_neck: bool = True):
        super().__init__()
        self.config = config
        side = config.positions_per_side
        self.patch_embed = SamPatchEmbed(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, side, side, config.hidden_size))
        self.layers = nn.ModuleList(SamVisionLayer(config, i) for i in range(config.num_hidden_layers))
        self.neck = SamNeck(config.hidden_size, config.output_channels) if with_neck else None

    def forward(self, pixels: Tensor) -> Tensor:
        """`i 3 hh ww` normalised, sides multiples of a patch -> `i h w d`, before the neck.

        Raises:
            ValueError: if there are more cells than positions.
        """
        x = self.patch_embed(pixels)
        h, w = x.shape[1:3]
        if max(h, w) > (side := self.config.positions_per_side):
            raise ValueError(f"a picture of {h}x{w} cells; SAM's encoder has positions for {side} a side")
        x = x + self.pos_embed[:, :h, :w]
        for layer in self.layers:
            x = layer(x)
        return x


def normalised(pixels: Tensor) -> Tensor:
    """`... 3 hh ww` uint8 (or numbers from 0 to 255) -> float32 around 0."""
    mean, std = (pixels.new_tensor(v, dtype=torch.float32)[:, None, None] for v in (MEAN, STD))
    return (pixels.float() - mean) / std


def padded(views: Sequence[Tensor], side: int, device: torch.device) -> Tensor:
    """Pictures `3 hh ww` uint8 -> `i 3 side side`, normalised, then zeros to the right and below.

    Raises:
        ValueError: if one is larger.
    """
    made = torch.zeros(len(views), 3, side, side, device=device)
    for place, view in zip(made, views, strict=True):
        height, width = view.shape[1:]
        if max(height, width) > side:
            raise ValueError(
                f"a picture of {width}x{height} px for an encoder of {side} px; set image_size {side} in "
                "head_image_transform_args"
            )
        place[:, :height, :width] = normalised(view)
    return made
