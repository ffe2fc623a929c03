"""Mask by embedding: the state of an anchor -> a code -> the mask autoencoder's decoder (PerceptionGPT, arXiv 2311.06612).

    "heads": {"mask": {"type": "autoencoder", "autoencoder": {"resolution": 64, "code": 128}}}

Everything is in the one state: no picture is looked at. `--mask_path` takes a trained autoencoder, sizes and values.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modeling.heads.head import PerceptionHead
from modeling.heads.masks import MaskOutput, laid_out, stretched
from modeling.mask_autoencoder import (
    WEIGHTS_NAME,
    MaskAutoencoder,
    MaskAutoencoderConfig,
    read_mask_autoencoder_config,
)
from modeling.types import HeadInputs
from modeling.weights import Weights, open_weights


class MaskAutoencoderHead(PerceptionHead):
    """Linear, ReLU, Linear to a code; its mask at the autoencoder's resolution, stretched to the picture.

    Args:
        hidden_size, grid_size, patch_size: of the model.
        autoencoder: keys of `MaskAutoencoderConfig`.
        width: between the two layers.

    Raises:
        ValueError: naming the key of `autoencoder` that cannot be used.
    """

    predicts = "mask"
    gives = ("code",)

    def __init__(
        self,
        *,
        hidden_size: int,
        grid_size: int,
        patch_size: int,
        autoencoder: Mapping[str, Any] | None = None,
        width: int = 512,
    ):
        super().__init__()
        config = MaskAutoencoderConfig.from_json(
            autoencoder or {}, "bagel_config.json: heads.mask.autoencoder"
        )
        self.patch_size = patch_size
        self.to_code = nn.Sequential(nn.Linear(hidden_size, width), nn.ReLU(), nn.Linear(width, config.code))
        self.autoencoder = MaskAutoencoder(config)
        self.autoencoder.keep_encoder()

    def forward(self, inputs: HeadInputs) -> MaskOutput:
        """Predict one mask per anchor at its transformed picture's size; with the true masks at hand, their codes as well."""
        regions, grids = inputs.regions, inputs.grids
        code = self.to_code(inputs.hidden)
        logits = self.autoencoder.decode(code)
        sizes = [tuple(side * self.patch_size for side in grids.hw[i]) for i in regions.image.tolist()]
        found = [(at, stretched(logits[at : at + 1], (hw[0], hw[1]))[0]) for at, hw in enumerate(sizes)]
        flat, hw = laid_out(found, logits.float())
        side = self.autoencoder.config.resolution
        masks = [
            stretched(mask[None].float(), (side, side))
            for mask in _each(regions.mask_values, regions.mask_hw)
        ]
        # Without any, as at inference, codes of nothing.
        truth = torch.cat(masks) if masks else logits.new_zeros(0, side, side)
        return MaskOutput(
            boxes=inputs.hidden.new_zeros(0, 4),
            mask_logits=flat,
            mask_hw=hw,
            code=code,
            true_code=self.autoencoder.encode(truth),
        )

    @classmethod
    def options_from(cls, path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
        own = options.get("autoencoder", {})
        return {**options, "autoencoder": {**read_mask_autoencoder_config(path), **own}}

    @classmethod
    def weights_from(cls, path: Path, options: Mapping[str, Any]) -> tuple[Weights, tuple[str, ...]]:
        store = open_weights(path / WEIGHTS_NAME)
        return store.renamed({f"autoencoder.{key}": key for key in store.shapes}), ("to_code.",)


def _each(values: Tensor, hw: Tensor) -> Iterator[Tensor]:
    """Masks `hh ww`, of those regions that have one."""
    sizes = [(int(h), int(w)) for h, w in hw.tolist() if h * w]
    pieces = values.split([h * w for h, w in sizes]) if sizes else ()
    return (piece.view(size) for piece, size in zip(pieces, sizes, strict=True))
