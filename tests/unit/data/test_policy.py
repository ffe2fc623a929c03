"""Which samples share a pack: what each policy promises. The published one's choices are a golden case (tests/parity)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import policy
from data.layout import visible_pairs
from data.ledger import Account, accounts, add_amounts, count_trained, format_accounts, format_lost
from data.policy import POLICIES, PackBudget
from data.stream import LaneStream, make_sample
from data.types import Amount, LaneCursor, Reject, Ticket
from tests.unit.data.toy_groups import fingerprint, group, lengths, mixed_groups, plan

SMALL = {"expected": 60, "maximum": 70, "per_sample": 70, "max_buffer": 2, "prefer_buffer_before": 30}


def ticket(name: str, position: int, length: int) -> Ticket:
    """A sample of a toy group: its text and the two tokens around it; attention is causal."""
    pairs = length * (length + 1) // 2
    return Ticket(name, position, 0, tokens=length, planned=length, loss_tokens=length - 1, pairs=pairs)


def compat(**changes) -> PackBudget:
    return PackBudget(**{**SMALL, "policy": "upstream_compat", **changes})


@settings(max_examples=25, deadline=None)
@given(st.integers(20, 95), st.integers(0, 40), st.integers(0, 6), st.integers(0, 100), st.integers(0, 3))
def test_every_sample_is_trained_waiting_rejected_or_counted_as_lost(expected, slack, buffer, prefer, lane):
    maximum = expected + slack
    budget = compat(
        expected=expected,
        maximum=maximum,
        per_sample=maximum,
        max_buffer=buffer,
        prefer_buffer_before=prefer,
    )
    stream = LaneStream(plan(budget=budget, max_reject_fraction=1.0), LaneCursor(lane=lane))
    trained: dict = {}
    for _ in range(12):
        batch = stream.next_pack()
        assert 0 < batch.num_tokens <= maximum
        assert len(batch.cursor.waiting) <= buffer
        add_amounts(trained, count_trained(batch))
        accounts([batch.cursor], trained)  # raises if the law does not hold


def test_a_pack_short_of_the_expected_length_has_lost_a_sample():
    stream = LaneStream(plan(budget=compat(), max_reject_fraction=1.0), LaneCursor(lane=0))
    lost = 0
    short = 0
    for _ in range(60):
        batch = stream.next_pack()
        now = sum(a.samples for a in batch.cursor.lost.values())
        assert now - lost == (batch.num_tokens < SMALL["expected"])
        lost, short = now, short + (batch.num_tokens < SMALL["expected"])
    assert short > 5


def test_a_compatible_lane_goes_on_from_any_cursor_with_the_same_bytes():
    groups = (*mixed_groups(), group("rare", [12] * 30, weight=0.0, mandatory=True))
    settings_ = plan(*groups, budget=compat(), max_reject_fraction=1.0)
    stream = LaneStream(settings_, LaneCursor(lane=1))
    packs = [stream.next_pack() for _ in range(30)]
    assert any(p.cursor.waiting for p in packs) and packs[-1].cursor.lost
    for i in range(0, 29, 4):
        again = LaneStream(settings_, LaneCursor.from_json(packs[i].cursor.to_json())).next_pack()
        assert fingerprint(again) == fingerprint(packs[i + 1])


def test_either_policy_goes_on_from_the_others_cursor():
    cursor, trained = LaneCursor(lane=0), {}
    for name in ("conserving", "upstream_compat", "conserving"):
        budget = compat(policy=name)
        stream = LaneStream(plan(budget=budget, max_reject_fraction=1.0), cursor)
        for _ in range(8):
            batch = stream.next_pack()
            add_amounts(trained, count_trained(batch))
        cursor = batch.cursor
        accounts([cursor], trained)
    assert cursor.lost


def test_the_published_limit_counts_what_was_left_out():
    """A sample whose clean picture is dropped is short enough for one policy and too long for the other."""
    by_policy = {}
    for name in POLICIES:
        # A text of 10, a clean picture of 3, a target of 3 tokens: 16, or 13 without the clean picture.
        settings_ = plan(
            group("image", [10] * 40, image=True),
            budget=compat(policy=name, expected=10, maximum=14, per_sample=14),
        )
        made = [make_sample(settings_, settings_.groups[0], 0, p) for p in range(40)]
        by_policy[name] = sum(isinstance(m, Reject) for m in made)
    assert by_policy["upstream_compat"] == 40
    assert 20 < by_policy["conserving"] < 40


def test_a_mandatory_sample_that_waits_behind_others_is_taken():
    groups = (group("long", [70] * 9), group("rare", [12] * 9, weight=0.0, mandatory=True))
    waiting = (ticket("long", 0, 70), ticket("long", 4, 70), ticket("rare", 0, 12))
    cursor = LaneCursor(lane=0, read={"long": Amount(2), "rare": Amount(1)}, waiting=waiting)
    budget = PackBudget(expected=60, maximum=82, per_sample=82, max_buffer=4)
    batch = LaneStream(plan(*groups, budget=budget), cursor).next_pack()
    assert [(o.group, o.position) for o in batch.origins] == [("rare", 0), ("long", 0)]
    assert [(w.group, w.position) for w in batch.cursor.waiting] == [("long", 4)]


def test_a_mandatory_group_of_samples_at_the_limit_ends_in_an_error():
    groups = (group("edge", [70] * 9, mandatory=True), group("other", [10] * 9))
    with pytest.raises(ValueError, match="group 'edge': 1000 records in a row.*shorter than .* 70"):
        LaneStream(plan(*groups, budget=compat()), LaneCursor(lane=0)).next_pack()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"expected": 0}, "--expected_num_tokens 0"),
        ({"expected": 71}, "--expected_num_tokens 71 must be from 1 to --max_num_tokens 70"),
        ({"per_sample": 0}, "--max_num_tokens_per_sample 0"),
        ({"policy": "conserving", "max_buffer": 0}, "--max_buffer_size 0 must be at least 1"),
        ({"per_sample": 71}, "--max_num_tokens_per_sample 71 is above --max_num_tokens 70"),
        ({"policy": "greedy"}, "--packer 'greedy' is unknown; there are conserving, upstream_compat"),
    ],
    ids=str,
)
def test_impossible_budgets_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        compat(**change)
    compat(max_buffer=0), compat(policy="conserving", per_sample=10**6)  # these are possible


def test_the_ledger_has_a_column_for_what_was_lost_if_anything_was():
    kept = {
        "vqa": Account(
            read=Amount(10), trained=Amount(7), waiting=Amount(2), rejected={"too_long": Amount(1)}
        )
    }
    assert format_accounts(kept) == "read = trained + waiting + rejected: vqa 10 = 7 + 2 + 1"
    assert format_lost(kept) == ""
    both = {**kept, "edit": Account(read=Amount(30), trained=Amount(20), waiting=Amount(3), lost=Amount(7))}
    assert format_accounts(both) == (
        "read = trained + waiting + rejected + lost: vqa 10 = 7 + 2 + 1 + 0 | edit 30 = 20 + 3 + 0 + 7"
    )
    assert format_lost(both).startswith("7 of 40 samples that were read (17.50%) were lost by --packer")
    assert "(edit 7)" in format_lost(both)


def test_a_cursor_that_kept_less_is_refused():
    state = LaneCursor(lane=2, packs=3, read={"vqa": Amount(5, 60, 55)}).to_json()
    assert LaneCursor.from_json(state).read == {"vqa": Amount(5, 60, 55)}
    with pytest.raises(ValueError, match="of an earlier version .* --resume_model_only True"):
        LaneCursor.from_json({**state, "read": {"vqa": 5}})


def look(stream: LaneStream, count: int) -> list[tuple[int, int, set[int]]]:
    """Tokens, pairs and ages (packs waited) of the lane's next packs."""
    found = []
    for _ in range(count):
        waiting = {(w.group, w.position): w for w in stream.waiting}
        number = stream.cursor.packs
        batch = stream.next_pack()
        pairs = visible_pairs(batch.sample_lens, batch.split_lens, batch.split_modes, batch.split_branches)
        since = [
            waiting[o.group, o.position].since for o in batch.origins if (o.group, o.position) in waiting
        ]
        found.append((batch.num_tokens, pairs, {number - s for s in since}))
    return found


