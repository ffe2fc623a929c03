import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import order


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    assert sorted(order.permute(i, size, key) for i in range(size)) == list(range(size))


def test_permute_spreads_evenly():
    # Where each of 5 records lands over 2000 permutations: 400 expected in each cell, standard deviation 18.
    seen = np.zeros((5, 5), int)
    for key in range(2000):
        for i in range(5):
            seen[i, order.permute(i, 5, order.stable_hash("key", key))] += 1
    assert np.abs(seen - 400).max() < 90


def test_permute_of_a_large_range_needs_no_table():
    places = {order.permute(i, 10**12, 7) for i in range(1000)}
    assert len(places) == 1000
    assert max(places) > 9 * 10**11


def test_permute_refuses_a_wrong_index():
    with pytest.raises(ValueError, match="outside"):
        order.permute(3, 3, 0)


@pytest.mark.parametrize("size", [1, 3, 47, 48, 1000])
def test_all_lanes_together_read_every_record_once_per_epoch(size):
    lanes, epochs = 48, 4
    counts = Counter()
    for lane in range(lanes):
        read = 0
        while (position := order.lane_position(lane, lanes, read)) < size * epochs:
            counts[order.record_index(position, size, 1, "g")] += 1
            read += 1
    assert counts == {i: epochs for i in range(size)}


def test_epochs_groups_and_seeds_have_orders_of_their_own():
    def epoch(number, seed, group):
        return [order.record_index(number * 50 + i, 50, seed, group) for i in range(50)]

    orders = [epoch(0, 1, "a"), epoch(1, 1, "a"), epoch(0, 2, "a"), epoch(0, 1, "b")]
    assert len({tuple(o) for o in orders}) == 4
    assert epoch(0, 1, "a") == epoch(0, 1, "a")


def test_choose_follows_the_weights():
    draws = Counter(
        order.choose([1.0, 1.0, 4.0], order.uniform(3, lane, d)) for lane in range(8) for d in range(1000)
    )
    assert draws[1] == 0  # weight 0
    assert draws[0] / 8000 == pytest.approx(0.25, abs=0.02)


def test_sample_rng_depends_on_each_of_its_keys():
    first = order.sample_rng(1, "a", 2, "sample").random()
    assert first == order.sample_rng(1, "a", 2, "sample").random()
    others = [(2, "a", 2, "sample"), (1, "b", 2, "sample"), (1, "a", 3, "sample"), (1, "a", 2, "finish")]
    assert all(order.sample_rng(*key).random() != first for key in others)


def test_hash_is_the_same_in_every_process():
    code = "from data.order import stable_hash; print(stable_hash('a', 1))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": "7"}
    )
    assert int(out.stdout) == order.stable_hash("a", 1)
    assert order.stable_hash("a", 1) != order.stable_hash("a", "1")


def test_the_share_of_a_lane_is_what_it_reads():
    read = Counter(lane for lane in range(6) for n in range(9) if order.lane_position(lane, 6, n) < 20)
    assert [order.share_of_lane(lane, 6, 20) for lane in range(6)] == [read[lane] for lane in range(6)]
    assert [order.share_of_lane(lane, 6, 3) for lane in range(6)] == [1, 1, 1, 0, 0, 0]


def test_the_turn_of_a_lane_is_the_same_among_some_and_among_all():
    packs = {0: 3, 1: 1, 2: 2, 3: 1, 4: 2}
    turns = []
    for _ in range(20):
        turns.append(order.next_lane(packs))
        packs[turns[-1]] += 1
    assert turns[:8] == [1, 3, 1, 2, 3, 4, 0, 1]
    for some in ({0, 2}, {1, 3, 4}):
        own = {lane: {0: 3, 1: 1, 2: 2, 3: 1, 4: 2}[lane] for lane in some}
        for lane in (t for t in turns if t in some):
            assert order.next_lane(own) == lane
            own[lane] += 1
