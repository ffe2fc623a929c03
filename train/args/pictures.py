"""Losses on decoded pictures."""

from dataclasses import dataclass
from typing import Literal

from train.args.flag import flag


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureLossArgs:
    """Losses on target pictures, decoded by the autoencoder from what the velocity says. See docs/engine.md, Losses."""

    pixel_loss_weight: float = flag(
        0.0, "Weight of the error of decoded pictures' pixels, values in [0, 1]; 0: none is decoded.", low=0
    )
    pixel_loss_type: Literal["l1", "l2", "mse"] = flag(
        "l1", "Pixel loss: absolute (`l1`) or squared (`l2`, `mse`) error."
    )
    pixel_loss_max_t: float = flag(
        0.3, "Pixel loss: a picture at timestep t counts 1 - t / this; beyond it, nothing.", low=0, high=1
    )
    pixel_loss_paired_only: bool = flag(
        True, "Pixel and SSIM loss: only targets of samples with an input picture (editing, restoration)."
    )
    pixel_loss_chunk_size: int = flag(2, "Pixel and SSIM loss: pictures decoded at a time.", low=1)
    pixel_loss_adaptive_chunk: bool = flag(
        True, "In place of that: 1 picture at a time from a megapixel on, 2 from a quarter, else 4."
    )
    pixel_loss_use_v0: bool = flag(False, "In place of both: all pictures of a pack and size at once.")
    ssim_loss_weight: float = flag(
        0.0, "Weight of 1 - structural similarity of decoded pictures; 0: none is decoded.", low=0
    )
    ssim_loss_max_t: float = flag(0.1, "SSIM loss: as --pixel_loss_max_t.", low=0, high=1)
    ssim_window_size: int = flag(11, "SSIM loss: side of the Gaussian window, in pixels.", low=1)
    ssim_grad_scale: float = flag(
        0.1, "SSIM loss: factor of its gradient, besides the weight, that is not in its value.", low=0
    )

    def weights(self) -> dict[str, float]:
        """Weight of each loss on pictures that is used: one of weight 0 would cost its decoding."""
        weights = {"pixel": self.pixel_loss_weight, "ssim": self.ssim_loss_weight}
        return {name: weight for name, weight in weights.items() if weight}

    @property
    def chunk(self) -> Literal["adaptive", "all"] | int:
        """Pictures decoded at a time."""
        if self.pixel_loss_use_v0:
            return "all"
        return "adaptive" if self.pixel_loss_adaptive_chunk else self.pixel_loss_chunk_size