@pytest.mark.parametrize("buffer", [3, 8, 50])
def test_packs_are_full_and_no_sample_waits_longer_than_samples_may_wait(buffer):
    budget = PackBudget(expected=900, maximum=1000, per_sample=1000, max_buffer=buffer)
    groups = (group("short", lengths(400, 20, 300)), group("long", lengths(100, 400, 990), weight=0.4))
    packs = look(LaneStream(plan(*groups, budget=budget), LaneCursor(lane=0)), 150)
    assert max(age for _, _, ages in packs for age in ages) <= buffer
    full = sum(tokens for tokens, _, _ in packs) / 150 / 1000
    assert full > {3: 0.9, 8: 0.97, 50: 0.99}[buffer]


def test_both_tokens_and_attention_are_bounded_if_asked():
    groups = (group("short", lengths(400, 20, 60)), group("long", lengths(100, 100, 300)))
    free = PackBudget(expected=900, maximum=1000, per_sample=1000)
    bound = PackBudget(expected=900, maximum=1000, per_sample=1000, max_pairs=40_000)
    without = look(LaneStream(plan(*groups, budget=free), LaneCursor(lane=0)), 60)
    stream = LaneStream(plan(*groups, budget=bound, max_reject_fraction=1.0), LaneCursor(lane=0))
    packs = look(stream, 60)
    assert max(pairs for _, pairs, _ in without) > 60_000
    assert max(pairs for _, pairs, _ in packs) <= 40_000 and max(tokens for tokens, _, _ in packs) <= 1000
    assert max(age for _, _, ages in packs for age in ages) <= 50
    reasons = {reason for amounts in stream.cursor.rejected.values() for reason in amounts}
    assert reasons == {"too_costly"}  # 300 tokens are 45,150 pairs
    refused = make_sample(plan(group("g", [300]), budget=bound), group("g", [300]), 0, 0)
    assert isinstance(refused, Reject) and refused.message.endswith(
        "attention over 45150 pairs, the bound is 40000; raise --max_attention_pairs"
    )


