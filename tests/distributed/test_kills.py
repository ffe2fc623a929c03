"""SIGKILL at random moments, half of them during a save, then the same command again, on other ranks and sharded otherwise.

The real loop, model, stream and checkpoints, as small as they get; the ranks are forked, so that a start costs a second. What has
to hold: where the number of ranks stays, the loss curve is that of a run that nobody killed; every record is trained on exactly
once and the accounts add up; only complete steps are taken, and a rank has in memory what is in the files.

`WEFT_KILLS=30` (`make test-kills`) for the full number.
"""

import json
import os
import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.multiprocessing.spawn import ProcessExitedException

from data import ledger
from data.loader import build_loader
from data.sources import Record
from data.types import PackedBatch, Sample, Segment
from tests.distributed.gather import full_tensors
from tests.distributed.launch import run_distributed
from tests.distributed.tiny_run import FIXED, build_state
from tests.unit.data.toy_groups import NumberDataset, group, lengths, plan
from tests.unit.modeling.tiny import SPEC, SPECIAL, made_up_latents, tiny_config
from train.checkpoint import Checkpoints, SaveInBackground, complete_steps
from train.config import build_args
from train.distributed.collectives import gather_objects, rank, world_size
from train.distributed.dcp import StoredTensors
from train.distributed.session import World
from train.hooks import Hook
from train.loop import Run, train
from train.objective import Objective
from train.report import StepReport
from train.state import TrainState

KILLS = int(os.environ.get("WEFT_KILLS", 6))
SAVE_EVERY = 2
STRATEGIES: tuple[dict[str, object], ...] = (
    {"sharding_strategy": "FULL_SHARD"},
    {"sharding_strategy": "SHARD_GRAD_OP"},
    {"sharding_strategy": "NO_SHARD"},
    {"sharding_strategy": "HYBRID_SHARD"},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """When a rank ends all of them: `after_s` from the given step's begin, or from the `file`-th file that the `save`-th save
    touches.
    """

    rank: int
    step: int = 0
    save: int = 0
    file: int = 0
    after_s: float = 0.0


class Words(NumberDataset):
    """A supervised text of `n` tokens of the tiny model's vocabulary."""

    def to_sample(self, record: Record, rng: np.random.Generator) -> Sample:
        ids = torch.from_numpy(rng.integers(7, 60, record.data["n"]))
        return Sample(segments=(Segment(kind="text", ids=ids, supervised=True, droppable=False),))


def stream(records: int) -> Any:
    words = group("words", lengths(records, 12, 26), when_exhausted="stop", epochs=1)
    words = type(words)(
        **{name: getattr(words, name) for name in words.__dataclass_fields__ if name != "dataset"},
        dataset=Words(),
    )
    return plan(words, layout=SPEC, special=SPECIAL, num_lanes=16)


class Killer(Hook):
    """Carries out a `Kill`. Which files a save touches is known from the interpreter's own events, whatever code does it."""

    def __init__(self, kill: Kill, pids: list[int]):
        self.kill, self.pids, self.steps, self.steps_since = kill, pids, 0, 0
        self.files = Counter[str]()
        if kill.save:
            sys.addaudithook(self._hear)

    def before_step(self, state: TrainState) -> None:
        self.steps += 1
        self.steps_since += bool(self.kill.save) and len(self.files) >= self.kill.save
        # A save that touches fewer files than expected is followed by a kill between saves.
        if self.steps == self.kill.step or self.steps_since > SAVE_EVERY:
            self._strike()

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in (
            "open",
            "os.mkdir",
            "os.rename",
            "os.remove",
            "os.rmdir",
            "os.scandir",
            "os.listdir",
        ):
            return
        paths = [Path(os.fspath(path)) for path in args if isinstance(path, str | os.PathLike)]
        drafts = [
            part for path in paths for part in path.parts if part.endswith(".tmp") and part[:-4].isdigit()
        ]
        if drafts:
            self.files[drafts[0]] += 1
            if len(self.files) == self.kill.save and self.files[drafts[0]] == self.kill.file:
                self._strike()

    def _strike(self) -> None:
        if self.kill.after_s:
            threading.Timer(self.kill.after_s, self._end).start()
        else:
            self._end()

    def _end(self) -> None:
        own = os.getpid()
        for pid in [*(pid for pid in self.pids if pid != own), own]:
            os.kill(pid, signal.SIGKILL)


class Notes:
    """What a rank trained on, a line per step; stands in for the reporter, too."""

    def __init__(self, folder: str, attempt: int):
        self.path = Path(folder) / f"notes.{attempt:03d}.{rank()}.jsonl"
        self.loss = 0.0
        self.where: list[str] = []

    def journal(self, step: int, packs: list[PackedBatch]) -> None:
        self.where = [origin.where for pack in packs for origin in pack.origins]

    def step(self, report: StepReport) -> None:
        entry = {"step": report.step, "loss": report.loss, "where": self.where}
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def note(self, line: str) -> None:
        pass

    def scalars(self, step: int, values: dict[str, float]) -> None:
        pass


def attempt(
    folder: str, number: int, records: int, strategy: dict[str, object], kill: Kill | None
) -> str | None:
    """The run, from wherever it stands, to the end of the data or until it is killed. Returns where it started from."""
    if strategy["sharding_strategy"] == "HYBRID_SHARD":
        strategy = {**strategy, "num_replicate": world_size(), "num_shard": 1}
    args = build_args(
        {
            **FIXED,
            **strategy,
            "lr": 1e-2,
            "results_dir": folder,
            "save_every": SAVE_EVERY,
            "max_checkpoints": 2,
            "auto_resume": True,
        }
    )
    state = build_state(args, sharded=True)
    checkpoints = Checkpoints.build(args.checkpoint, args.flat(), 60)
    start = checkpoints.open(args.checkpoint)
    came_from = None
    if start is not None:
        checkpoints.restore(state, start)
        came_from = start.path.name
        stored, held = StoredTensors(start.path / "state"), full_tensors(state.tensors().items())
        assert all(torch.equal(x, stored.read(name)) for name, x in held.items()), "resharded wrongly"
    notes = Notes(folder, number)
    if rank() == 0:
        (Path(folder) / f"start.{number:03d}").write_text(came_from or "")
    hooks: list[Hook] = [SaveInBackground(checkpoints)]
    pids = gather_objects(os.getpid())
    # Every rank has as many hooks as the others: their questions are numbers in one collective.
    hooks.append(Killer(kill, pids) if kill is not None and rank() == kill.rank else Hook())
    run = Run(
        args=args,
        world=World(rank=rank(), local_rank=rank(), size=world_size(), device=torch.device("cpu")),
        objective=Objective.build(args.loss.weights(), tiny_config().heads),
        encoder=made_up_latents,  # type: ignore[arg-type]
        journal=notes.journal,
        group_sizes={"words": records},
        flops=lambda pack: 0.0,
        peak_tflops=0.0,
        hooks=hooks,
    )
    batches = build_loader(
        stream(records),
        rank=rank(),
        world_size=world_size(),
        cursors=[state.cursors[lane] for lane in range(16)],
        packs_consumed=state.packs_consumed,
    )
    train(run, state, batches, checkpoints, cast(Any, notes))
    return came_from


def newest_whole_step(folder: Path) -> str:
    """By another way than the trainer's: every byte of the step is read and checked."""
    whole = [""]
    for path in sorted((folder / "checkpoints").glob("*")):
        if path.name.isdigit() and path in complete_steps(path.parent):
            stored = StoredTensors(path / "state")
            assert all(stored.read(name) is not None for name in stored.shapes)
            whole.append(path.name)
    return whole[-1]


def history(folder: Path) -> list[dict[str, Any]]:
    """What the surviving steps trained on: an attempt's lines count up to where the next one started."""
    starts = sorted(folder.glob("start.*"))
    kept: list[dict[str, Any]] = []
    for path in starts:
        begin = int(path.read_text() or 0)
        kept = [entry for entry in kept if entry["step"] <= begin]
        for notes in sorted(folder.glob(f"notes.{path.suffix[1:]}.*.jsonl")):
            lines = notes.read_text().splitlines()
            kept += [
                {**json.loads(line), "rank": int(notes.name.split(".")[2])}
                for line in lines
                if line.endswith("}")
            ]
    return kept


def losses(folder: Path) -> list[float]:
    entries = [entry for entry in history(folder) if entry["rank"] == 0]
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    return [entry["loss"] for entry in entries]


def kills(
    chance: random.Random, count: int, worlds: tuple[int, ...]
) -> Iterator[tuple[int, dict[str, object], Kill]]:
    for i in range(count):
        world = chance.choice(worlds)
        which = chance.randrange(world)
        if i % 2:
            # A save touches files and directories 18 times on rank 0, once on the others.
            file = chance.randint(1, 18) if which == 0 else 1
            wait_s = chance.choice((0.0, chance.uniform(0, 0.005)))
            kill = Kill(rank=which, save=chance.randint(1, 2), file=file, after_s=wait_s)
        else:
            kill = Kill(rank=which, step=chance.randint(2, 6), after_s=chance.uniform(0, 0.1))
        yield world, chance.choice(STRATEGIES), kill


def kill_again_and_again(folder: Path, records: int, worlds: tuple[int, ...], seed: int) -> int:
    """Returns how many kills left a draft behind."""
    drafts = 0
    chance = random.Random(seed)
    number = -1
    for number, (world, strategy, kill) in enumerate(kills(chance, KILLS // 2, worlds)):
        expected = newest_whole_step(folder)
        with pytest.raises(ProcessExitedException, match="SIGKILL"):
            run_distributed(attempt, world, str(folder), number, records, strategy, kill)
        start = folder / f"start.{number:03d}"
        assert start.read_text() == expected, f"attempt {number} did not start from the newest whole step"
        drafts += bool(list((folder / "checkpoints").glob("*.tmp")))
    expected = newest_whole_step(folder)
    last = run_distributed(attempt, worlds[-1], str(folder), number + 1, records, STRATEGIES[0], None)
    assert (last[0] or "") == expected
    assert not list((folder / "checkpoints").glob("*.tmp"))
    return drafts


def assert_nothing_lost(folder: Path, records: int) -> None:
    trained = Counter(where for entry in history(folder) for where in entry["where"])
    assert trained == Counter({f"toy.jsonl:{i + 1}": 1 for i in range(records)})
    assert ledger.main([str(folder)]) == 0


@pytest.mark.slow
@pytest.mark.timeout(120 + 30 * KILLS)
def test_killed_on_the_same_number_of_ranks(tmp_path: Path) -> None:
    records = 60 + 20 * KILLS
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    run_distributed(attempt, 2, str(whole), 0, records, STRATEGIES[0], None)
    drafts = kill_again_and_again(killed, records, (2,), seed=1)
    assert drafts, "no kill hit a save"
    assert losses(killed) == pytest.approx(losses(whole), rel=1e-6)
    assert_nothing_lost(killed, records)


@pytest.mark.slow
@pytest.mark.timeout(120 + 30 * KILLS)
def test_killed_on_changing_numbers_of_ranks(tmp_path: Path) -> None:
    records = 60 + 20 * KILLS
    drafts = kill_again_and_again(tmp_path, records, (1, 2, 3), seed=2)
    assert drafts, "no kill hit a save"
    assert losses(tmp_path)
    assert_nothing_lost(tmp_path, records)
