"""Says which rank is late, and where, while the others wait for it; and tells them when one has failed.

Every rank's thread puts into the group's store, every second, what the rank is at: step, phase, since when. It reads what the
others have put there only when its own rank has not moved for long, or a collective has given up. No collective is used.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

import torch.distributed as dist

logger = logging.getLogger(__name__)

EVERY_S = 1.0
SILENT_S = 15.0
"""A rank that has put nothing into the store for so long is called silent: its process is stopped or gone."""
FIRST_WORD_S = 60.0
"""How long a rank stands still before late ones are looked for, if the collectives do not give up sooner."""
GRACE_S = 10.0
"""How long a rank may go on after another one has failed; NCCL would let it wait to the end of the time-out."""

START, WAITING_FOR_DATA = "start-up", "data"


@dataclass(frozen=True, slots=True)
class Place:
    """What a rank is at.

    Attributes:
        step: the one that is being done; 0 before the first.
        phase: `train/clock.py` names them; empty between phases.
        for_s: how long it has been there.
        silent_s: how long ago it said so.
    """

    rank: int
    step: int
    phase: str
    for_s: float
    silent_s: float

    def __str__(self) -> str:
        where = f"step {self.step}, {self.phase or 'between phases'}, for {self.for_s:.0f} s"
        return (
            where if self.silent_s < SILENT_S else f"silent for {self.silent_s:.0f} s; last seen in {where}"
        )


class Lookout:
    """One rank's thread. Without a store there is nobody to look out for, and all methods do nothing.

    Args:
        store: of the process group.
        rank, size: this rank's place.
        timeout_s: after which collectives give up.
        end: how to end the process when another rank has failed and this one hangs.
    """

    def __init__(
        self,
        store: dist.Store | None = None,
        rank: int = 0,
        size: int = 1,
        timeout_s: float = 600.0,
        end: Callable[[int], NoReturn] | None = None,
    ):
        self.rank, self.size = rank, size
        self._patience = min(FIRST_WORD_S, timeout_s / 2)
        self._end = end
        self._at: Callable[[], tuple[int, str]] = lambda: (0, START)
        self._store = None
        self._closed = threading.Event()
        if store is not None and size > 1:
            self._store = store.clone()  # type: ignore[attr-defined]  # a connection of its own: the group's may be waiting for something
            self._thread = threading.Thread(target=self._run, name="lookout", daemon=True)
            self._thread.start()

    def follow(self, at: Callable[[], tuple[int, str]]) -> None:
        """From now on, ask this what the rank is at: step and phase."""
        self._at = at

    def close(self) -> None:
        """Be quiet. The rank may end."""
        self._closed.set()
        if self._store is not None:
            self._thread.join(EVERY_S * 5)

    def tell_failure(self, error: BaseException) -> None:
        """Let the other ranks know that this one is about to end badly."""
        with suppress(RuntimeError):  # the store may be gone already
            if self._store is not None and not self.failure():
                self._store.set("lookout/failure", f"rank {self.rank}: {error}")

    def failure(self) -> str:
        """What the first rank that failed has said; empty if none has.

        Raises:
            RuntimeError: if the store is gone.
        """
        if self._store is not None and self._store.check(["lookout/failure"]):
            return self._store.get("lookout/failure").decode()
        return ""

    def report(self) -> str:
        """Who is where, and who of them is late."""
        try:
            places = self._places()
        except RuntimeError:
            return "where they are cannot be told: the process that holds their store is gone"
        if late := late_ranks(places):
            return "late: " + "; ".join(f"rank {place.rank} ({place})" for place in late)
        return "no rank is behind the others: " + "; ".join(f"rank {p.rank} ({p})" for p in places)

    def _run(self) -> None:
        assert self._store is not None
        last, since, told = (-1, ""), time.time(), False
        while not self._closed.wait(EVERY_S):
            try:
                at, now = self._at(), time.time()
                if at != last:
                    last, since, told = at, now, False
                self._store.set(f"lookout/{self.rank}", json.dumps([*at, since, now]))
                if now - since > self._patience and not told:
                    told = True
                    self._warn()
                failed = self.failure()
            except RuntimeError:  # the store goes with the process that holds it: the run is over
                failed = "the process that holds the ranks' store is gone"
            if not failed:
                continue
            if not self._closed.wait(GRACE_S) and self._end is not None:
                logger.warning("ending, because another rank has failed: %s", failed)
                self._end(1)
            return

    def _warn(self) -> None:
        places = self._places()
        late = late_ranks(places)
        waiting = [place.rank for place in places if place not in late]
        if late and self.rank == min(waiting, default=-1):  # one of those who wait says it for all
            logger.warning(
                "waiting in step %d for %.0f s; %s",
                self._at()[0],
                self._patience,
                "late: " + "; ".join(f"rank {place.rank} ({place})" for place in late),
            )

    def _places(self) -> list[Place]:
        assert self._store is not None
        places, now = [], time.time()
        for rank in range(self.size):
            if self._store.check([f"lookout/{rank}"]):
                step, phase, since, said = json.loads(self._store.get(f"lookout/{rank}"))
                places.append(Place(rank, step, phase, said - since, now - said))
        return places


def late_ranks(places: Sequence[Place]) -> list[Place]:
    """Those that the others wait for: silent, in an earlier step, or still without data. None if that is true of all."""
    newest = max((place.step for place in places), default=0)

    def is_late(place: Place) -> bool:
        return place.silent_s > SILENT_S or place.step < newest or place.phase == WAITING_FOR_DATA

    late = [place for place in places if is_late(place)]
    return late if len(late) < len(places) else []
