"""Losses by group and task, and each loss's share of the gradient: what they say, and that looking changes nothing."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from data.packing import pack
from data.types import LaneCursor, Origin, PackedBatch
from modeling.losses import LOSSES
from tests.distributed.gather import full_tensors
from tests.distributed.launch import run_distributed
from tests.distributed.tiny_run import FIXED, SAMPLES, build_state
from tests.unit.modeling.tiny import SPEC, SPECIAL, made_up_latents, tiny_config, tiny_model
from train.config import build_args
from train.curves import GradientShares, LossesBySource, gradient_figures
from train.distributed.collectives import rank, world_size
from train.distributed.session import World
from train.loop import Run, training_step
from train.objective import Objective

PACKS = (("see", "draw"), ("edit", "say", "say"))
STEPS = 2
FLAGS = {**FIXED, "sharding_strategy": "FULL_SHARD", "min_unit_params": 0, "ce_weight": 0.25, "ema": 0.9}


class Listener:
    """In place of the reporter."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def curves(self, step: int, figures: dict[str, float]) -> None:
        self.lines.append({"step": step, **figures})


def made_pack(lane: int) -> PackedBatch:
    samples = [
        replace(SAMPLES[kind](), task=f"to_{kind}", origin=Origin(group=f"lane{lane}", lane=lane, position=i, where="x"))
        for i, kind in enumerate(PACKS[lane])
    ]  # fmt: skip
    return pack(samples, SPEC, SPECIAL, cursor=LaneCursor(lane=lane))


def train_and_look(every: int) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Weights after some steps over both packs, and what the hooks said."""
    args = build_args({**FLAGS, "gradient_accumulation_steps": len(PACKS) // world_size()})
    state = build_state(args, sharded=world_size() > 1)
    objective, listener = Objective.build(args.loss.weights(), tiny_config().heads), Listener()
    hooks = [
        LossesBySource(listener, objective, 1, STEPS),  # type: ignore[arg-type]
        *([GradientShares(state.model, listener, objective, every)] if every else []),  # type: ignore[arg-type]
    ]
    run = Run(
        args=args,
        world=World(rank=rank(), local_rank=rank(), size=world_size(), device=torch.device("cpu")),
        objective=objective,
        encoder=made_up_latents,  # type: ignore[arg-type]
        journal=lambda step, packs: None,
        group_sizes={},
        flops=lambda pack: 0.0,
        peak_tflops=0.0,
        hooks=hooks,
    )
    batches = iter(
        [made_pack(lane) for _ in range(STEPS) for lane in range(len(PACKS))][rank() :: world_size()]
    )
    for _ in range(STEPS):
        for hook in hooks:
            hook.before_step(state)
        report = training_step(run, state, batches)
        for hook in hooks:
            hook.after_step(state, report)
    for hook in hooks:
        hook.close()
    return full_tensors((n, p.detach()) for n, p in state.model.named_parameters()), listener.lines


def with_and_without() -> list[tuple[dict[str, Tensor], list[dict[str, float]]]]:
    return [train_and_look(every) for every in (1, 0)]


@pytest.fixture(scope="module")
def on_two_ranks() -> list[tuple[dict[str, Tensor], list[dict[str, float]]]]:
    return run_distributed(with_and_without, 2)[0]


@pytest.mark.timeout(100)
def test_looking_at_gradients_changes_nothing(on_two_ranks: list) -> None:
    (looked, _), (trained, _) = on_two_ranks
    assert all(torch.equal(looked[name], trained[name]) for name in trained)


def test_two_ranks_see_what_one_process_sees(on_two_ranks: list) -> None:
    alone = train_and_look(1)[1]
    assert len(alone) == 2 * STEPS
    for found, expected in zip(on_two_ranks[0][1], alone, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-4), name


def test_shares_are_those_of_the_gradients_in_the_trunks_last_states() -> None:
    """By hand: one loss at a time, the gradient that arrives where the final norm begins."""
    model, batch = tiny_model(), made_pack(0)
    kept = Objective.build(build_args(FLAGS).loss.weights(), model.config.heads).weights
    weights = {name: weight for name, weight in kept.items() if weight or not LOSSES[name].watched}
    squares = dict.fromkeys(weights, 0.0)
    args = build_args({**FLAGS, "gradient_accumulation_steps": 1})
    for name, weight in weights.items():
        seen: list[Tensor] = []
        trunk = model.language_model.model
        handles = [
            m.register_forward_pre_hook(
                lambda _, args, keep=seen.append: args[0].register_hook(keep) and None
            )
            for m in (trunk.norm, trunk.norm_moe_gen)
        ]
        only = Objective({name: weight})
        flow = made_up_latents(batch)
        only.scalar(only.terms(model(batch, flow.noised), batch, flow), only.counts(batch)).backward()
        squares[name] = sum(float(g.square().sum()) for g in seen)
        for handle in handles:
            handle.remove()
    state, listener = build_state(args, sharded=False), Listener()
    objective = Objective(weights)
    hook = GradientShares(state.model, listener, objective, 1)  # type: ignore[arg-type]
    hook.before_step(state)
    flow = made_up_latents(batch)
    terms = objective.terms(state.model(batch, flow.noised), batch, flow)
    hook.before_backward(state, terms, objective.counts(batch))
    hook.after_step(state, type("Report", (), {"step": 1})())
    (found,) = listener.lines
    for name, square in squares.items():
        assert found[f"grad_trunk/{name}"] == pytest.approx(math.sqrt(square), rel=1e-4)
    assert sum(v for n, v in found.items() if n.startswith("grad_share/")) == pytest.approx(1)
    assert found["grad_share/ce"] > 0 and found["grad_share/mse"] > 0


def test_figures_without_gradient_have_no_shares() -> None:
    assert gradient_figures({"ce": 0.0}) == {"grad_trunk/ce": 0.0}


def test_losses_by_group_and_task_are_means_over_their_samples() -> None:
    model = tiny_model()
    objective = Objective.build(build_args(FLAGS).loss.weights(), tiny_config().heads)
    line = train_and_look(0)[1][0]
    for kinds, name in ((PACKS[0], "group/lane0"), (PACKS[1], "group/lane1"), (("say",), "task/to_say")):
        alone = pack([SAMPLES[kind]() for kind in kinds], SPEC, SPECIAL)
        flow = made_up_latents(alone)
        for term in objective.terms(model(alone, flow.noised), alone, flow):
            count = float(term.things.amount.sum())
            expected = pytest.approx(term.total.item() / count, rel=1e-4) if count else None
            assert line.get(f"{name}/{term.name}") == expected, (name, term.name)
