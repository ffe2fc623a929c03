"""SigLIP vision tower on packed patches, embedded by a linear layer. Parameter names as in the published checkpoints."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.ops.attention import AttentionPlan, packed_attention
from modeling.ops.rope import rope_table, rotate
from modeling.siglip.config import SiglipConfig
from modeling.siglip.stem import ConvStem

ROPE_THETA = 10000.0

Rotation = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Cosine and sine, `v 1 e/2` each, of every patch's row and of its column."""


class SiglipEmbeddings(nn.Module):
    """Patch pixels plus a learned position (none with rotary positions)."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.patch_embedding = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.position_embedding = (
            None if config.rope else nn.Embedding(config.positions_per_side**2, config.hidden_size)
        )
        self.stem = (
            ConvStem(config.num_channels, config.patch_size, config.stem_width, config.hidden_size)
            if config.stem_width
            else None
        )

    def forward(self, patches: Tensor, position: Tensor, hw: tuple[tuple[int, int], ...]) -> Tensor:
        x = self.patch_embedding(patches)
        if self.position_embedding is not None:
            x = x + self.position_embedding(position)
        return x if self.stem is None else x + self.stem(patches, hw)


class SiglipAttention(nn.Module):
    """Every patch of an image sees every other."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def project(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """`v d` -> q, k, v `v h e`, q and k rotated."""
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotation is not None:
            q, k = _rotate_2d(q, rotation), _rotate_2d(k, rotation)
        return q, k, v

    def combine(self, attended: Tensor) -> Tensor:
        """Attention's result `v h e` -> `v d`."""
        return self.out_proj(attended.flatten(1))


class SiglipMLP(nn.Module):
    """Two layers with a tanh-approximated GELU."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiglipEncoderLayer(nn.Module):
    """Pre-norm block; what stands before and after attention are methods of their own, tensors in and tensors out."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.self_attn = SiglipAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, plan: AttentionPlan, rotation: Rotation | None) -> Tensor:
        q, k, v = self.before_attention(x, rotation)
        return self.after_attention(x, packed_attention(q, k, v, plan))

    def before_attention(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """The stream -> q, k, v."""
        return self.self_attn.project(self.layer_norm1(x), rotation)

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        """The stream and attention's result -> the stream after this layer."""
        x = x + self.self_attn.combine(attended)
        return x + self.mlp(self.layer_norm2(x))


class SiglipEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.layers = nn.ModuleList(SiglipEncoderLayer(config) for _ in range(config.num_hidden_layers))


class SiglipVisionTransformer(nn.Module):
    """Embeddings, layers, final norm; no pooling head."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.config = config
        self.embeddings = SiglipEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, patches: Tensor, position: Tensor, hw: tuple[tuple[int, int], ...], plan: AttentionPlan
    ) -> Tensor:
        x = self.embeddings(patches, position, hw)
        rotation = self._rotation(position) if self.config.rope else None
        for layer in self.encoder.layers:
            x = layer(x, plan, rotation)
        return self.post_layernorm(x)

    def _rotation(self, position: Tensor) -> Rotation:
        side = self.config.positions_per_side
        width = self.config.hidden_size // self.config.num_attention_heads // 2
        row = torch.div(position, side, rounding_mode="floor")
        return rope_table(row, width, ROPE_THETA), rope_table(position % side, width, ROPE_THETA)


class SiglipVisionModel(nn.Module):
    """The tower under the name it has in checkpoints (`vision_model`)."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.config = config
        self.vision_model = SiglipVisionTransformer(config)

    def forward(
        self, patches: Tensor, position: Tensor, hw: tuple[tuple[int, int], ...], plan: AttentionPlan
    ) -> Tensor:
        """Encode packed patches.

        Args:
            patches: `v (p p 3)` float in [-1, 1].
            position: `v` int64, places in the position table.
            hw: patch rows and columns of each image.
            plan: one `full` split per image.

        Returns:
            `v d`.
        """
        return self.vision_model(patches, position, hw, plan)


def _rotate_2d(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate `v h e`: the first half of a head by the patch's row, the second by its column."""
    by_row, by_column = x.chunk(2, dim=-1)
    return torch.cat([rotate(by_row, *rotation[0]), rotate(by_column, *rotation[1])], dim=-1)


def linear_patch_embedding(kernel: Tensor) -> Tensor:
    """Weight `d c p p` of a convolution over patches (Hugging Face's form) -> `d (p p c)`, the same map on flattened patches."""
    return kernel.permute(0, 2, 3, 1).flatten(1)
