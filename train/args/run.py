"""The loop and what it shows."""

from dataclasses import dataclass
from typing import Literal

from train.args.flag import flag


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainArgs:
    """The loop."""

    global_seed: int = flag(4396, "Seed of random starting weights and of torch's generators.", low=0)
    gradient_accumulation_steps: int = flag(1, "Packs per rank and optimizer step.", low=1)
    log_every: int = flag(10, "Steps between progress lines.", low=1)
    enable_tensorboard: bool = flag(True, "Write TensorBoard files to `tensorboard` in --results_dir.")
    enable_wandb: bool = flag(False, "Send what TensorBoard gets to Weights & Biases, too.")
    wandb_project: str = flag("bagel", "Project there.")
    wandb_name: str = flag("run", "Name of the run there.")
    wandb_runid: str = flag("0", "Tells runs of one name apart: the run's id there is NAME-runRUNID.")
    wandb_resume: str = flag("allow", "Whether a run of that id is continued: allow, must, never, auto.")
    wandb_offline: bool = flag(False, "Write the run to disk instead of sending it.")
    peak_device_tflops: float = flag(
        0.0,
        "What one device can do in bf16, in TFLOP/s, for the MFU in log lines; 0: as known for the device's name, else no MFU.",
        low=0,
    )
    norms_every: int = flag(
        100,
        "Steps between norms of weights and gradients by parameter group (`wn/`, `gn/`); 0: never.",
        low=0,
    )
    profile_steps: str | None = flag(
        None, "Profile steps A to B - 1 on every rank, given as A:B; traces go to `profile` in --results_dir."
    )
    memory_snapshot: bool = flag(
        False, "Record the allocations on the GPU during --profile_steps, for pytorch.org/memory_viz."
    )
    on_nonfinite: Literal["stop", "skip"] = flag(
        "stop",
        "A step with a loss or gradient that is not finite: `stop`, or `skip` it, its samples counted as rejected. Either way "
        "the samples are named, and the packs kept in `nonfinite` in --results_dir.",
    )
    dist_timeout_s: float = flag(600.0, "Seconds a rank waits for the others before it gives up.", low=1)
    validate_only: bool = flag(False, "Check flags, mixture, data and model, then stop without training.")

    @property
    def profiled(self) -> tuple[int, int] | None:
        """First step that is profiled, and first one that is not any more.

        Raises:
            ValueError: if `profile_steps` is not two steps, the second after the first.
        """
        if self.profile_steps is None:
            return None
        first, colon, last = self.profile_steps.partition(":")
        if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) < int(last)):
            raise ValueError(
                f"--profile_steps {self.profile_steps}: expected A:B, the first step to profile and the first one not to, such "
                "as 10:13"
            )
        return int(first), int(last)
