"""The life of one rank: process group, device, threads, seed; and how it ends, well or badly.

`session()` opens a rank for the time of a `with`; `run_entry(main)` is the last line of every entry point. Without torchrun
the group has one process, so nothing else needs to know the difference.

Why `run_entry` leaves by `os._exit`: on gloo a worker thread may still hold the last collective's tensor when the interpreter
finalises, and then aborts the process. Not finalising is the only certain cure.
"""

import json
import logging
import multiprocessing
import os
import re
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from multiprocessing import util
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from train.distributed.lookout import Lookout

logger = logging.getLogger(__name__)

PATIENCE_S = 1.0
"""How long a rank that may only be a victim waits before it speaks: torchrun ends it within this time if another failed first."""

STOPPED_CODE = 75
"""Exit code of a run that was asked to end and can be started again (EX_TEMPFAIL of sysexits.h)."""

STOPPED_FILE = "WEFT_STOPPED_FILE"
"""Set by `launch.py`: where a stopped rank leaves a note instead of the code, which torchrun would take for a failure."""

TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


class Stopped(Exception):
    """The run was asked to end, and has saved what it had: the same command goes on with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Who this process is among all of the run; `lookout` watches the others."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    lookout: Lookout = field(default_factory=Lookout)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """As the driver tells it; empty on a CPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""


@contextmanager
def session(timeout_s: float = 600.0, seed: int = 0) -> Iterator[World]:
    """Open the process group and everything that hangs on the rank.

    Args:
        timeout_s: how long a collective waits for the other ranks before it fails.
        seed: of torch's global generator, made different per rank.

    Yields:
        this process's place. A group that is already open is used and left open.
    """
    world = _world()
    _set_threads()
    _set_file_limit()
    _set_logging(world.rank)
    torch.manual_seed(seed * world.size + world.rank)
    owned = not dist.is_initialized()
    if owned:
        store = _open_group(world, timeout_s)
        world = replace(world, lookout=Lookout(store, world.rank, world.size, timeout_s, finish))
    try:
        yield world
    except BaseException as error:
        # Other ranks may be waiting in a collective: no barrier here. The process ends at once and so do they.
        if owned and world.size == 1:
            dist.destroy_process_group()
        if isinstance(error, Exception) and not isinstance(error, Stopped):
            _tell_others(world.lookout, error)
        raise
    world.lookout.close()
    if owned:
        if world.size > 1:
            dist.barrier()
        dist.destroy_process_group()


def _tell_others(lookout: Lookout, error: Exception) -> None:
    """Say that this rank fails, or find out that it is only a victim of another one.

    Raises:
        SystemExit: if another rank has failed, which has said why; nothing need be added.
        ValueError: if a collective gave up: says who is late.
    """
    if any(sign in str(error) for sign in LOST_PEER) and _failed_elsewhere(lookout):
        raise SystemExit(1) from error
    if isinstance(error, RuntimeError) and TIMED_OUT.search(str(error)) and lookout.size > 1:
        message = f"the ranks waited for each other longer than --dist_timeout_s; {lookout.report()}"
        late = ValueError(message)
        lookout.tell_failure(late)
        raise late from error
    lookout.tell_failure(error)


def _failed_elsewhere(lookout: Lookout) -> bool:
    try:
        return bool(lookout.failure())
    except RuntimeError:
        return False


