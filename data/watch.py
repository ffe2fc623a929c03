"""A worker that hangs ends the run: what a worker sends, as long as it does something (`data/doing.py`)."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import TypeVar

from data.doing import Doing
from data.sources.record import SourceLost

Message = TypeVar("Message")

POLL_S = 5.0
"""How often torch looks whether a worker lives while the trainer waits for it, and how often the trainer looks what it does."""

START_S = 120.0
"""A worker that has not begun (its process starts, its modules are imported) has at least so long."""

TIMED_OUT = "DataLoader timed out"
"""How torch begins the error that it raises when a `DataLoader`'s own timeout has passed; the iterator can be asked again."""


def poll_s(timeout_s: float) -> float:
    """The `timeout` that the `DataLoader` needs for `watched`."""
    return min(POLL_S, timeout_s / 4)


def watched(messages: Iterator[Message], doing: Doing, timeout_s: float, who: str) -> Iterator[Message]:
    """What a worker sends, as long as it does something.

    Args:
        messages: of a `DataLoader` with one worker and a `timeout` of `poll_s(timeout_s)`: a dead worker is noticed at once.
        doing: what the worker tells.
        timeout_s: how long it may tell nothing new while the trainer waits for it.
        who: names the worker in the message.

    Raises:
        SourceLost: if the worker hangs; it is killed. What it reads may be on a disk or in a store that does not answer.
    """
    while True:
        seen, since = doing.count, time.monotonic()
        while True:
            try:
                message = next(messages)
                break
            except StopIteration:
                return
            except RuntimeError as e:
                if not str(e).startswith(TIMED_OUT):
                    raise
            if doing.count != seen:
                seen, since = doing.count, time.monotonic()
            limit_s = timeout_s if doing.pid else max(timeout_s, START_S)
            if time.monotonic() - since >= limit_s:
                raise _hangs(doing, limit_s, who)
        yield message


def _hangs(doing: Doing, timeout_s: float, who: str) -> SourceLost:
    if doing.pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(doing.pid, signal.SIGKILL)  # the end of the trainer would wait for it
    at = f"it was at {doing.text}" if doing.text else "it has not begun to read"
    return SourceLost(
        f"{who} (process {doing.pid}) has done nothing for {timeout_s:g} s; {at}: see whether its storage answers, raise "
        "--worker_timeout_s if one file may take longer, and start the run again with --auto_resume True"
    )
