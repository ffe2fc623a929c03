"""SAM's mask decoder: prompt tokens and the grid look at each other; each mask token becomes a filter over the enlarged grid.

Letters: `k` prompts, each for one thing; `n` tokens of a prompt; `m` masks per prompt; `d` width; `h w` the grid.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from modeling.norms import ChannelNorm
from modeling.sam.config import SamDecoderConfig

STABILITY_DELTA, STABLE = 0.05, 0.98
"""SAM 2's rule: a mask is stable if this share of its pixels stays when the threshold moves by delta to either side."""


class SamMasks(NamedTuple):
    """What the decoder says.

    Attributes:
        logits: `k m 4h 4w`.
        iou: `k m`, its own guess of each mask's intersection over union.
        object_score: `k 1`, logit of the thing being there (SAM 2); without that token `k 0`.
    """

    logits: Tensor
    iou: Tensor
    object_score: Tensor


class SamAttention(nn.Module):
    """Attention at a fraction of the width."""

    def __init__(self, config: SamDecoderConfig, downsample: int = 1):
        super().__init__()
        width = config.hidden_size
        inner, self.num_heads = width // downsample, config.num_attention_heads
        self.q_proj, self.k_proj = nn.Linear(width, inner), nn.Linear(width, inner)
        self.v_proj, self.out_proj = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`k n d`, `k l d`, `k l d` -> `k n d`."""
        q, k, v = (
            rearrange(proj(x), "k n (heads e) -> k heads n e", heads=self.num_heads)
            for proj, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        return self.out_proj(
            rearrange(F.scaled_dot_product_attention(q, k, v), "k heads n e -> k n (heads e)")
        )


class SamReluMLP(nn.Module):
    """The MLP of a two-way layer."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.relu(self.lin1(x)))


