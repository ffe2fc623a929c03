"""Mask heads with encoders of their own, and a tower that is SAM's: a rank without masks beside one with two sizes of them."""

import pytest
import torch
from torch import Tensor

from data.types import Sample
from modeling.bagel.config import BagelConfig
from tests.distributed.gather import full_tensors
from tests.distributed.launch import run_distributed
from tests.distributed.tiny_run import FIXED, build_state, make_run, packed, worst
from tests.unit.modeling.test_segmenting import asked, blob
from tests.unit.modeling.test_towers import shared
from tests.unit.modeling.tiny import mask_config, text_sample
from train.config import build_args
from train.distributed.collectives import rank, world_size
from train.loop import training_step

FLAGS = {
    "sharding_strategy": "FULL_SHARD",
    "min_unit_params": 1000,
    "recompute": False,
    "freeze_mask_encoder": False,
}


def configs() -> dict[str, BagelConfig]:
    return {**{kind: mask_config(kind) for kind in ("sam", "separate", "autoencoder")}, "tower": shared()}


def gradients(sharded: bool) -> dict[str, dict[str, Tensor]]:
    """Of one step on two packs, per sort of head."""
    packs: list[list[Sample]] = [
        [asked([blob(), blob(seed=5)]), asked([blob(64, 40)], seed=2)],
        [text_sample()],
    ]
    found: dict[str, dict[str, Tensor]] = {}
    for kind, config in configs().items():
        args = build_args(
            {**FIXED, **FLAGS, "mask_code_weight": 1.0, "gradient_accumulation_steps": 2 // world_size()}
        )
        state, run = build_state(args, config, sharded=sharded), make_run(args, config)

        def take(*_: object, kind: str = kind, model: torch.nn.Module = state.model) -> None:
            trained = [(n, p.grad) for n, p in model.named_parameters() if p.requires_grad]
            found[kind] = full_tensors(trained)  # a parameter without gradient would fail here

        state.optimizer.register_step_pre_hook(take)
        batches = [packed(samples, lane) for lane, samples in enumerate(packs)]
        assert training_step(run, state, iter(batches[rank() :: world_size()])) is not None
    return found


@pytest.mark.timeout(300)  # a rank that does not come to a collective is ended by the launcher after 60 s
def test_a_rank_without_masks_changes_no_gradient() -> None:
    on_ranks = run_distributed(gradients, 2, True)
    expected = gradients(False)
    for kind, right in expected.items():
        assert worst(on_ranks[0][kind], right, relative=False) < 1e-5, kind
        assert any(grad.any() for name, grad in right.items() if name.startswith("heads.mask."))
