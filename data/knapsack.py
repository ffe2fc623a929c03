"""Which samples of a few fill a room best: pure numbers, no data.

All sums that subsets of the candidates' tokens can have are kept as the bits of one integer: another candidate is a shift and an
`or`. So the fullest pack is found exactly, in microseconds, where trying subsets would take for ever. Usually many subsets are as
full; one whose attention is near the run's average is found among them, greedily, so that ranks take equally long.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from data.types import Ticket

TOTALS_TRIED = 8
"""Of the sums that are full enough, how many are looked at for the best attention."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Some of the candidates.

    Attributes:
        taken: their places among the candidates, ascending.
        tokens: their sum.
        pairs: their sum.
    """

    taken: tuple[int, ...]
    tokens: int
    pairs: int


def choose_subset(
    samples: Sequence[Ticket],
    *,
    room: int,
    enough: int,
    wanted_pairs: float,
    pairs_per_token: float,
) -> Choice:
    """The subset that fills the room best.

    Args:
        samples: the candidates.
        room: tokens that the subset may have at most.
        enough: of subsets with so many tokens, one with better attention is better than a fuller one.
        wanted_pairs: that the subset would have if it filled the room.
        pairs_per_token: of the run's average: a subset that leaves room should have as many fewer.

    Returns:
        the fullest subset if none has enough tokens; an empty one if nothing fits.
    """
    tokens, pairs = [s.tokens for s in samples], [s.pairs for s in samples]
    if sum(tokens) <= min(room, enough - 1):
        return Choice(tuple(range(len(samples))), sum(tokens), sum(pairs))
    # The longest are decided on first, below: they are the last here.
    order = sorted((i for i in range(len(tokens)) if tokens[i] <= room), key=lambda i: tokens[i])
    mask = (1 << (room + 1)) - 1
    reachable = [1]
    for i in order:
        reachable.append((reachable[-1] | reachable[-1] << tokens[i]) & mask)
    average = _averages(order, tokens, pairs)
    best, best_miss = Choice((), 0, 0), float("inf")
    for n, total in enumerate(_totals(reachable[-1])):
        if n and total < enough:
            break
        wanted = wanted_pairs - pairs_per_token * (room - total)
        choice = _trace(order, tokens, pairs, reachable, average, total, wanted)
        if abs(choice.pairs - wanted) < best_miss:
            best, best_miss = choice, abs(choice.pairs - wanted)
    return best


def _totals(reachable: int) -> list[int]:
    """The largest sums, the largest first."""
    totals: list[int] = []
    while reachable and len(totals) < TOTALS_TRIED:
        totals.append(reachable.bit_length() - 1)
        reachable ^= 1 << totals[-1]
    return totals


def _averages(order: Sequence[int], tokens: Sequence[int], pairs: Sequence[int]) -> list[float]:
    """Pairs per token of the first n candidates, for every n."""
    result, all_tokens, all_pairs = [0.0], 0, 0
    for i in order:
        all_tokens, all_pairs = all_tokens + tokens[i], all_pairs + pairs[i]
        result.append(all_pairs / all_tokens)
    return result


def _trace(
    order: Sequence[int],
    tokens: Sequence[int],
    pairs: Sequence[int],
    reachable: Sequence[int],
    average: Sequence[float],
    total: int,
    wanted_pairs: float,
) -> Choice:
    """A subset with this sum: back from the longest candidate, each is taken if its attention is wanted."""
    taken, left, so_far = [], total, 0
    for n in range(len(order) - 1, -1, -1):
        i = order[n]
        may_take = left >= tokens[i] and bool(reachable[n] >> (left - tokens[i]) & 1)
        may_leave = bool(reachable[n] >> left & 1)
        if may_take and may_leave:
            # What the shorter ones will bring is guessed from their average.
            with_it = so_far + pairs[i] + (left - tokens[i]) * average[n]
            without = so_far + left * average[n]
            may_take = abs(with_it - wanted_pairs) < abs(without - wanted_pairs)
        if may_take:
            taken.append(i)
            left, so_far = left - tokens[i], so_far + pairs[i]
    return Choice(tuple(sorted(taken)), total, so_far)
