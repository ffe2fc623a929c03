"""Copies beside the work of a GPU. On a CPU nothing runs beside, and all of this is nothing."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def beside(after: torch.cuda.Event | None) -> Iterator[torch.cuda.Stream | None]:
    """A stream of its own on the GPU, which begins after an event; nothing without one."""
    if after is None:
        yield None
        return
    stream = torch.cuda.Stream(device=after.device)
    stream.wait_event(after)
    with torch.cuda.stream(stream):  # and on its device: a thread begins on the first GPU
        yield stream


def present() -> torch.cuda.Event | None:
    """The moment on the GPU at which everything asked of it so far is done; None without one."""
    if not torch.cuda.is_available():
        return None
    event = torch.cuda.Event()
    event.record()
    return event