def run_entry(main: Callable[[], object]) -> NoReturn:
    """Run an entry point and end the process: 0 when it returns, `STOPPED_CODE` when it was asked to end, else 1 at once.

    A `ValueError` is the user's business and becomes one line (`WEFT_TRACEBACK=1` shows where it came from); anything else keeps
    its traceback. No rank waits for the others, so torchrun ends them within a bounded time.
    """
    try:
        main()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            sys.stderr.write(stop.code + "\n")
        finish(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
    except Stopped as stop:
        sys.stderr.write(f"stopped: {stop}\n")
        finish(_stopped_code())
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        finish(130)
    except BaseException as error:  # noqa: BLE001 - the last line of the program: report whatever it is and end
        _report(error)
        finish(1)
    finish(0)


def finish(code: int = 0) -> NoReturn:
    """End the process without finalising the interpreter. Writers have to be closed before."""
    for child in multiprocessing.active_children():
        child.kill()  # data workers do not listen to SIGTERM
    # The interpreter would do this at its end: the semaphores of the loader's queues have names, and the fork server a folder,
    # that outlive the process. A queue's thread may hold them for a moment after the loader is gone.
    util._run_finalizers()  # type: ignore[attr-defined]  # there in every version, not in typeshed
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _stopped_code() -> int:
    """The code that tells whoever started this process."""
    if note := os.environ.get(STOPPED_FILE):
        Path(note).touch()
        return 0
    return STOPPED_CODE


def forget_stop() -> None:
    """Remove what an earlier attempt has left for `launch.py`: torchrun stops the ranks, too, when nodes come and go."""
    if note := os.environ.get(STOPPED_FILE):
        Path(note).unlink(missing_ok=True)


def _world() -> World:
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    else:
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"rank {rank} needs GPU {local_rank}, this machine has {torch.cuda.device_count()}; "
                "lower --nproc_per_node (or set CUDA_VISIBLE_DEVICES= to train on the CPU)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    return World(rank=rank, local_rank=local_rank, size=size, device=device)


def _open_group(world: World, timeout_s: float) -> dist.Store:
    # A gloo side beside NCCL carries objects and CPU tensors; "cpu:gloo,cuda:nccl" is refused where there is no CUDA.
    on_gpu = world.device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    timeout = timedelta(seconds=timeout_s)
    store: dist.Store = dist.HashStore()
    if "RANK" in os.environ:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
    dist.init_process_group(
        backend,
        timeout=timeout,
        store=dist.PrefixStore("group", store),
        rank=world.rank,
        world_size=world.size,
        device_id=world.device if on_gpu else None,
    )
    return store


def _set_threads() -> None:
    """`OMP_NUM_THREADS` if given, else this node's cores divided among its ranks: more threads than cores spin each other out."""
    given = os.environ.get("OMP_NUM_THREADS")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # The CPU's matrix kernels are compiled per shape; packs bring more shapes than the 1,024 that are kept by default.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
    # Vanishing gradients become denormal numbers, with which a CPU computes many times slower.
    torch.set_flush_denormal(True)
    torch.set_num_threads(
        int(given) if given else max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    )


def _set_file_limit() -> None:
    """As many open files as the system allows: two groups of gloo take a connection per rank each, the data workers theirs."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (ValueError, OSError) as error:  # a Mac names a limit that it does not grant
        logger.debug("the limit on open files stays: %s", error)


def _set_logging(rank: int) -> None:
    """Rank 0 tells everything, the others only warnings, with their number. A caller's own set-up is kept."""
    prefix = "" if rank == 0 else f"[rank {rank}] "
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=prefix + "%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stdout,
    )


def _report(error: BaseException) -> None:
    rank = int(os.environ.get("RANK", 0))
    if rank or any(sign in str(error) for sign in LOST_PEER):
        time.sleep(PATIENCE_S)
    for_people = isinstance(error, ValueError) and os.environ.get("WEFT_TRACEBACK") != "1"
    if not for_people:
        traceback.print_exception(error)
    line = f"error: {error}" if for_people else f"error: {type(error).__name__}: {error}"
    sys.stderr.write((line if rank == 0 else f"[rank {rank}] {line}") + "\n")
    # torchrun ends its own report with what it finds in this file; without it the person would read a pointer to a web page.
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        reply = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        try:
            Path(file).write_text(json.dumps({"message": reply}), encoding="utf-8")
        except OSError as e:
            logger.warning("could not tell torchrun the cause: %s", e)
