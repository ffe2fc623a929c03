"""How long training stands still for a checkpoint, and how long a run needs to go on from one: one JSON line.

    python benchmarks/checkpoint.py [--params 32] [--rounds 7] [--ranks 8]

Weights, their average and AdamW's moments, float32. The published way (Bagel's trainer) beside ours; rounds take turns. Seconds
of CPU time; wall time stands beside it, and no ratio is taken from it: other programs run here.

**Stall**, in one process. Published: `model.safetensors`, `ema.safetensors`, `torch.save` of the optimizer, while training waits.
Ours: `Checkpoints.save` and the wait before the next update (`release`), in the training thread, with a forward and backward
(matrix products) between them; `thread` is what the copying and writing thread takes beside it. `stall_copied_at_once`: with
nothing between them, so that training waits for the copy.

**Resume**, on `--ranks` processes, from nothing to a state that is ready, the sum over ranks. Published: every rank builds the
model and a copy of it for the average, reads all of both, shards them, reads its share of the optimizer. Ours: a rank's shards
get memory, and each is read and checked in its place. `in_place`: one process reads everything into a state that has its memory
already, which leaves the speed of memory; `published_in_place` likewise. Tensors have 16 MiB, those of a 7B model 25 to 2,000.

Both resumes are in processes that have not used memory before, as in life: the first touch of it is about half of ours. Exits
with 1 unless the stall is 10 times shorter and the resume 2.5 times faster; the goal for the latter is 5 (`resume_goal_reached`).
"""

import argparse
import copy
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # for all ranks, which are forked: sharding would load it in each of them
import torch.distributed as dist  # noqa: TID251 - it starts ranks of its own
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh  # noqa: TID251
from torch.distributed.fsdp import fully_shard  # noqa: TID251

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train.checkpoint import Checkpoints, Start
from train.distributed.session import finish
from train.distributed.sharding import local
from train.ema import Ema
from train.state import TrainState

STALL_GOAL, RESUME_GOAL, RESUME_LIMIT = 10.0, 5.0, 2.5
WIDTH = 2048
PARAMS_PER_LAYER = 2 * WIDTH * WIDTH
STEP_S = 0.5
"""CPU seconds of the forward and backward between a save and the next update."""

Times = dict[str, list[tuple[float, float]]]
"""By name: CPU and wall seconds of every round."""


def build(params: float) -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(WIDTH, WIDTH) for _ in range(2 * max(1, round(params * 1e6 / PARAMS_PER_LAYER))))
    )


def make_state(model: nn.Module) -> TrainState:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    return TrainState.create(model, optimizer, Ema(model, 0.999), num_lanes=1)


def take_a_step(state: TrainState) -> None:
    for p in state.model.parameters():
        p.grad = torch.randn_like(p)
    state.optimizer.step()
    state.optimizer.zero_grad()


def published_save(state: TrainState, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(state.model.state_dict()), directory / "model.safetensors")
    save_file(dict(state.ema.averages), directory / "ema.safetensors")
    save_optimizer(state, directory)
    torch.save({"last_epoch": state.step}, directory / "scheduler.pt")


def save_optimizer(state: TrainState, directory: Path, rank: int = 0) -> None:
    """A rank's part, as plain tensors, which is what the published trainer has."""
    stored = state.optimizer.state_dict()
    stored["state"] = {
        i: {key: local(x).clone() for key, x in entry.items()} for i, entry in stored["state"].items()
    }
    torch.save(stored, directory / f"optimizer.{rank}.pt")


def read_published(model: nn.Module, average: nn.Module, directory: Path) -> None:
    model.load_state_dict(load_file(directory / "model.safetensors"), strict=False)
    average.load_state_dict(load_file(directory / "ema.safetensors"), strict=False)


