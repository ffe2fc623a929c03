"""Any mixture of modalities on one rank beside any other on the other: no rank waits for ever, and the gradients are right.

A rank's pack is one conversation over a subset of: supervised text, picture to understand, picture as a condition, picture to
draw, box (that a token asks for, and that a detector finds), mask. A box or a mask is in a picture to understand, so 40 of the
64 subsets exist; the empty one is an empty pack. Of the 1,600 pairs, 80 are trained: every subset on rank 0 beside everything, on
rank 1 beside what it lacks. That covers the rest:
ranks hang where their collectives differ, and a rank issues the same ones in every step, whatever it has, which is checked here.
"""

import itertools
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data.types import Region, Sample, Segment
from tests.distributed.gather import full_tensors
from tests.distributed.launch import run_distributed
from tests.distributed.tiny_run import FIXED, build_state, make_run, packed, worst
from tests.unit.modeling.tiny import picture, text, tiny_config
from train.config import build_args
from train.distributed.collectives import rank, world_size
from train.loop import training_step

MODALITIES = ("text", "und", "cond", "gen", "box", "mask")
Present = frozenset[str]
EVERYTHING = frozenset(MODALITIES)
Collective = tuple[str, int]
"""Operation and number of elements of its first tensor."""


def subsets() -> list[Present]:
    every = itertools.product((False, True), repeat=len(MODALITIES))
    found = [frozenset(itertools.compress(MODALITIES, there)) for there in every]
    return [present for present in found if "und" in present or not present & {"box", "mask"}]


def pairs() -> list[tuple[Present, Present]]:
    """What rank 0 and rank 1 have, step by step."""
    found = []
    for present in subsets():
        lacks = EVERYTHING - present
        rest = lacks if "und" in lacks else lacks - {"box", "mask"}
        found += [(present, EVERYTHING), (rest, present)]
    return found


def conversation(present: Present) -> list[Sample]:
    """One sample with what is present, all in one context; none if nothing is."""
    if not present:
        return []
    segments = []
    if "und" in present:
        segments.append(Segment(kind="und_image", pixels=picture(1)))
    if "cond" in present:
        segments.append(Segment(kind="cond_image", pixels=picture(3, 32, 64), noise_seed=5))
    segments.append(text(10, 11))
    if "gen" in present:
        segments.append(Segment(kind="gen_image", pixels=picture(2), timestep=0.3, noise_seed=1))
    regions = []
    if "box" in present:
        box = torch.tensor([[0.1, 0.2, 0.5, 0.6]])
        regions.append(Region(head="box", segment=len(segments), token=0, image=0, boxes=box))
        name = (torch.tensor([30, 31, 2]),)
        regions.append(Region(head="detr", segment=0, token=0, image=0, boxes=box, phrases=name))
    if "mask" in present:
        mask = (picture(9)[0] > 127).to(torch.uint8)
        regions.append(Region(head="mask", segment=len(segments), token=2, image=0, mask=mask))
    segments.append(text(5, 12, 6, supervised="text" in present))
    return [Sample(segments=tuple(segments), regions=tuple(regions))]


class Collectives(TorchDispatchMode):
    """Notes every collective that is issued."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Collective] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            tensors = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)]
            self.seen.append((str(func), tensors[0].numel() if tensors else 0))
        return func(*args, **(kwargs or {}))


def gradients(flags: dict[str, Any], sharded: bool) -> tuple[list[dict[str, Tensor]], list[list[Collective]]]:
    """Gradients of a step of every pair, with the same weights, and the collectives of those steps on this rank."""
    accumulation = 2 // world_size()
    args = build_args({**FIXED, **flags, "gradient_accumulation_steps": accumulation})
    config = tiny_config()
    state, run = build_state(args, config, sharded=sharded), make_run(args, config)
    taken: list[dict[str, Tensor]] = []

    def take(*_: object) -> None:
        trained = [(n, p) for n, p in state.model.named_parameters() if p.requires_grad]
        taken.append(full_tensors((n, p.grad) for n, p in trained))
        for _, p in trained:
            p.grad = None  # the step changes nothing

    state.optimizer.register_step_pre_hook(take)
    issued = []
    for pair in pairs():
        packs = [packed(conversation(present), lane) for lane, present in enumerate(pair)]
        collectives = Collectives()
        with collectives if sharded else nullcontext():
            assert training_step(run, state, iter(packs[rank() :: world_size()])) is not None
        issued.append(collectives.seen)
    return taken, issued


@pytest.mark.timeout(300)  # a rank that does not come to a collective is ended by the launcher after 60 s
def test_every_mixture_beside_every_other() -> None:
    flags = {"sharding_strategy": "FULL_SHARD", "min_unit_params": 10_000, "recompute": False}
    on_ranks = run_distributed(gradients, 2, flags, True)
    expected, _ = gradients({"recompute": False}, False)
    found = on_ranks[0][0]
    assert len(subsets()) == 40 and len(found) == len(pairs()) == 80
    for pair, mine, right in zip(pairs(), found, expected, strict=True):
        assert worst(mine, right, relative=True) < 1e-5, pair
    for _, issued in on_ranks:
        assert all(step == issued[0] for step in issued[1:])
        assert len(issued[0]) > 10
