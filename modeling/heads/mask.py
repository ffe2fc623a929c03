"""Mask of one object from its anchor's state and its picture's grid."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from modeling.heads.grids import regions_by_size
from modeling.heads.head import PerceptionHead
from modeling.heads.masks import laid_out
from modeling.ops.patch import normalise_pixels
from modeling.types import HeadInputs, HeadOutput


class MaskHead(PerceptionHead):
    """Which patches are meant, plus which pixels in them: two dot products with the anchor's state, added as logits.

    The first is with the grid's own features, wide enough to tell any two things apart. The second is with few fine features, at
    `stride` pixels, which come from the grid (each patch unfolds into its cells) and from a shallow look at the pixels: it
    carries the edges that the tower's last layer has smoothed away.
    """

    predicts = "mask"

    def __init__(
        self,
        *,
        hidden_size: int,
        grid_size: int,
        patch_size: int,
        width: int = 128,
        channels: int = 24,
        stride: int = 2,
    ):
        super().__init__()
        if patch_size % stride:
            raise ValueError(f"mask head: stride {stride} does not divide the patch size {patch_size}")
        self.stride = stride
        self.cells = patch_size // stride
        self.meant = nn.Linear(hidden_size, width)
        self.key = nn.Linear(grid_size, width)
        self.unfold = nn.Linear(grid_size, self.cells**2 * channels)
        self.look = nn.Conv2d(3, channels, stride + 1, stride=stride, padding=stride // 2)
        self.mix = nn.Conv2d(channels, channels, 3, padding=1)
        self.query = nn.Sequential(
            nn.Linear(hidden_size, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels + 1)
        )

    def forward(self, inputs: HeadInputs) -> HeadOutput:
        """Predict one mask per anchor at its image's size."""
        hidden, image, grids = inputs.hidden, inputs.regions.image, inputs.grids
        query, meant = self.query(hidden), self.meant(hidden)
        logits: list[tuple[int, Tensor]] = []
        for at, features, pixels, which in regions_by_size(grids, image):
            fine = self._fine(features, pixels)
            q = query[at]
            which_pixels = torch.einsum("kc,kchw->khw", q[:, 1:], fine[which]) + q[:, :1, None]
            keys = self.key(features)[which]
            which_patches = torch.einsum("kd,khwd->khw", meant[at], keys) * keys.shape[-1] ** -0.5
            full = _enlarged(which_pixels, self.stride) + _enlarged(which_patches, self.stride * self.cells)
            logits += zip(at.tolist(), full.unbind(), strict=True)
        flat, hw = laid_out(logits, full)
        return HeadOutput(boxes=hidden.new_zeros(0, 4), mask_logits=flat, mask_hw=hw)

    def _fine(self, features: Tensor, pixels: Tensor) -> Tensor:
        """`i h w d`, `i 3 hh ww` -> `i channels (hh / stride) (ww / stride)`."""
        unfolded = rearrange(
            self.unfold(features), "i h w (p q c) -> i c (h p) (w q)", p=self.cells, q=self.cells
        )
        seen = self.look(normalise_pixels(pixels).to(unfolded.dtype))
        # An odd kernel on an even stride: the look has one cell per stride, as the unfolded grid has.
        return self.mix(F.gelu(unfolded + seen))


def _enlarged(logits: Tensor, times: int) -> Tensor:
    """`k h w` to `times` that size, in float32."""
    return F.interpolate(logits[:, None].float(), scale_factor=times, mode="bilinear")[:, 0]
