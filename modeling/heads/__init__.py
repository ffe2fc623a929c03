"""Perception heads: they read the state of an anchor token and its picture's feature grid, and know nothing of the trunk.

To add a head: one file here, one row in HEADS, one token in `data/tokens.py` ANCHORS.
"""

from collections.abc import Callable

from torch import nn

from modeling.heads.box import BoxHead
from modeling.heads.mask import MaskHead

HEADS: dict[str, Callable[..., nn.Module]] = {
    "box": BoxHead,
    "mask": MaskHead,
}
