"""Published flags that are answered with a line."""

from dataclasses import dataclass

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
