"""What is measured is what is trained: flags do in `train/main_benchmark.py` what they do in `train/main.py`."""

import pytest
import torch

from tests.distributed.launch import run_distributed
from train.config import build_args
from train.distributed.collectives import rank, world_size
from train.distributed.session import World
from train.main_benchmark import TINY, build

FLAGS = {
    "dataset_config_file": "made up", "frozen_dtype": "bf16", "freeze_vit": True, "ema_warmup": True, "lr": 1e-3,
    "auto_scale_lr": True, "lr_reference_batch_size": 1000, "expected_num_tokens": 2000,
    "max_num_tokens": 3000, "gradient_accumulation_steps": 2,
}  # fmt: skip


def world() -> World:
    return World(rank=rank(), local_rank=0, size=world_size(), device=torch.device("cpu"))


def measured() -> tuple[set[torch.dtype], set[torch.dtype], bool, set[float]]:
    _, state = build(build_args(FLAGS), TINY, world())
    kinds = [{p.dtype for p in state.model.parameters() if p.requires_grad is on} for on in (True, False)]
    rates = {group["peak_lr"] for group in state.optimizer.param_groups}
    return kinds[0], kinds[1], state.ema.warmup, rates


def test_the_benchmark_trains_as_the_flags_say() -> None:
    for trained, frozen, warmup, rates in run_distributed(measured, 1):
        assert trained == {torch.float32} and frozen == {torch.bfloat16} and warmup
        # 2 micro-batches of 2,000 tokens on one rank, of rates that were chosen for 1,000.
        assert sorted(rates) == pytest.approx([4e-3])


def test_fused_kernels_are_refused_where_they_do_not_run() -> None:
    with pytest.raises(ValueError, match="--liger needs a GPU"):
        build(build_args({"dataset_config_file": "made up", "liger": True}), TINY, world())