class SamTwoWayLayer(nn.Module):
    """Tokens see each other, then the grid; then the grid sees the tokens. Norms follow the sums.

    Args:
        config: of the decoder.
        first: of the stack: tokens there are their own positions, and what they see of each other replaces them.
    """

    def __init__(self, config: SamDecoderConfig, *, first: bool):
        super().__init__()
        width, down = config.hidden_size, config.attention_downsample_rate
        self.first = first
        self.self_attn = SamAttention(config)
        self.cross_attn_token_to_image = SamAttention(config, down)
        self.cross_attn_image_to_token = SamAttention(config, down)
        self.mlp = SamReluMLP(width, config.mlp_dim)
        norms = (nn.LayerNorm(width, eps=config.layer_norm_eps) for _ in range(4))
        self.layer_norm1, self.layer_norm2, self.layer_norm3, self.layer_norm4 = norms

    def forward(
        self, tokens: Tensor, grid: Tensor, token_code: Tensor, grid_code: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`k n d` and `k l d` with their position codes -> both again."""
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            placed = tokens + token_code
            tokens = tokens + self.self_attn(placed, placed, tokens)
        tokens = self.layer_norm1(tokens)
        seen = self.cross_attn_token_to_image(tokens + token_code, grid + grid_code, grid)
        tokens = self.layer_norm2(tokens + seen)
        tokens = self.layer_norm3(tokens + self.mlp(tokens))
        told = self.cross_attn_image_to_token(grid + grid_code, tokens + token_code, tokens)
        return tokens, self.layer_norm4(grid + told)


class SamTwoWayTransformer(nn.Module):
    """The layers, and a last look of the tokens at the grid."""

    def __init__(self, config: SamDecoderConfig):
        super().__init__()
        self.layers = nn.ModuleList(
            SamTwoWayLayer(config, first=i == 0) for i in range(config.num_hidden_layers)
        )
        self.final_attn_token_to_image = SamAttention(config, config.attention_downsample_rate)
        self.layer_norm_final_attn = nn.LayerNorm(config.hidden_size)  # eps 1e-5 in every implementation

    def forward(self, tokens: Tensor, grid: Tensor, grid_code: Tensor) -> tuple[Tensor, Tensor]:
        """`k n d`, which are their own position codes, `k l d` and its code -> both."""
        code = tokens
        for layer in self.layers:
            tokens, grid = layer(tokens, grid, code, grid_code)
        seen = self.final_attn_token_to_image(tokens + code, grid + grid_code, grid)
        return self.layer_norm_final_attn(tokens + seen), grid


class SamFeedForward(nn.Module):
    """A ReLU MLP of `depth` layers."""

    def __init__(self, width: int, inner: int, out: int, depth: int):
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(width, inner), nn.Linear(inner, out)
        self.layers = nn.ModuleList(nn.Linear(inner, inner) for _ in range(depth - 2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.proj_in(x))
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.proj_out(x)


class SamMaskDecoder(nn.Module):
    """Prompts and the grid of their picture -> masks at four times the grid's size.

    With `object_score` it is SAM 2's, which has one token more and adds finer maps of the picture while it enlarges the grid;
    SAM's can be given such maps too.
    """

    def __init__(self, config: SamDecoderConfig):
        super().__init__()
        self.config = config
        width, count = config.hidden_size, config.num_multimask_outputs + 1
        self.iou_token, self.mask_tokens = nn.Embedding(1, width), nn.Embedding(count, width)
        self.transformer = SamTwoWayTransformer(config)
        self.upscale_conv1 = nn.ConvTranspose2d(width, width // 4, 2, stride=2)
        self.upscale_conv2 = nn.ConvTranspose2d(width // 4, width // 8, 2, stride=2)
        self.upscale_layer_norm = ChannelNorm(width // 4)
        self.output_hypernetworks_mlps = nn.ModuleList(
            SamFeedForward(width, width, width // 8, 3) for _ in range(count)
        )
        self.iou_prediction_head = SamFeedForward(
            width, config.iou_head_hidden_dim, count, config.iou_head_depth
        )
        if config.object_score:
            self.obj_score_token = nn.Embedding(1, width)
            self.pred_obj_score_head = SamFeedForward(width, width, 1, 3)

    def forward(
        self,
        grid: Tensor,
        grid_code: Tensor,
        sparse: Tensor,
        dense: Tensor,
        fine: tuple[Tensor, Tensor] | None = None,
    ) -> SamMasks:
        """Decode every prompt by itself; `k` may be 0.

        Args:
            grid: `k d h w`, each prompt's picture.
            grid_code: `1 d h w` or `k d h w`, positions.
            sparse: `k n d`, tokens of each prompt.
            dense: `k d h w` or what broadcasts to it.
            fine: maps of the picture `k d/4 2h 2w` and `k d/8 4h 4w`, or None.

        Returns:
            the first mask of every prompt and the `num_multimask_outputs` others.
        """
        k, width, h, w = grid.shape
        score = [self.obj_score_token.weight] if self.config.object_score else []
        own = torch.cat([*score, self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([own.expand(k, -1, -1), sparse], dim=1)
        flat = (grid + dense).flatten(2).transpose(1, 2)
        code = grid_code.expand(k, -1, -1, -1).flatten(2).transpose(1, 2)
        tokens, flat = self.transformer(tokens, flat, code)
        first = 1 if self.config.object_score else 0
        asked = tokens[:, first + 1 : first + 1 + len(self.output_hypernetworks_mlps)]

        filters = torch.stack(
            [mlp(asked[:, i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], dim=1
        )
        maps = self._enlarged(flat.transpose(1, 2).reshape(k, width, h, w), fine)
        logits = torch.einsum("kmc,kchw->kmhw", filters, maps)
        iou = self.iou_prediction_head(tokens[:, first])
        if self.config.iou_sigmoid:
            iou = iou.sigmoid()
        is_there = self.pred_obj_score_head(tokens[:, 0]) if self.config.object_score else iou[:, :0]
        return SamMasks(logits=logits, iou=iou, object_score=is_there)

    def _enlarged(self, grid: Tensor, fine: tuple[Tensor, Tensor] | None) -> Tensor:
        """`k d h w` -> `k d/8 4h 4w`."""
        x = self.upscale_conv1(grid)
        x = F.gelu(self.upscale_layer_norm(x if fine is None else x + fine[0]))
        x = self.upscale_conv2(x)
        return F.gelu(x if fine is None else x + fine[1])


def first_mask(found: SamMasks) -> tuple[Tensor, Tensor]:
    """The mask of a prompt with one meaning, `k 4h 4w`, and its quality `k`."""
    return found.logits[:, 0], found.iou[:, 0]


def stable_mask(found: SamMasks) -> tuple[Tensor, Tensor]:
    """SAM 2's choice at inference: the first mask if it is stable, else the one of the others that claims to be best."""
    first, iou = first_mask(found)
    area = [(first > edge).flatten(1).sum(1) for edge in (STABILITY_DELTA, -STABILITY_DELTA)]
    stable = torch.where(area[1] > 0, area[0] / area[1].clamp(min=1), 1.0) >= STABLE
    rows = torch.arange(len(first), device=first.device)
    best = found.iou[:, 1:].argmax(1) + 1
    logits = torch.where(stable[:, None, None], first, found.logits[rows, best])
    return logits, torch.where(stable, iou, found.iou[rows, best])
