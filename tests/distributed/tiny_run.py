"""Steps of the real model, small, as a run takes them: the real objective and `training_step` over packs that are given.

Gradients are taken where the optimizer takes them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data.packing import pack
from data.types import LaneCursor, PackedBatch, Sample
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig
from modeling.bagel.shard_plan import shard_plan
from tests.distributed.gather import full_tensors
from tests.unit.modeling.tiny import (
    SPEC,
    SPECIAL,
    drawing_sample,
    editing_sample,
    made_up_latents,
    perception_sample,
    text_sample,
    tiny_config,
    tiny_model,
)
from train.args import Args
from train.config import build_args
from train.distributed.collectives import rank, world_size
from train.distributed.mesh import build_mesh
from train.distributed.session import World
from train.distributed.sharding import materialise, shard_model
from train.ema import Ema
from train.loop import Run, training_step
from train.loss_scale import LossScale
from train.objective import Objective
from train.optim import build_optimizer
from train.param_manager import freeze, optimizer_groups
from train.report import StepReport
from train.state import TrainState

SAMPLES = {"see": perception_sample, "draw": drawing_sample, "edit": editing_sample, "say": text_sample}
EVERYTHING = tuple(SAMPLES)
Packs = tuple[tuple[str, ...], ...]

NO_GRADIENT_IN_EXACT_ARITHMETIC = ("vit_model", "self_attn.k_proj.bias"), ("heads.box", "key.bias")
"""A bias on every key, without rotary positions, cancels in the softmax: what is left is rounding, which AdamW blows up."""

FIXED = {
    "param_dtype": "fp32",
    "reduce_dtype": "fp32",
    "lr": 1e-3,
    "warmup_steps": 0,
    "eps": 1e-6,  # far above the rounding of gradients: an update must not hang on the sign of a rounding error
    "max_grad_norm": 0.0,
    "box_l1_weight": 2.0,
    "box_giou_weight": 0.5,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Gradients of the first step and weights after the last (on rank 0), one report per step."""

    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    reports: list[StepReport]


def worst(found: dict[str, Tensor], expected: dict[str, Tensor], *, relative: bool) -> float:
    """Largest error of any tensor; `relative` to the tensor's largest entry."""
    assert found.keys() == expected.keys()
    errors = []
    for name, x in found.items():
        if any(name.startswith(a) and name.endswith(b) for a, b in NO_GRADIENT_IN_EXACT_ARITHMETIC):
            continue
        scale = expected[name].abs().max().clamp(min=1e-6) if relative else 1.0
        errors.append(float((x - expected[name]).abs().max() / scale))
    return max(errors)


def train_steps(
    packs: Packs,
    flags: dict[str, object],
    *,
    steps: int,
    config: BagelConfig | None = None,
    sharded: bool = True,
) -> Steps:
    """Some steps over the same packs, dealt out in turn: pack `i` of a step goes to rank `i % W`, as in a run.

    Args:
        packs: names of the samples in each pack of a step.
        flags: of the trainer.
        steps: updates.
        config: of the model; None: `tiny_config()`.
        sharded: False: one plain process.
    """
    config = config or tiny_config()
    args = build_args({**FIXED, **flags, "gradient_accumulation_steps": len(packs) // world_size()})
    state = build_state(args, config, sharded=sharded)
    gradients: dict[str, Tensor] = {}

    def keep_gradients(*_: object) -> None:
        trained = [(n, p.grad) for n, p in state.model.named_parameters() if p.requires_grad]
        if state.step == 0:
            gradients.update(full_tensors(trained))  # a parameter without gradient would fail here

    state.optimizer.register_step_pre_hook(keep_gradients)
    run = make_run(args, config)
    of_a_run = [made_pack(names, lane) for _ in range(steps) for lane, names in enumerate(packs)]
    batches = iter(of_a_run[rank() :: world_size()])
    reports = [report for _ in range(steps) if (report := training_step(run, state, batches))]
    assert len(reports) == steps
    assert state.packs_consumed == steps * len(packs)
    weights = full_tensors((n, p.detach()) for n, p in state.model.named_parameters())
    return Steps(gradients=gradients, weights=weights, reports=reports)


def make_run(args: Args, config: BagelConfig) -> Run:
    """As `train/main.py` makes it, with latents made up."""
    return Run(
        args=args,
        world=World(rank=rank(), local_rank=rank(), size=world_size(), device=torch.device("cpu")),
        objective=Objective.build(args.loss.weights(), config.heads),
        encoder=made_up_latents,  # type: ignore[arg-type]
        journal=lambda step, packs: None,
        group_sizes={},
        flops=lambda pack: 0.0,
        peak_tflops=0.0,
    )


def build_state(args: Args, config: BagelConfig | None = None, *, sharded: bool) -> TrainState:
    """As `train/main.py` builds it, with the values of `tiny_model`."""
    config = config or tiny_config()
    values = dict(tiny_model(config).named_parameters())
    with torch.device("meta"):
        model = Bagel(config)
    freeze(model, args.params)
    if sharded:
        shard_model(model, shard_plan(model.config), build_mesh(args.fsdp, world_size(), "cpu"), args.fsdp)
    materialise(model, torch.device("cpu"), lambda name, _: values[name].detach())
    optimizer = build_optimizer(optimizer_groups(model, args.params, args.optim.lr), args.optim)
    ema, loss_scale = Ema(model, args.optim.ema), LossScale.build(args.fsdp)
    return TrainState.create(model, optimizer, ema, num_lanes=16, loss_scale=loss_scale)


def made_pack(names: tuple[str, ...], lane: int) -> PackedBatch:
    return packed([SAMPLES[name]() for name in names], lane)


def packed(samples: list[Sample], lane: int) -> PackedBatch:
    return pack(samples, SPEC, SPECIAL, cursor=LaneCursor(lane=lane))
