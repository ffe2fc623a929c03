"""Checkpoints and where a run starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from train.args.flag import flag


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointArgs:
    """Output, checkpoints, resuming."""

    results_dir: str = flag("results", "Where logs go.")
    checkpoint_dir: str | None = flag(None, "Where checkpoints go; None: `checkpoints` in --results_dir.")
    save_every: int = flag(2000, "Steps between checkpoints; the last step is always saved.", low=1)
    max_checkpoints: int = flag(5, "Newest checkpoints to keep; 0 keeps all.", low=0)
    async_checkpoint: bool = flag(
        True,
        "Write checkpoints while training goes on; takes as much host memory as a rank's share of one. False: training waits.",
    )
    keep_best: str | None = flag(
        None,
        "Keep also the checkpoint that is best by this figure: loss, a term of it (ce, mse, ...), or one that validation logs.",
    )
    keep_best_mode: Literal["min", "max"] = flag(
        "min", "Whether the lowest or the highest figure is the best."
    )
    auto_resume: bool = flag(
        False, "Continue from the newest complete checkpoint in --checkpoint_dir, if there is one."
    )
    resume_from: str | None = flag(
        None, "Continue from this checkpoint (a step's directory, or the newest in a directory of them)."
    )
    resume_model_only: bool = flag(
        False, "Take only the weights from --resume_from: step, optimizer and data start afresh."
    )
    resume_model_optimizer: bool = flag(
        True, "Take the optimizer's moments along when a run is continued; else they start from zero."
    )
    resume_from_ema: str | None = flag(
        None,
        "Start from the averaged weights found here; the same as --resume_from with --resume_model_only and --finetune_from_ema.",
    )
    finetune_from_ema: bool = flag(
        False, "Where only weights are taken (--resume_model_only, --model_path), take the averaged ones."
    )

    @property
    def directory(self) -> Path:
        """Where checkpoints go."""
        return Path(self.checkpoint_dir) if self.checkpoint_dir else Path(self.results_dir) / "checkpoints"
