"""The fullest subset, against trying every one."""

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from data.knapsack import choose_subset
from data.types import Ticket

SIZES = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 400)), max_size=9)


def tickets(sizes: list[tuple[int, int]]) -> list[Ticket]:
    return [Ticket("g", i, 0, tokens, tokens, 0, pairs) for i, (tokens, pairs) in enumerate(sizes)]


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(sizes=SIZES, room=st.integers(0, 150), enough=st.integers(0, 150), average=st.integers(0, 200))
def test_the_choice_is_as_full_as_any_or_full_enough(sizes, room, enough, average):
    average /= 10  # no strategy of floats: a library of another test may have switched the smallest ones off
    samples = tickets(sizes)
    chosen = choose_subset(
        samples, room=room, enough=enough, wanted_pairs=average * room, pairs_per_token=average
    )
    assert list(chosen.taken) == sorted(set(chosen.taken))
    assert chosen.tokens == sum(samples[i].tokens for i in chosen.taken) <= room
    assert chosen.pairs == sum(samples[i].pairs for i in chosen.taken)
    sums = {sum(s.tokens for s in c) for n in range(len(samples) + 1) for c in combinations(samples, n)}
    fullest = max(s for s in sums if s <= room)
    assert chosen.tokens == fullest or chosen.tokens >= enough


def test_of_equally_full_subsets_one_near_the_wanted_attention_is_taken():
    # One long sample or some of the short ones: the shares are found from the longest down, each guess made once.
    samples = tickets([*[(10, 100)] * 4, (20, 300), (20, 2000), (40, 8000)])
    for wanted, expected in ((8000, 8000), (400, 400), (600, 500), (2300, 2300)):
        chosen = choose_subset(samples, room=40, enough=40, wanted_pairs=wanted, pairs_per_token=0.0)
        assert (chosen.tokens, chosen.pairs) == (40, expected), wanted


def test_hundreds_of_candidates_are_no_matter():
    samples = tickets([(37 + (7 * i) % 1001, 5 * i) for i in range(400)])
    chosen = choose_subset(samples, room=36864, enough=36864, wanted_pairs=0.0, pairs_per_token=0.0)
    assert chosen.tokens == 36864
