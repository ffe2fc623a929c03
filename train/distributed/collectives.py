"""Small collective operations. Without a process group they are what they mean for one process.

A rank that fails does not come back: the others notice when its connection closes, at the latest after the session's timeout.
Where one rank does something for all (`on_main`), its failure is raised on every rank, with the same message.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
U = TypeVar("U")
Group = dist.ProcessGroup


def rank() -> int:
    """This process's number; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(x: Tensor) -> Tensor:
    """Sum over ranks, elementwise, as a new tensor without gradient."""
    y = x.detach().clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        dist.all_reduce(y)
    return y


def gather_objects(value: T, group: Group | None = None) -> list[T]:
    """Every rank's value, in order of rank, on every rank; `group`: see `background_group`."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast_object(value: T, group: Group | None = None) -> T:
    """Rank 0's value on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def background_group(timeout_s: float) -> Group | None:
    """All ranks once more, over gloo, for a thread that must not meet the collectives of training; every rank must call."""
    if world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def ask_main(value: T, answer: Callable[[list[T]], Sequence[U]], group: Group | None = None) -> U:
    """Bring every rank's value to rank 0, which makes an answer for each: no other rank sees more than its own.

    Args:
        value: this rank's.
        answer: all values in order of rank -> as many answers; only rank 0 calls it.
        group: see `background_group`.

    Returns:
        this rank's answer.

    Raises:
        ValueError: on every rank, as `on_main`.
    """
    main, count = rank() == 0, world_size()
    values: list[Any] = [value] * count
    if count > 1:
        dist.gather_object(value, values if main else None, dst=0, group=group)
    failure: Exception | None = None
    answers: list[tuple[Any, str | None]] = []
    if main:
        try:
            answers = [(own, None) for own in answer(values)]
        except Exception as error:  # noqa: BLE001 - the other ranks wait for their answers
            failure, answers = error, [(None, _message(error))] * count
    mine = answers[:1]
    if count > 1:
        mine = [(None, None)]
        dist.scatter_object_list(mine, answers if main else None, src=0, group=group)
    own, message = mine[0]
    if message is not None:
        raise ValueError(message) from failure
    return own


def on_main(action: Callable[[], T], group: Group | None = None) -> T:
    """Let rank 0 do something and tell the others.

    Returns:
        its result, on every rank.

    Raises:
        ValueError: on every rank, if it raised anything: the others would wait for it till the session's timeout.
    """
    result: T | None = None
    failure: Exception | None = None
    message: str | None = None
    if rank() == 0:
        try:
            result = action()
        except Exception as error:  # noqa: BLE001 - see above
            failure, message = error, _message(error)
    result, message = broadcast_object((result, message), group)
    if message is not None:
        raise ValueError(message) from failure
    return result  # type: ignore[return-value]


def _message(error: Exception) -> str:
    """What a failure says; with its type where that says nothing to people by itself."""
    plain = isinstance(error, (ValueError, OSError, RuntimeError))
    return str(error) if plain else f"{type(error).__name__}: {error}"
