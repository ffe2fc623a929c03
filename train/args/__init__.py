"""Every flag of the trainer: a file per group, a field per flag. `train/config.py` reads them from files and command lines."""

from dataclasses import dataclass, fields
from typing import Any

from train.args.checkpoint import CheckpointArgs
from train.args.data import DataArgs
from train.args.fsdp import FsdpArgs
from train.args.lora import LoraArgs
from train.args.loss import LossArgs
from train.args.model import ModelArgs
from train.args.optim import OptimArgs
from train.args.params import ParamArgs
from train.args.pictures import PictureLossArgs
from train.args.published import PublishedArgs
from train.args.run import TrainArgs
from train.args.validation import ValidationArgs


@dataclass(frozen=True, slots=True, kw_only=True)
class Args:
    """All groups. A function takes the smallest group it needs, never all of them."""

    model: ModelArgs = ModelArgs()
    data: DataArgs = DataArgs()
    params: ParamArgs = ParamArgs()
    lora: LoraArgs = LoraArgs()
    optim: OptimArgs = OptimArgs()
    loss: LossArgs = LossArgs()
    pictures: PictureLossArgs = PictureLossArgs()
    fsdp: FsdpArgs = FsdpArgs()
    checkpoint: CheckpointArgs = CheckpointArgs()
    train: TrainArgs = TrainArgs()
    validation: ValidationArgs = ValidationArgs()
    published: PublishedArgs = PublishedArgs()

    def tokens_per_step(self, world_size: int) -> int:
        """Expected tokens of an optimizer step, over all ranks and micro-batches."""
        return self.data.expected_num_tokens * self.train.gradient_accumulation_steps * world_size

    def flat(self) -> dict[str, Any]:
        """Every flag with its value: what a run file holds."""
        groups = (getattr(self, group.name) for group in fields(self))
        return {f.name: getattr(group, f.name) for group in groups for f in fields(group)}


GROUPS: dict[str, Any] = {
    "model": ModelArgs,
    "data": DataArgs,
    "params": ParamArgs,
    "lora": LoraArgs,
    "optim": OptimArgs,
    "loss": LossArgs,
    "pictures": PictureLossArgs,
    "fsdp": FsdpArgs,
    "checkpoint": CheckpointArgs,
    "train": TrainArgs,
    "validation": ValidationArgs,
    "published": PublishedArgs,
}
