"""SAM's image encoder as the language model's vision tower (`vision_sharing: sam`): packed patches to states before the neck."""

import torch
from einops import rearrange
from torch import Tensor, nn

from modeling.ops.attention import AttentionPlan
from modeling.ops.patch import images_by_size
from modeling.sam.config import SamVisionConfig
from modeling.sam.encoder import SamVisionEncoder, normalised


class SamTower(nn.Module):
    """The encoder without its neck, on pictures of any size up to its square; nothing is padded."""

    def __init__(self, config: SamVisionConfig):
        super().__init__()
        self.config = config
        self.vision_model = nn.ModuleDict({"encoder": SamVisionEncoder(config, with_neck=False)})

    def forward(
        self, patches: Tensor, position: Tensor, hw: tuple[tuple[int, int], ...], plan: AttentionPlan
    ) -> Tensor:
        """Encode packed patches.

        Args:
            patches: `v (p p 3)` float in [-1, 1].
            position: not looked at: a picture lies in the upper left corner of the encoder's square.
            hw: patch rows and columns of each image.
            plan: not looked at: pictures of one size are encoded together, each by itself.

        Returns:
            `v d`.
        """
        encoder, found = self.vision_model["encoder"], []
        for rows, pixels in images_by_size(patches, hw, self.config.patch_size):
            seen = normalised((pixels.float() + 1) * 127.5).to(patches.dtype)
            found.append((rows, rearrange(encoder(seen), "i h w d -> (i h w) d")))
        if not hw:
            return found[0][1][:0]
        order = torch.cat([rows for rows, _ in found]).argsort()
        return torch.cat([states for _, states in found])[order]
