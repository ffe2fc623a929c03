"""A rank whose data vanishes, or are unusable, ends the run on all ranks, with one message and a checkpoint."""

import functools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from data.loader import build_loader
from data.sources import DataStops, SourceLost, TooManyRejects
from data.types import PackedBatch
from tests.distributed.launch import run_distributed
from tests.distributed.test_checkpoint import advance
from tests.distributed.toy import build, toy_args
from tests.unit.data.toy_groups import group, plan
from train import loop
from train.checkpoint import Checkpoints
from train.clock import Clock
from train.distributed.collectives import rank
from train.state import TrainState

KINDS = (SourceLost, TooManyRejects)
LOST = "rows.jsonl: cannot be read any more"
SAVED = {3: ["0000002", "0000003"], 2: ["0000002"], 0: []}
"""Steps before the data is lost -> what is saved, with a checkpoint every two steps."""


def lost_after(steps: int, folder: str, kind: type[DataStops]) -> tuple[str, int, list[str]]:
    """What a rank says, its step, and what is saved, if rank 1 loses its data in the second micro-batch after some steps."""
    args = toy_args(
        checkpoint_dir=folder, save_every=2, total_steps=9, gradient_accumulation_steps=2, warmup_steps=2
    )
    state = build(args)
    checkpoints = Checkpoints(args.checkpoint.directory, args.checkpoint.max_checkpoints, args.flat())

    def batches() -> Iterator[PackedBatch]:
        packs = build_loader(plan(group("text", [20] * 50)), rank=rank(), world_size=2)
        yield next(packs)
        if rank() == 1:
            raise kind(LOST)
        yield from packs

    real, source = loop.training_step, batches()

    def step(run: loop.Run, state: TrainState, batches: Iterator[PackedBatch]) -> Any:
        if state.step < steps:
            advance(state, 1)
            return SimpleNamespace(step=state.step)
        return real(run, state, batches)

    objective = SimpleNamespace(weights={"ce": 1.0}, counts=lambda batch: torch.ones(1, dtype=torch.float64))
    run = functools.partial(
        SimpleNamespace,
        args=args,
        objective=objective,
        world=SimpleNamespace(device="cpu"),
        clock=Clock(),
        hooks=(),
    )
    quiet = SimpleNamespace(step=lambda _: None, note=lambda _: None)
    try:
        loop.training_step = step  # type: ignore[assignment]  # in a process of its own
        loop.train(cast(Any, run(flops=lambda _: 0.0)), state, source, checkpoints, cast(Any, quiet))
    except DataStops as e:
        return str(e), state.step, sorted(p.name for p in Path(folder).glob("*"))
    finally:
        loop.training_step = real
    raise AssertionError("the run went on")


def all_cases(folder: str) -> list[tuple[str, int, list[str]]]:
    return [lost_after(steps, f"{folder}/{kind.__name__}/{steps}", kind) for kind in KINDS for steps in SAVED]


def test_a_rank_that_loses_its_data_ends_all_with_a_checkpoint(tmp_path: Path) -> None:
    for found in run_distributed(all_cases, 2, str(tmp_path)):
        assert found == [(LOST, steps, saved) for _ in KINDS for steps, saved in SAVED.items()]


def test_a_run_whose_data_had_ended_before_saves_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would put the checkpoint that it comes from at risk for nothing."""
    args = toy_args(checkpoint_dir=str(tmp_path), save_every=2, total_steps=9)
    state = build(args, sharded=False)
    advance(state, 3)
    checkpoints = Checkpoints(tmp_path, 0)
    checkpoints.save(state)
    written = (tmp_path / "0000003").stat().st_ino
    monkeypatch.setattr(loop, "training_step", lambda *_: None)
    said: list[str] = []
    run = SimpleNamespace(args=args, hooks=(), group_sizes={"vqa": 100})
    loop.train(cast(Any, run), state, iter(()), checkpoints, cast(Any, SimpleNamespace(note=said.append)))
    assert said[0] == "the data has ended (when_exhausted): stopping after step 3 of 9"
    assert [path.name for path in tmp_path.iterdir()] == ["0000003"]
    assert (tmp_path / "0000003").stat().st_ino == written
