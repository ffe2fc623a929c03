"""SAM's prompts: the code of places, and clicks, boxes and rough masks as tokens and maps for the mask decoder."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.norms import ChannelNorm


class SamPositionalEmbedding(nn.Module):
    """Random Fourier features of a place: sines and cosines of fixed random mixtures of its two coordinates."""

    def __init__(self, width: int):
        super().__init__()
        # A parameter, as in the published files, but never trained: everything learnt is about these very frequencies.
        self.positional_embedding = nn.Parameter(torch.randn(2, width // 2), requires_grad=False)

    def forward(self, places: Tensor) -> Tensor:
        """`... 2`, x y in [0, 1] -> `... d`."""
        table = self.positional_embedding
        # In float32 also where weights are not: rounded angles would be other places.
        angle = 2 * math.pi * ((2 * places.float() - 1) @ table.float())
        return torch.cat([angle.sin(), angle.cos()], dim=-1).to(table.dtype)

    def grid(self, height: int, width: int) -> Tensor:
        """`1 d height width`, the code of every cell's centre; of any aspect."""
        device = self.positional_embedding.device
        y, x = ((torch.arange(n, device=device) + 0.5) / n for n in (height, width))
        places = torch.stack([x[None].expand(height, -1), y[:, None].expand(-1, width)], dim=-1)
        return self(places).permute(2, 0, 1)[None]


class SamMaskEmbedding(nn.Module):
    """A rough mask at four times the grid's size -> a map on the grid."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels // 4, 2, stride=2)
        self.conv2 = nn.Conv2d(channels // 4, channels, 2, stride=2)
        self.conv3 = nn.Conv2d(channels, width, 1)
        self.layer_norm1, self.layer_norm2 = ChannelNorm(channels // 4), ChannelNorm(channels)

    def forward(self, masks: Tensor) -> Tensor:
        """`k 1 4h 4w` logits -> `k d h w`."""
        x = F.gelu(self.layer_norm1(self.conv1(masks)))
        return self.conv3(F.gelu(self.layer_norm2(self.conv2(x))))


class SamPromptEncoder(nn.Module):
    """What is asked for, as tokens (`sparse`) and as a map (`dense`); the language model's prompts are tokens already.

    Args:
        width: of the decoder.
        image_size: side in pixels that coordinates count in.
        mask_channels: inner width of rough masks.
    """

    def __init__(self, width: int, image_size: int, mask_channels: int = 16):
        super().__init__()
        self.image_size = image_size
        self.mask_embed = SamMaskEmbedding(width, mask_channels)
        self.no_mask_embed = nn.Embedding(1, width)
        self.point_embed = nn.ModuleList(nn.Embedding(1, width) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, width)

    def points(self, code: SamPositionalEmbedding, places: Tensor, labels: Tensor) -> Tensor:
        """Clicks as tokens.

        Args:
            code: of places.
            places: `k n 2`, x y in pixels of the square picture.
            labels: `k n` int64: 1 on the thing, 0 beside it, -1 no click at all.

        Returns:
            `k (n + 1) d`; the last one says that there is no box.
        """
        places = F.pad(places + 0.5, (0, 0, 0, 1))
        labels = F.pad(labels, (0, 1), value=-1)[..., None]
        tokens = code(places / self.image_size)
        tokens = torch.where(labels < 0, self.not_a_point_embed.weight, tokens)
        for label in (0, 1):
            tokens = tokens + torch.where(labels == label, self._of_kind(label), 0.0)
        return tokens

    def boxes(self, code: SamPositionalEmbedding, boxes: Tensor) -> Tensor:
        """`k 4` xyxy in pixels of the square picture -> `k 2 d`, a token per corner."""
        corners = code((boxes.unflatten(-1, (2, 2)) + 0.5) / self.image_size)
        return corners + torch.cat([self._of_kind(2), self._of_kind(3)])

    def _of_kind(self, kind: int) -> Tensor:
        """`1 d`: of clicks beside the thing and on it, of a box's first and last corner."""
        return self.get_parameter(f"point_embed.{kind}.weight")

    def dense(self) -> Tensor:
        """`1 d 1 1`, of prompts without a rough mask."""
        return self.no_mask_embed.weight[:, :, None, None]
