"""Which record comes next: pure functions of (seed, lane, counters), the same for any number of ranks and
workers.

A group of `N` records has one endless order: the concatenation of one permutation per epoch. A *position* is
a place in it: `position = epoch x N + place`. Lane `l` of `L` reads the positions `l, l + L, l + 2 L, ...`,
so all lanes together read every record once per epoch even where a group has fewer records than there are
lanes. Rank `r` of `W` owns the lanes `r, r + W, r + 2 W, ...` and lets them make packs in turn (`next_lane`):
where `W` divides `L`, the packs of all ranks are those of one rank, in its order.

Permutations are computed element by element (a Feistel network, walked until it lands inside `[0, N)`):
reading one element costs the same few microseconds whether N is three or a billion, and nothing is kept, so
resume is O(1) and lanes in different epochs of a group do not fight over a cache.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence

import numpy as np

_MASK = (1 << 64) - 1
_ROUNDS = 6


def stable_hash(*parts: int | str) -> int:
    """64 bits of the parts; the same in every process and release (Python's own `hash` is salted)."""
    return int.from_bytes(_digest(parts, 8), "little")


def permute(index: int, size: int, key: int) -> int:
    """Where `index` lands in the permutation of `range(size)` that `key` names.

    Raises:
        ValueError: if `index` is outside `range(size)`.
    """
    if not 0 <= index < size:
        raise ValueError(f"index {index} is outside range({size})")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for i in range(_ROUNDS):
            left, right = right, left ^ (_mix(right, key, i) & low)
        index = left << half | right
        # The network permutes a power of four that is below 4 x size, so this loops less than four
        # times on average.
        if index < size:
            return index


def record_index(position: int, size: int, seed: int, group: str) -> int:
    """Record at a position of the group's endless order."""
    epoch, place = divmod(position, size)
    return permute(place, size, stable_hash("order", seed, group, epoch))


def lane_position(lane: int, num_lanes: int, read: int) -> int:
    """Position of the record that a lane takes after it has read `read` of the group."""
    return lane + num_lanes * read


def uniform(seed: int, lane: int, draw: int) -> float:
    """A lane's `draw`-th random number, in [0, 1)."""
    return (stable_hash("choose", seed, lane, draw) >> 11) * 2.0**-53


def choose(cumulative: Sequence[float], number: float) -> int:
    """Which group a random number falls on.

    Args:
        cumulative: running sum of the groups' weights.
        number: in [0, 1).
    """
    return min(bisect_right(cumulative, number * cumulative[-1]), len(cumulative) - 1)


def sample_rng(seed: int, group: str, position: int, purpose: str) -> np.random.Generator:
    """Generator of everything random about one sample; `purpose` keeps augmentation and noise apart."""
    key = int.from_bytes(_digest(("sample", seed, group, position, purpose), 16), "little")
    return np.random.Generator(np.random.Philox(key=key))


def share_of_lane(lane: int, num_lanes: int, total: int) -> int:
    """How many of the positions `0 … total - 1` a lane reads."""
    return max(0, (total - lane + num_lanes - 1) // num_lanes)


def lanes_of(rank: int, world_size: int, num_lanes: int) -> range:
    """The lanes that a rank owns."""
    return range(rank, num_lanes, world_size)


def next_lane(packs: Mapping[int, int]) -> int:
    """Which lane makes a pack next: the one that has made the fewest, of these the first.

    The rule needs no memory. So it goes on after a pause as it would have without, and it says the same about some of the lanes
    as about all of them: lanes that are dealt to ranks and workers make their packs in the order in which they would together.

    Args:
        packs: that each lane has made.
    """
    return min(packs, key=lambda lane: (packs[lane], lane))


def _digest(parts: tuple[int | str, ...], size: int) -> bytes:
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts)
    return hashlib.blake2b(text.encode(), digest_size=size).digest()


def _mix(value: int, key: int, i: int) -> int:
    """Finaliser of splitmix64: 64 well mixed bits."""
    x = (value + key + (i + 1) * 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
