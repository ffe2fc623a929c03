"""Validation while training: the same figures on any number of ranks, and no trace left in what is trained."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.dataset_base import TaskDataset
from data.mixture import Group
from data.policy import PackBudget
from data.sources import Record
from data.stream import StreamPlan
from data.types import PackedBatch, Sample
from modeling.bagel.continuation import continue_sample
from modeling.bagel.decode import Decoder, DrawOptions
from modeling.types import FlowState
from tests.distributed.gather import full_tensors
from tests.distributed.launch import run_distributed
from tests.distributed.tiny_run import FIXED, SAMPLES, build_state, made_pack
from tests.unit.data.toy_groups import NumberSource
from tests.unit.modeling.tiny import SPEC, SPECIAL, made_up_latents, tiny_config
from train.clock import COMMUNICATION
from train.config import build_args
from train.distributed.collectives import rank, world_size
from train.distributed.session import World
from train.distributed.sharding import time_collectives
from train.hooks import Hook
from train.loop import Run, training_step
from train.objective import Objective
from train.report import Reporter
from train.validation import Validation, own_packs, validation_plan

STEPS = 3
FLAGS = {
    "val_every": 2, "val_steps": 6, "val_samples": 1, "val_samples_every": 1, "val_num_timesteps": 2, "val_max_new_tokens": 2,
}  # fmt: skip


class Made(TaskDataset):
    """Samples that the tests make: the record's number says which of the names."""

    def __init__(self, *names: str):
        super().__init__(tokenizer=None)  # type: ignore[arg-type]
        self.names = names

    def to_sample(self, record: Record, rng: np.random.Generator) -> Sample:
        return SAMPLES[self.names[record.data["n"] % len(self.names)]]()


def val_group(name: str, count: int, *names: str, weight: float = 1.0) -> Group:
    return Group(
        name=name, weight=weight, is_mandatory=False, dataset=Made(*names), source=NumberSource(range(count)),
        epochs=1, when_exhausted="drop",
    )  # fmt: skip


def plan(*groups: Group) -> StreamPlan:
    budget = PackBudget(expected=160, maximum=260, per_sample=200, max_buffer=4)
    training = StreamPlan(groups=(), layout=SPEC, special=SPECIAL, budget=budget, seed=3)
    return validation_plan(training, groups)


GROUPS = (val_group("perception", 33, "see", "say"), val_group("pictures", 5, "draw", "edit", weight=0.5))


class Encoder:
    """Latents made up from each picture's seed; drawn pictures made of the first channels."""

    patch = 2
    vae = SimpleNamespace(decode=lambda z: z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3))

    def __call__(self, batch: PackedBatch) -> FlowState:
        return made_up_latents(batch)


