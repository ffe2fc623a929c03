"""Where the time of a step goes: data, forward, backward, optimizer, communication.

On a CPU these are seconds of wall time that add up: a phase inside another one is taken out of it, so `forward` and `backward`
are without the collectives that FSDP waits for in them. On a GPU they are seconds between events on the stream that the phase
runs on. There `communication` lies on streams of its own: it overlaps with forward and backward, is not taken out of them, and
the sum may exceed the step.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

DATA, FORWARD, BACKWARD, OPTIMIZER, COMMUNICATION = (
    "data", "forward", "backward", "optimizer", "communication",
)  # fmt: skip
VALIDATION = "validation"
"""Between two steps."""


class Clock:
    """Adds up the time of the phases of one step after another.

    Args:
        device: where the work is done; on a GPU, events are recorded and read when the step is over.
    """

    def __init__(self, device: torch.device | None = None):
        self._on_gpu = device is not None and device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.now = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's time as this phase's; `now` is its name meanwhile, and stays if it does not come to its end."""
        outer, self.now = self.now, name
        with self._counted(name):
            yield
        self.now = outer

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        # The wait for data is the host's, whatever the device.
        if self._on_gpu and name != DATA:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            try:
                yield
            finally:
                end.record()
                self._events.append((name, begin, end))
            return
        begun = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - begun
            self._seconds[name] += spent - self._inner.pop()
            if self._inner:
                self._inner[-1] += spent

    def read(self) -> dict[str, float]:
        """Seconds of every phase since this was last called; on a GPU, waits for it."""
        if self._events:
            torch.cuda.synchronize()
            for name, begin, end in self._events:
                self._seconds[name] += begin.elapsed_time(end) / 1000
            self._events = []
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds
