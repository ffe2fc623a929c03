"""Looking at a run: norms of weights and gradients by group, a profile of some steps, a snapshot of the accelerator's memory."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from train.distributed.session import World
from train.distributed.sharding import joint_norms
from train.hooks import Hook
from train.report import Reporter, StepReport
from train.state import TrainState

logger = logging.getLogger(__name__)

ROWS = 25
"""Operations in the table of a profile."""


class Norms(Hook):
    """Each so many steps, `gn/GROUP` and `wn/GROUP`: L2 norms of the gradients before clipping, of the weights before the update.

    Groups are the parameter groups (`train/param_manager.py`). Costs two collectives in the steps it looks at.
    """

    def __init__(self, reporter: Reporter, every: int):
        self._reporter, self._every = reporter, every

    def before_update(self, state: TrainState) -> None:
        step = state.step + 1
        if step % self._every:
            return
        groups: dict[str, list[nn.Parameter]] = {}
        for group in state.optimizer.param_groups:  # with --no_decay_norm_bias two of them have one name
            groups.setdefault(group["name"], []).extend(group["params"])
        with_gradient = {n: [p.grad for p in ps if p.grad is not None] for n, ps in groups.items()}
        found: dict[str, float] = {}
        for tag, tensors in (("gn", with_gradient), ("wn", groups)):
            present = {name: of_group for name, of_group in tensors.items() if of_group}
            if present:
                norms = joint_norms([list(of_group) for of_group in present.values()]).tolist()
                found |= {f"{tag}/{name}": norm for name, norm in zip(present, norms, strict=True)}
        self._reporter.scalars(step, found)


class Profile(Hook):
    """Profiles steps A to B - 1 on every rank: a trace for chrome://tracing or Perfetto, and a table of the dearest operations.

    Args:
        directory: `profile` in --results_dir; `trace.RANK.json` and `operations.RANK.txt` go there, and with `memory`
            `memory.RANK.pickle`, for pytorch.org/memory_viz.
        first, last: A and B.
        world: this rank's place.
        memory: record the accelerator's allocations during these steps.
    """

    def __init__(self, directory: Path, first: int, last: int, world: World, *, memory: bool):
        self._directory, self._first, self._last, self._world = directory, first, last, world
        self._memory = memory and world.device.type == "cuda"
        if memory and not self._memory:
            logger.warning("--memory_snapshot needs a GPU: of host memory there is only the peak (mem_rss)")
        self._profile: Any = None

    def before_step(self, state: TrainState) -> None:
        if state.step + 1 != self._first:
            return
        activities = [ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        if self._memory:
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        self._profile = profile(
            activities=activities, record_shapes=True, profile_memory=True, acc_events=True
        )
        self._profile.start()

    def after_step(self, state: TrainState, report: StepReport) -> None:
        if self._profile is not None and state.step + 1 >= self._last:
            self._write()

    def close(self) -> None:
        if self._profile is not None:  # the run ended before B
            self._write()

    def _write(self) -> None:
        found, self._profile = self._profile, None
        found.stop()
        self._directory.mkdir(parents=True, exist_ok=True)
        rank, device = self._world.rank, self._world.device.type
        found.export_chrome_trace(str(self._directory / f"trace.{rank}.json"))
        table = found.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=ROWS)
        (self._directory / f"operations.{rank}.txt").write_text(table + "\n", encoding="utf-8")
        if self._memory:
            torch.cuda.memory._dump_snapshot(str(self._directory / f"memory.{rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        logger.info("profile of steps %d to %d: %s", self._first, self._last - 1, self._directory)