class Words:
    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        return " ".join(map(str, ids))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Figures by step as a listener gets them, packs of this rank, weights after the last step (on rank 0)."""

    figures: dict[int, dict[str, float]]
    packs: int
    weights: dict[str, Tensor]


def train(folder: str, *, sharded: bool = True, validated: bool = True, **flags: Any) -> Trained:
    args = build_args({**FIXED, **FLAGS, **flags, "results_dir": folder, "total_steps": STEPS})
    state = build_state(args, sharded=sharded)
    run = Run(
        args=args,
        world=World(rank=rank(), local_rank=rank(), size=world_size(), device=torch.device("cpu")),
        objective=Objective.build(args.loss.weights(), tiny_config().heads),
        encoder=Encoder(),  # type: ignore[arg-type]
        journal=lambda step, packs: None,
        group_sizes={},
        flops=lambda pack: 0.0,
        peak_tflops=0.0,
    )
    time_collectives(state.model, run.clock.phase, COMMUNICATION)
    figures: dict[int, dict[str, float]] = {}
    packs = 0
    with Reporter(
        Path(folder), first_step=0, total_steps=STEPS, log_every=1, tensorboard=False, is_main=rank() == 0
    ) as reporter:
        hook = Hook()
        if validated:
            hook = validation = Validation(run, plan(*GROUPS), Words(), reporter, [figures.__setitem__])  # type: ignore[arg-type]
            packs = sum(map(len, validation._packs.values()))
        names = (("see", "say"), ("edit", "draw"))
        for _ in range(STEPS):
            own = iter([made_pack(n, lane) for lane, n in enumerate(names)][rank() :: world_size()])
            accumulated = replace(
                run,
                args=replace(args, train=replace(args.train, gradient_accumulation_steps=2 // world_size())),
            )
            report = training_step(accumulated, state, own)
            assert report is not None
            hook.after_step(state, report)
            assert not run.clock.read(), "no time of validation is left for the next step"
    return Trained(
        figures=figures,
        packs=packs,
        weights=full_tensors((n, p.detach()) for n, p in state.model.named_parameters()),
    )


def anchors_in_bf16() -> list[float]:
    """A box of an anchor that a model in pieces wrote, asked for outside its forward pass."""
    args = build_args({**FIXED, "param_dtype": "bf16", "min_unit_params": 10**9})
    state = build_state(args, sharded=True)
    decoder = Decoder(state.model, Encoder(), SPEC, SPECIAL, torch.device("cpu"))  # type: ignore[arg-type]
    always = torch.tensor([SPECIAL.anchors["box"]])
    made = continue_sample(
        decoder,
        SAMPLES["see"](),
        DrawOptions(),
        seed=0,
        max_new_tokens=2,
        choose=lambda logits, alive: always,
    )
    assert [name for name, _ in made.heads] == ["box", "box"]
    return made.heads[0][1].boxes.float().flatten().tolist()


def on_both(folder: str) -> list[Any]:
    return [
        anchors_in_bf16(),
        *on_two(folder),
    ]


def on_two(folder: str) -> list[Trained]:
    return [
        train(f"{folder}/{name}", **flags)
        for name, flags in {
            "validated": {"sharding_strategy": "FULL_SHARD", "min_unit_params": 0},
            "bf16": {"param_dtype": "bf16"},
            "not": {"validated": False, "sharding_strategy": "FULL_SHARD", "min_unit_params": 0},
        }.items()
    ]


@pytest.mark.timeout(100)
def test_two_ranks_validate_as_one_process_and_leave_no_trace(tmp_path: Path) -> None:
    ranks = run_distributed(on_both, 2, str(tmp_path))
    (box, mine, in_bf16, untouched), (same_box, other, _, _) = ranks
    assert box == same_box and len(box) == 4
    alone = train(str(tmp_path / "alone"), sharded=False)

    assert mine.packs != other.packs, "one rank takes part with empty packs"
    assert mine.packs + other.packs == alone.packs > 3
    assert set(mine.figures) == {2, 3}, "each --val_every steps, and after the last"
    for step, figures in alone.figures.items():
        found = {k: v for k, v in mine.figures[step].items() if k != "val/seconds"}
        # Worst measured: 4e-7, after two updates that differ by rounding.
        assert found == pytest.approx({k: figures[k] for k in found}, rel=1e-5, abs=1e-6)
        assert {k: v for k, v in other.figures[step].items() if k != "val/seconds"} == found
    kinds = {"ce", "mse", "box_l1", "box_giou", "mask_bce", "mask_dice", "loss", "text_exact", "psnr"}
    assert kinds <= {name.removeprefix("val/") for name in mine.figures[2]}
    assert {"val/perception/ce", "val/pictures/mse", "val/pictures/psnr"} <= set(mine.figures[2])
    assert "val/perception/mse" not in mine.figures[2], "nothing of the kind was counted there"

    assert mine.weights.keys() == untouched.weights.keys()
    assert all(torch.equal(mine.weights[n], w) for n, w in untouched.weights.items())
    assert in_bf16.figures[2]["val/loss"] == pytest.approx(mine.figures[2]["val/loss"], rel=0.05)

    lines = [json.loads(line) for line in (tmp_path / "validated" / "val_log.jsonl").read_text().splitlines()]
    assert [line.pop("step") for line in lines] == [2, 3] and lines[0] == mine.figures[2]
    sheets = sorted(p.name for p in (tmp_path / "validated" / "samples" / "0000002").iterdir())
    assert sheets == ["answers.json", "perception.png", "pictures.png"]


@pytest.mark.parametrize(("every", "drawn"), [(2, [2, 3]), (3, [3]), (0, [])])
def test_samples_of_every_so_many_validations_and_of_the_last(
    tmp_path: Path, every: int, drawn: list[int]
) -> None:
    run = train(str(tmp_path), sharded=False, val_every=1, val_samples_every=every)
    assert sorted(run.figures) == [1, 2, 3]
    assert [step for step, figures in sorted(run.figures.items()) if "val/psnr" in figures] == drawn


def test_the_average_is_what_is_validated(tmp_path: Path) -> None:
    average = train(str(tmp_path / "a"), sharded=False, ema=1.0).figures[3]
    weights = train(str(tmp_path / "b"), sharded=False, ema=1.0, val_weights="model").figures[3]
    never = train(str(tmp_path / "c"), sharded=False, ema=1.0, lr=0.0, val_weights="model").figures[3]
    assert average["val/ce"] == never["val/ce"] != weights["val/ce"], (
        "with a decay of 1 the average never moves"
    )


@pytest.mark.parametrize("total", [1, 6, 40])
def test_packs_are_the_same_for_any_number_of_ranks(total: int) -> None:
    of_one = own_packs(plan(*GROUPS), total, 0, 1)
    for size in (2, 3, 7):
        together = [own_packs(plan(*GROUPS), total, r, size) for r in range(size)]
        for group, packs in of_one.items():
            dealt = [pack.hash for own in together for pack in own[group]]
            assert sorted(dealt) == sorted(pack.hash for pack in packs) and len(set(dealt)) == len(dealt)
    read = [(o.group, o.where) for packs in of_one.values() for pack in packs for o in pack.origins]
    assert len(set(read)) == len(read), "each record once"
    if total == 40:
        assert len(read) == 33 + 5, "and all of them, if there is room"
