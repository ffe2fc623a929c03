"""What a worker process is at, in a few words that the trainer can read even while the worker hangs.

A worker tells; its trainer looks. The words lie in memory that both share and that goes when they are gone. In a process that no
trainer looks at (the trainer itself, tools), telling does nothing.
"""

import ctypes
import os
from multiprocessing.context import BaseContext
from typing import Any

TEXT_BYTES = 2048


class _Shared(ctypes.Structure):
    _fields_ = [("count", ctypes.c_uint64), ("pid", ctypes.c_int64), ("text", ctypes.c_char * TEXT_BYTES)]


class Doing:
    """The place for one worker's words; made by the trainer, it travels to the worker with what that is to do.

    Args:
        context: that starts the worker.
    """

    def __init__(self, context: BaseContext):
        self._shared: Any = context.RawValue(_Shared)

    @property
    def count(self) -> int:
        """How often the worker has told something."""
        return self._shared.count

    @property
    def pid(self) -> int:
        """Of the worker; 0 if it has not begun."""
        return self._shared.pid

    @property
    def text(self) -> str:
        """What it told last."""
        return self._shared.text.decode("utf-8", "replace")

    def begin(self) -> None:
        """In the worker: what this process tells is told here."""
        global _told
        _told = self
        self._shared.pid = os.getpid()

    def tell(self, text: str) -> None:
        # A reader may see the end of one text behind the beginning of another: it is for people, and only when nothing moves.
        self._shared.text = text.encode("utf-8", "replace")[: TEXT_BYTES - 1]
        self._shared.count += 1


_told: Doing | None = None
_record = ""


def at_record(record: str) -> None:
    """This process now makes a sample of this record."""
    global _record
    if _told is not None:
        _record = record
        _told.tell(record)


def at_file(path: str) -> None:
    """For its record, this process now reads this file."""
    if _told is not None:
        _told.tell(f"{_record}, reading {path}" if _record else f"reading {path}")
