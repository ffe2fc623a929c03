"""Small modules between the towers and the trunk."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.ops.patch import timestep_features

ACTIVATIONS = {
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
}
TIME_FEATURES = 256


class Connector(nn.Module):
    """ViT features -> trunk width."""

    def __init__(self, vit_width: int, width: int, act: str):
        super().__init__()
        if act not in ACTIVATIONS:
            raise ValueError(f"connector_act '{act}' is unknown; known are {', '.join(ACTIVATIONS)}")
        self.fc1, self.fc2 = nn.Linear(vit_width, width), nn.Linear(width, width)
        self.act = ACTIVATIONS[act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Absent(nn.Module):
    """Stands for a part that the model is built without: no rows in, no rows out.

    Args:
        width: of the rows that the part would give.
        flag: which leaves it out.
    """

    def __init__(self, width: int, flag: str):
        super().__init__()
        self.width, self.flag = width, flag

    def forward(self, x: Tensor, *rest: object) -> Tensor:
        if len(x):
            raise ValueError(f"the pack needs a part of the model that --{self.flag} False leaves out")
        return x.new_zeros(0, self.width, dtype=x.dtype if x.is_floating_point() else torch.float32)


class TimestepEmbedder(nn.Module):
    """Time of the flow -> trunk width."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(timestep_features(t, TIME_FEATURES).to(dtype))


class PositionTable(nn.Module):
    """Fixed 2-D sine-cosine table, kept as a frozen parameter because published checkpoints hold it."""

    def __init__(self, side: int, width: int):
        super().__init__()
        self.side = side
        self.pos_embed = nn.Parameter(torch.empty(side * side, width), requires_grad=False)

    def forward(self, position: Tensor) -> Tensor:
        return self.pos_embed[position]