def test_attention_is_spread_evenly():
    """Lanes know nothing of each other: each keeps to the average of what it reads."""
    groups = (group("short", lengths(400, 20, 60)), group("long", lengths(100, 100, 600), weight=0.3))
    costs = {}
    for look_ahead in (0, 16):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(policy, "LOOK_AHEAD", look_ahead)
            patch.setattr(policy, "PAIRS_PER_TOKEN_COST", 100)
            budget = PackBudget(expected=900, maximum=1000, per_sample=1000)
            lanes = [
                LaneStream(plan(*groups, budget=budget, num_lanes=8), LaneCursor(lane=n)) for n in range(8)
            ]
            looks = [[pairs for _, pairs, _ in look(lane, 25)] for lane in lanes]
        steps = [[p[i] for p in looks] for i in range(25)]
        costs[look_ahead] = sum(max(s) for s in steps) / sum(sum(s) / 8 for s in steps)
    assert costs[16] < 1.25 < costs[0]


def test_a_mandatory_sample_never_overfills_a_pack():
    groups = (
        group("often", [*lengths(200, 15, 60), *[95] * 20]),
        group("rare", lengths(50, 10, 30), weight=0.0, mandatory=True),
    )
    stream = LaneStream(plan(*groups), LaneCursor(lane=0))
    packs = [stream.next_pack() for _ in range(80)]
    assert max(b.num_tokens for b in packs) <= 100
    with_it = sum("rare" in {o.group for o in b.origins} for b in packs)
    assert 60 < with_it < 80  # but where a long one has waited for long
    assert max(age for _, _, ages in look(stream, 80) for age in ages) <= 12


@pytest.mark.parametrize("name", POLICIES)
def test_a_group_that_is_dropped_leaves_the_others(name):
    groups = (group("once", lengths(21, 5, 30), when_exhausted="drop", epochs=1), group("ever", [9] * 5))
    stream = LaneStream(plan(*groups, budget=compat(policy=name)), LaneCursor(lane=1))
    packs = [stream.next_pack() for _ in range(40)]
    read = stream.cursor.read
    assert read["once"].samples == 5 and read["ever"].samples > 100  # of 21 records on 4 lanes
    assert {o.group for o in packs[-1].origins} == {"ever"} and not stream.has_ended


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("epochs", [1, 3])
def test_a_group_that_stops_the_run_ends_the_lane_with_nothing_left(name, epochs):
    groups = (
        group("once", lengths(21, 5, 30), when_exhausted="stop", epochs=epochs),
        group("ever", [9] * 5),
        group("rare", [12] * 9, weight=0.0, mandatory=True),
    )
    stream = LaneStream(plan(*groups, budget=compat(policy=name)), LaneCursor(lane=0))
    trained: dict = {}
    while not stream.has_ended:
        batch = stream.next_pack()
        add_amounts(trained, count_trained(batch))
    found = accounts([batch.cursor], trained)
    assert found["once"].read.samples == {1: 6, 3: 16}[epochs]
    assert not batch.cursor.waiting and (
        name == "upstream_compat" or found["once"].trained == found["once"].read
    )
    assert not stream.next_samples()
