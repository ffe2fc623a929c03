"""Parts and combinations of sources."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from data.order import permute, stable_hash
from data.sources.record import Record, Source


class SelectedSource:
    """Records `start` to `end` of another source, or that many of them in shuffled order.

    Args:
        source: where they come from.
        start: first record.
        end: one past the last; beyond the source's end means its end.
        shuffle_seed: the source is shuffled with this before the cut.
    """

    def __init__(self, source: Source, start: int, end: int, shuffle_seed: int | None = None):
        self._source, self._start = source, start
        self._length = min(end, len(source)) - start
        self._key = None if shuffle_seed is None else stable_hash("select", shuffle_seed)
        if self._length < 1:
            raise ValueError(f"records {start} to {end} were asked for, there are {len(source)}")

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> Record:
        place = self._start + index
        return self._source.read(place if self._key is None else permute(place, len(self._source), self._key))


class ConcatSource:
    """Several sources, one after the other."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = tuple(sources)
        self._ends = list(accumulate(len(s) for s in self._sources))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> Record:
        which = bisect_right(self._ends, index)
        return self._sources[which].read(index - (self._ends[which - 1] if which else 0))
