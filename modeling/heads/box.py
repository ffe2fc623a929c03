"""Box of one object from its anchor's state and its picture's grid."""

import torch
import torch.nn.functional as F
from torch import nn

from modeling.heads.grids import gather_patches
from modeling.heads.head import PerceptionHead
from modeling.ops.boxes import centre_to_corners
from modeling.types import HeadInputs, HeadOutput


class BoxHead(PerceptionHead):
    """The anchor's state looks for its object in the grid; what it sees there, and where, gives the box.

    Each of `num_heads` queries makes a map over the patches. The maps' means and spreads of place, and the features
    gathered with them, go through an MLP to a size and to a correction of the centre, which starts at the mean of the first map:
    looking at the right place is then already a box, and the gradient says where to look from the first step on.
    """

    predicts = "box"

    def __init__(
        self, *, hidden_size: int, grid_size: int, patch_size: int, width: int = 128, num_heads: int = 4
    ):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_size, width)
        self.key = nn.Linear(grid_size, width)
        self.value = nn.Linear(grid_size, width)
        self.out = nn.Sequential(nn.Linear(2 * width + 4 * num_heads, width), nn.GELU(), nn.Linear(width, 4))

    def forward(self, inputs: HeadInputs) -> HeadOutput:
        """Predict one box per anchor."""
        values, valid, centre = gather_patches(inputs.grids, inputs.regions.image)
        query = self.query(inputs.hidden)
        q, k, v = (
            x.unflatten(-1, (self.num_heads, -1)) for x in (query, self.key(values), self.value(values))
        )
        scores = torch.einsum("rhe,rnhe->rhn", q, k) * q.shape[-1] ** -0.5
        maps = scores.float().masked_fill(~valid[:, None], float("-inf")).softmax(-1)
        mean = torch.einsum("rhn,rnx->rhx", maps, centre)
        spread = torch.einsum("rhn,rnx->rhx", maps, centre**2) - mean**2
        seen = torch.einsum("rhn,rnhe->rhe", maps.to(v.dtype), v).flatten(1)
        place = torch.cat([mean, spread.clamp(min=1e-6).sqrt()], dim=-1).flatten(1).to(query.dtype)
        change = self.out(torch.cat([F.gelu(query), seen, place], dim=-1)).float()
        boxes = torch.cat(
            [(mean[:, 0].logit(eps=1e-4) + change[:, :2]).sigmoid(), change[:, 2:].sigmoid()], dim=-1
        )
        return HeadOutput(boxes=centre_to_corners(boxes), mask_logits=boxes.new_zeros(0))
