"""How a step's packs are dealt to ranks and micro-batches changes nothing: the real model, objective and `training_step`.

Every case is compared with the same packs in one plain process, nothing sharded. Gradients are taken where the optimizer takes
them.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from data.packing import pack
from data.types import LaneCursor, PackedBatch
from modeling.bagel.bagel import Bagel
from modeling.bagel.shard_plan import shard_plan
from tests.distributed.gather import full_tensors
from tests.distributed.launch import run_distributed
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
from train.objective import Objective
from train.optim import build_optimizer
from train.param_manager import freeze, optimizer_groups
from train.report import StepReport
from train.state import TrainState

SAMPLES = {"see": perception_sample, "draw": drawing_sample, "edit": editing_sample, "say": text_sample}
EVERYTHING = ("see", "draw", "edit", "say")
Packs = tuple[tuple[str, ...], ...]

TWO: Packs = (("see", "edit", "say"), ("draw", "say", "see"))
EIGHT: Packs = (
    ("see",),
    ("say", "draw"),
    ("edit", "say"),
    ("draw",),
    ("say",),
    ("see", "edit"),
    (),
    EVERYTHING,
)
TEXT_BESIDE_ALL: Packs = (("say", "say"), EVERYTHING)
NOTHING_BESIDE_ALL: Packs = ((), EVERYTHING)
NO_GRADIENT_IN_EXACT_ARITHMETIC = ("vit_model", "self_attn.k_proj.bias"), ("heads.box", "key.bias")
"""A bias on every key, without rotary positions, cancels in the softmax: what is left is rounding, which AdamW blows up."""

PER_UNIT = {"sharding_strategy": "FULL_SHARD", "min_unit_params": 0}
ROOT_ONLY = {"sharding_strategy": "FULL_SHARD", "min_unit_params": 10**9}
NUM_STEPS = 3

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


CASES: dict[str, tuple[Packs, dict[str, object]]] = {
    "sharded per unit": (TWO, PER_UNIT),
    "sharded as a whole": (TWO, {**ROOT_ONLY, "recompute": False}),
    "2 x 4 micro-batches": (EIGHT, PER_UNIT),
    "2 x 4 micro-batches, clipped": (EIGHT, {**PER_UNIT, "max_grad_norm": 0.5}),
    "text beside everything": (TEXT_BESIDE_ALL, PER_UNIT),
    "everything beside text": (TEXT_BESIDE_ALL[::-1], ROOT_ONLY),
    "nothing beside everything": (NOTHING_BESIDE_ALL, PER_UNIT),
    "nothing beside nothing": (((), ()), PER_UNIT),
}


@pytest.fixture(scope="module")
def on_two_ranks() -> dict[str, Steps]:
    """Every case, in one launch: starting processes costs more than training."""
    return run_distributed(all_cases, 2)[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.timeout(100)  # where a rank does not come to a collective, the launcher ends it after 60 s
def test_two_ranks_train_as_one_process(case: str, on_two_ranks: dict[str, Steps]) -> None:
    found, expected = on_two_ranks[case], train_steps(*CASES[case], sharded=False)
    # Worst measured, over all cases and with one and two threads: gradients 9.7e-7 of the tensor's largest entry, weights 1.4e-6
    # absolute (the three updates move them by 3e-3), losses 8.5e-7 and norms 3.6e-7 relative.
    assert worst(found.gradients, expected.gradients, relative=True) < 1e-5
    assert worst(found.weights, expected.weights, relative=False) < 1e-5
    for mine, other in zip(found.reports, expected.reports, strict=True):
        assert (mine.counts, mine.tokens, mine.samples) == (other.counts, other.tokens, other.samples)
        assert mine.losses == pytest.approx(other.losses, rel=1e-5)
        assert mine.total_norm == pytest.approx(other.total_norm, rel=1e-5)


def test_micro_batches_add_up_to_one_pack() -> None:
    """Nothing sharded on either side: eight packs of a step give the gradient of one pack with all their samples."""
    together = (tuple(name for names in EIGHT for name in names),)
    found, expected = (train_steps(packs, {}, sharded=False) for packs in (EIGHT, together))
    assert worst(found.gradients, expected.gradients, relative=True) < 1e-5  # worst measured: 1.6e-6


def test_micro_batches_are_averaged_on_request() -> None:
    """`--loss_divisor micro_batch`: a step's gradient is the mean of those of its packs."""
    found = train_steps(EIGHT, {"loss_divisor": "micro_batch"}, sharded=False).gradients
    each = [train_steps((names,), {}, sharded=False).gradients for names in EIGHT]
    mean = {name: torch.stack([g[name] for g in each]).mean(0) for name in found}
    assert worst(found, mean, relative=True) < 1e-5  # worst measured: 1.5e-7
    assert worst(found, train_steps(EIGHT, {}, sharded=False).gradients, relative=True) > 1e-2


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


def all_cases() -> dict[str, Steps]:
    return {name: train_steps(packs, flags) for name, (packs, flags) in CASES.items()}


def train_steps(packs: Packs, flags: dict[str, object], *, sharded: bool = True) -> Steps:
    """Three steps over the same packs, dealt out in turn: pack `i` of a step goes to rank `i % W`, as in a run."""
    args = build_args({**FIXED, **flags, "gradient_accumulation_steps": len(packs) // world_size()})
    state = build_state(args, sharded=sharded)
    gradients: dict[str, Tensor] = {}

    def keep_gradients(*_: object) -> None:
        trained = [(n, p.grad) for n, p in state.model.named_parameters() if p.requires_grad]
        if state.step == 0:
            gradients.update(full_tensors(trained))  # a parameter without gradient would fail here

    state.optimizer.register_step_pre_hook(keep_gradients)
    run = Run(
        args=args,
        world=World(rank=rank(), local_rank=rank(), size=world_size(), device=torch.device("cpu")),
        objective=Objective.build(args.loss.weights(), tiny_config().heads),
        encoder=made_up_latents,  # type: ignore[arg-type]
        journal=lambda step, packs: None,
        group_sizes={},
        flops=lambda pack: 0.0,
        peak_tflops=0.0,
    )
    of_a_run = [made_pack(names, lane) for _ in range(NUM_STEPS) for lane, names in enumerate(packs)]
    batches = iter(of_a_run[rank() :: world_size()])
    reports = [report for _ in range(NUM_STEPS) if (report := training_step(run, state, batches))]
    assert len(reports) == NUM_STEPS
    assert state.packs_consumed == NUM_STEPS * len(packs)
    weights = full_tensors((n, p.detach()) for n, p in state.model.named_parameters())
    return Steps(gradients=gradients, weights=weights, reports=reports)


def build_state(args: Args, *, sharded: bool) -> TrainState:
    """As `train/main.py` builds it, with the values of `tiny_model`."""
    values = dict(tiny_model().named_parameters())
    with torch.device("meta"):
        model = Bagel(tiny_config())
    freeze(model, args.params)
    if sharded:
        shard_model(model, shard_plan(model.config), build_mesh(args.fsdp, world_size(), "cpu"), args.fsdp)
    materialise(model, torch.device("cpu"), lambda name, _: values[name].detach())
    optimizer = build_optimizer(optimizer_groups(model, args.params, args.optim.lr), args.optim)
    return TrainState.create(model, optimizer, Ema(model, args.optim.ema), num_lanes=8)


def made_pack(names: tuple[str, ...], lane: int) -> PackedBatch:
    return pack([SAMPLES[name]() for name in names], SPEC, SPECIAL, cursor=LaneCursor(lane=lane))
