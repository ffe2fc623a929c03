"""Published flags that are answered with a line."""

from dataclasses import dataclass
from typing import Literal

from train.args.flag import flag


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedArgs:
    """Published flags of what is not built yet, or of what nothing here depends on: answered with a line (train/published.py)."""

    backward_prefetch: str = flag(
        "BACKWARD_PRE", "When FSDP gathers the next unit in backward; always early here."
    )
    freeze_vae: bool = flag(True, "Keep the autoencoder as it is; always so here.")
    vae_lr: float | None = flag(None, "Learning rate of the autoencoder, which is not trained.", low=0)
    e2e_lr: float | None = flag(None, "Used by no trainer.", low=0)
    ds_config_file: str | None = flag(None, "Configuration file of DeepSpeed, which is not used.")
    local_rank: int = flag(
        -1, "Place on the node as told by DeepSpeed's launcher; torchrun's environment counts."
    )
    pixel_loss_weight: float = flag(
        0.0, "Weight of the loss on decoded pictures; not built, as the ten flags below.", low=0
    )
    pixel_loss_type: Literal["l1", "l2", "mse"] = flag("l1", "Of the pixel loss: the distance.")
    pixel_loss_max_t: float = flag(0.3, "Of the pixel loss: the largest timestep.", low=0, high=1)
    pixel_loss_paired_only: bool = flag(True, "Of the pixel loss: paired pictures only.")
    pixel_loss_chunk_size: int = flag(2, "Of the pixel loss: pictures decoded at a time.", low=1)
    pixel_loss_adaptive_chunk: bool = flag(True, "Of the pixel loss: fewer large pictures at a time.")
    pixel_loss_use_v0: bool = flag(False, "Of the pixel loss: the first version of it.")
    ssim_loss_weight: float = flag(
        0.0, "Weight of the structural similarity of decoded pictures; not built.", low=0
    )
    ssim_loss_max_t: float = flag(0.1, "Of the SSIM loss: the largest timestep.", low=0, high=1)
    ssim_window_size: int = flag(11, "Of the SSIM loss: side of the window.", low=1)
    ssim_grad_scale: float = flag(0.1, "Of the SSIM loss: factor of its gradient.", low=0)
