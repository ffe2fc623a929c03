"""Validating while training."""

from dataclasses import dataclass
from typing import Literal

from train.args.flag import flag


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationArgs:
    """Validation while training (docs/engine.md)."""

    enable_validation: bool | None = flag(
        None, "Validate while training; None: if the mixture has `val:` groups or a file of them is named."
    )
    val_dataset_config_file: str | None = flag(
        None, "YAML file of the groups to validate on; None: those under `val:` in --dataset_config_file."
    )
    val_every: int = flag(10, "Steps between validations; the last step is always validated.", low=1)
    val_steps: int = flag(
        50, "Packs of one validation over all groups and ranks, shared out by the groups' weights.", low=1
    )
    val_weights: Literal["ema", "model"] = flag(
        "ema", "What is validated: the average, or the weights themselves."
    )
    val_samples: int = flag(
        4, "Samples per group that are answered and drawn into --results_dir/samples and TensorBoard.", low=0
    )
    val_samples_every: int = flag(
        10,
        "Validations from one sheet of samples to the next; the last one always has one. 0: no samples.",
        low=0,
    )
    val_num_timesteps: int = flag(
        25, "Of these samples: times that a picture is drawn at, both ends counted.", low=2
    )
    val_cfg_text_scale: float = flag(3.0, "Of these samples: guidance by text; 1 or less: none.", low=0)
    val_max_new_tokens: int = flag(64, "Of these samples: most tokens of an answer.", low=1)
