"""Run a function on several gloo ranks: the one helper of every test with more than one process.

The function is given by name to fresh processes, so it has to stand at the top of a test module; its arguments and result have
to pickle. A forkserver that has torch loaded makes this about a second; a file instead of a port makes it safe beside other runs.
"""

import multiprocessing
import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOAD = ["torch", "torch.distributed.fsdp", "train.checkpoint", "train.loop"]
TIMEOUT_S = 60.0


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `fn(*args)` on every rank of a gloo group.

    Args:
        fn: top-level function.
        world_size: number of processes.
        *args: the same for every rank; a rank learns its number from `train.distributed.collectives.rank()`.

    Returns:
        what each rank returned, in order.

    Raises:
        torch.multiprocessing.ProcessException: with the traceback of the first rank that failed.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _rank, (fn, world_size, folder, args), nprocs=world_size, start_method="forkserver"
        )
        return [pickle.loads((Path(folder) / f"{rank}.pkl").read_bytes()) for rank in range(world_size)]


def _rank(rank: int, fn: Callable[..., Any], world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    from train.distributed.session import finish

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    result = fn(*args)
    (Path(folder) / f"{rank}.pkl").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
    finish(0)
