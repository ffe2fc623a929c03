"""Box by embedding: all that is known of it is in the anchor's state (PerceptionGPT, arXiv 2311.06612)."""

import torch.nn.functional as F
from torch import nn

from modeling.heads.head import PerceptionHead
from modeling.types import HeadInputs, HeadOutput


class BoxEmbeddingHead(PerceptionHead):
    """Three linear layers with ReLU between, then a sigmoid: the corners. The last starts at nothing: in the picture's middle.

    Args:
        hidden_size, grid_size, patch_size: of the model.
        width: between the layers.
    """

    predicts = "box"

    def __init__(self, *, hidden_size: int, grid_size: int, patch_size: int, width: int = 512):
        super().__init__()
        widths = (hidden_size, width, width, 4)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))

    def forward(self, inputs: HeadInputs) -> HeadOutput:
        """Predict one box per anchor; the picture is not looked at."""
        x = inputs.hidden
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        boxes = self.layers[-1](x).float().sigmoid()
        return HeadOutput(boxes=boxes, mask_logits=boxes.new_zeros(0))
