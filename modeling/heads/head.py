"""What every perception head is: a module from `HeadInputs` to `HeadOutput` that says of itself what it predicts."""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

SIZES = ("hidden_size", "grid_size", "patch_size")
"""What a head is told of the model it is in; everything else it takes is an option."""


class PerceptionHead(nn.Module):
    """A row of HEADS. Built with the widths of the trunk's states and of the grid, the patch size, and its own options.

    Attributes:
        predicts: what it may be called in `heads` of bagel_config.json, and what regions and losses know it by.
        gives: fields of `HeadOutput` that it fills beyond boxes and masks; losses on them are for such heads only.
    """

    predicts: ClassVar[str]
    gives: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def options(cls) -> dict[str, inspect.Parameter]:
        """The options it takes, by name."""
        parameters = inspect.signature(cls).parameters
        return {name: p for name, p in parameters.items() if name not in SIZES}

    @classmethod
    def wants_view(cls, options: Mapping[str, Any]) -> bool:
        """Whether, with these options, it has an image encoder of its own and reads `FeatureGrids.views`."""
        return False