def read_published_optimizer(optimizer: torch.optim.Optimizer, directory: Path, rank: int = 0) -> None:
    stored = torch.load(directory / f"optimizer.{rank}.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(stored)
    torch.load(directory / "scheduler.pt", weights_only=True)


def in_one_process(args: argparse.Namespace, folder: Path) -> Times:
    state = make_state(build(args.params))
    take_a_step(state)
    average = build(args.params)
    published, ours = folder / "published", folder / "ours"
    times: Times = defaultdict(list)
    checkpoints = Checkpoints(ours, 1, asynchronous=True)
    checkpoints.release_later = True
    a = b = torch.randn(512, 512)

    def save_and_step() -> None:
        """The training thread; its own work is taken off again."""
        whole, thread, wall = time.process_time(), time.thread_time(), time.perf_counter()
        checkpoints.save(state)
        worked, worked_wall = time.thread_time(), time.perf_counter()
        while time.thread_time() - worked < STEP_S:
            torch.mm(a, b)
        worked, worked_wall = time.thread_time() - worked, time.perf_counter() - worked_wall
        checkpoints.release()
        thread, wall = time.thread_time() - thread - worked, time.perf_counter() - wall - worked_wall
        times["stall"].append((thread, wall))
        checkpoints.finish()
        times["thread"].append((time.process_time() - whole - thread - worked, 0.0))

    def save_and_wait() -> None:
        checkpoints.save(state)
        checkpoints.release()

    measure(times, "first_stall", save_and_wait)
    checkpoints.finish()
    expected = {name: x.clone() for name, x in state.tensors().items()}
    for _ in range(args.rounds):
        state.step += 1
        measure(times, "published_save", lambda: published_save(state, published))
        save_and_step()
        measure(times, "stall_copied_at_once", save_and_wait)
        checkpoints.finish()

        def read() -> None:
            read_published(state.model, average, published)
            read_published_optimizer(state.optimizer, published)

        measure(times, "published_in_place", read)
        with torch.no_grad():
            for x in state.tensors().values():
                x.zero_()
        start = Start(path=ours / f"{state.step:07d}")
        measure(times, "in_place", lambda start=start: checkpoints.restore(state, start))
        assert all(torch.equal(x, expected[name]) for name, x in state.tensors().items())
    return times


def measure(times: Times, name: str, action: Callable[[], object]) -> None:
    cpu, wall = time.process_time(), time.perf_counter()
    action()
    times[name].append((time.process_time() - cpu, time.perf_counter() - wall))


def on_a_rank(rank: int, args: argparse.Namespace, folder: Path, task: str, number: int) -> None:
    """A fresh process: writes both kinds of checkpoints, or resumes from one."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous.{task}.{number}",
        rank=rank,
        world_size=args.ranks,
        timeout=timedelta(seconds=300),
    )
    mesh = init_device_mesh("cpu", (args.ranks,))
    published, ours = folder / "published", folder / "ours"

    def write() -> TrainState:
        torch.manual_seed(0)
        whole = build(args.params)
        if rank == 0:
            published.mkdir()
            for name in ("model", "ema"):
                save_file(dict(whole.state_dict()), published / f"{name}.safetensors")
            torch.save({"last_epoch": 1}, published / "scheduler.pt")
        fully_shard(whole, mesh=mesh)
        state = make_state(whole)
        take_a_step(state)
        dist.barrier()
        save_optimizer(state, published, rank)
        Checkpoints(ours, 1).save(state)
        return state

    def resume_published() -> list[Any]:
        model = build(args.params)
        average = copy.deepcopy(model)
        read_published(model, average, published)
        for part in (model, average):
            fully_shard(part, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        read_published_optimizer(optimizer, published, rank)
        return [model, average, optimizer]

    def resume() -> TrainState:
        with torch.device("meta"):
            model = build(args.params)
        fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu")
        state = make_state(model)
        checkpoints = Checkpoints(ours, 1)
        checkpoints.restore(state, Start(path=ours / "0000000"))
        return state

    warm_up(mesh, folder / f"warm.{task}.{number}")
    dist.barrier()
    times: Times = defaultdict(list)
    made: list[Any] = []
    action = {"write": write, "published_resume": resume_published, "resume": resume}[task]
    measure(times, task, lambda: made.append(action()))
    if task != "published_resume":  # what is read is what was written
        sums = [float(local(x).double().sum()) for x in made[0].tensors().values()]
        file = folder / f"sums.{rank}.json"
        if task == "write":
            file.write_text(json.dumps(sums))
        assert json.loads(file.read_text()) == sums
    (folder / f"times.{task}.{number}.{rank}.json").write_text(json.dumps(times[task][0]))
    dist.barrier()
    dist.destroy_process_group()
    finish(0)


def warm_up(mesh: DeviceMesh, folder: Path) -> None:
    """What torch loads when it is first asked to shard, and to save, belongs to neither way."""
    with torch.device("meta"):
        small = nn.Linear(16, 16)
    fully_shard(small, mesh=mesh)
    state = make_state(small.to_empty(device="cpu"))
    take_a_step(state)
    checkpoints = Checkpoints(folder, 1)
    checkpoints.restore(state, Start(path=checkpoints.save(state)))


def on_all_ranks(args: argparse.Namespace, folder: Path) -> Times:
    """Sum of the ranks' CPU time, and the slowest rank's wall time. A run resumes in new processes: so does every round here."""
    context = multiprocessing.get_context("fork")  # from this process, which has not computed anything yet
    times: Times = defaultdict(list)

    def run(task: str, number: int) -> None:
        ranks = [
            context.Process(target=on_a_rank, args=(r, args, folder, task, number)) for r in range(args.ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit(f"{task}: a rank failed")
        each = [
            json.loads((folder / f"times.{task}.{number}.{r}.json").read_text()) for r in range(args.ranks)
        ]
        times[task].append((sum(cpu for cpu, _ in each), max(wall for _, wall in each)))

    run("write", 0)
    for number in range(args.rounds):
        run("published_resume", number)
        run("resume", number)
    del times["write"]
    return times


def ratio(times: Times, slow: str, fast: str) -> float:
    return statistics.median(a / b for (a, _), (b, _) in zip(times[slow], times[fast], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Stall and resume beside the published way.")
    parser.add_argument("--params", type=float, default=32.0, help="millions of parameters")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--ranks", type=int, default=8, help="of the resume; the published launch lines have 8"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as all_ranks:
        times = on_all_ranks(args, Path(all_ranks))
        torch.set_num_threads(1)
        torch.manual_seed(0)
        times |= in_one_process(args, Path(one))
    stall, resume = ratio(times, "published_save", "stall"), ratio(times, "published_resume", "resume")
    result = {
        "params_million": args.params,
        "rounds": args.rounds,
        "ranks": args.ranks,
        "stall_ratio": round(stall, 2),
        "stall_copied_at_once_ratio": round(ratio(times, "published_save", "stall_copied_at_once"), 2),
        "resume_ratio": round(resume, 2),
        "in_place_ratio": round(ratio(times, "published_in_place", "in_place"), 2),
        "cpu_ms": {n: round(1e3 * statistics.median(s for s, _ in row), 2) for n, row in times.items()},
        "wall_ms": {n: round(1e3 * statistics.median(s for _, s in row), 2) for n, row in times.items()},
        "resume_goal_reached": resume >= RESUME_GOAL,
        "passed": stall >= STALL_GOAL and resume >= RESUME_LIMIT,
    }
    sys.stdout.write(json.dumps(result) + "\n")
    if not result["passed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
