"""What every perception head is: a module from `HeadInputs` to `HeadOutput` that says of itself what it predicts."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from modeling.weights import Weights

SIZES = ("hidden_size", "grid_size", "patch_size")
"""What a head is told of the model it is in; everything else it takes is an option."""


class PerceptionHead(nn.Module):
    """A row of HEADS. Built with the widths of the trunk's states and of the grid, the patch size, and its own options.

    Attributes:
        predicts: what it may be called in `heads` of bagel_config.json, and what regions and losses know it by.
        exact: computes in float32 whatever the run's --param_dtype; it then casts what it is given itself.
        gives: fields of `HeadOutput` that it fills beyond boxes and masks; losses on them are for such heads only.
    """

    predicts: ClassVar[str]
    exact: ClassVar[bool] = False
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

    @classmethod
    def most_objects(cls, options: Mapping[str, Any]) -> int | None:
        """How many boxes it can give for one region with these options; None: that is not bounded by them."""
        return None

    @classmethod
    def require_tower(cls, options: Mapping[str, Any], tower: object) -> None:
        """Stop if, with these options, it cannot look at the grid of such a tower (its config).

        Raises:
            ValueError: saying what does not go together.
        """

    @classmethod
    def options_from(cls, path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
        """Its options with what a directory of trained parts (`--mask_path`) says that they leave open.

        Raises:
            ValueError: if it cannot start from a directory, or from this one.
        """
        raise ValueError(
            f"--mask_path {path}: the mask head is {cls.__name__}, which starts from no directory"
        )

    @classmethod
    def weights_from(cls, path: Path, options: Mapping[str, Any]) -> tuple[Weights, tuple[str, ...]]:
        """The tensors of such a directory under its own parameters' names, and with what the names begin that it does not hold.

        Raises:
            ValueError: as `options_from`, or naming the file that is missing or damaged.
        """
        raise ValueError(
            f"--mask_path {path}: the mask head is {cls.__name__}, which starts from no directory"
        )
