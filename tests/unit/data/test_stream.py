from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import stream
from data.dataset_base import DropoutSpec, SkipSample, check_sample, finish_sample
from data.interleave_datasets.edit import EditDataset
from data.ledger import accounts, add_amounts, count_trained, format_accounts, require_few_rejects
from data.order import sample_rng
from data.policy import PackBudget
from data.sources import Record
from data.stream import LaneStream, make_sample
from data.text_dataset import TextDataset
from data.transforms import ImageTransform
from data.types import Amount, LaneCursor, Origin, Region, Reject, Sample, Segment, Ticket
from data.vlm_dataset import VlmDataset
from tests.unit.data.toy_groups import fingerprint, group, lengths, mixed_groups, plan

TRANSFORM = ImageTransform(max_image_size=16, min_image_size=16, stride=16)


def take(stream, count):
    return [stream.next_pack() for _ in range(count)]


@settings(max_examples=25, deadline=None)
@given(st.integers(20, 95), st.integers(0, 40), st.integers(1, 12), st.integers(0, 3))
def test_packs_keep_to_the_budget_and_lose_nothing(expected, slack, max_buffer, lane):
    budget = PackBudget(expected=expected, maximum=expected + slack, per_sample=10**6, max_buffer=max_buffer)
    stream = LaneStream(plan(budget=budget, max_reject_fraction=1.0), LaneCursor(lane=lane))
    trained, positions = {}, []
    for batch in take(stream, 12):
        assert 0 < batch.num_tokens <= budget.maximum
        assert batch.num_tokens >= expected or len(batch.cursor.waiting) >= max_buffer
        add_amounts(trained, count_trained(batch))
        positions += [(o.group, o.position) for o in batch.origins]
        positions += [(r.group, r.position) for r in batch.rejects]
        accounts([batch.cursor], trained)  # raises if read != trained + waiting + rejected
    everything = sorted(positions + [(w.group, w.position) for w in batch.cursor.waiting])
    read = sorted((g, lane + 4 * i) for g, n in batch.cursor.read.items() for i in range(n.samples))
    assert everything == read  # each exactly once


def test_samples_that_memory_has_no_room_for_are_made_again(monkeypatch):
    groups = (group("image", lengths(60, 5, 30), image=True), group("long", lengths(60, 40, 95)))
    expected = [fingerprint(b) for b in take(LaneStream(plan(*groups), LaneCursor(lane=0)), 20)]
    monkeypatch.setattr(stream, "KEPT_BYTES", 0)
    again = LaneStream(plan(*groups), LaneCursor(lane=0))
    assert [fingerprint(b) for b in take(again, 20)] == expected


def test_what_waited_and_fits_no_more_is_said_at_the_start():
    ticket = Ticket("long", 0, since=0, tokens=90, planned=90, loss_tokens=89, pairs=4095)
    cursor = LaneCursor(lane=0, packs=2, read={"long": Amount(1, 90, 89)}, waiting=(ticket,))
    small = PackBudget(expected=50, maximum=80, per_sample=80)
    with pytest.raises(
        ValueError, match="fits no pack any more: 90 tokens, the budget is 80; raise --max_num_tokens_per"
    ):
        LaneStream(plan(budget=small), cursor)


def test_what_waited_is_made_again_as_the_options_are_now():
    ticket = Ticket("short", 0, since=0, tokens=12, planned=12, loss_tokens=11, pairs=78)
    cursor = LaneCursor(lane=0, read={"short": Amount(1, 12, 11)}, waiting=(ticket,))
    for tokens in (12, 13, 99):
        groups = (group("short", [tokens]), group("other", [50] * 9))
        lane = LaneStream(plan(*groups), cursor)
        trained = {}
        for batch in take(lane, 6):
            add_amounts(trained, count_trained(batch))
            accounts([batch.cursor], trained)  # raises if tokens do not add up
            assert batch.num_tokens <= 100
        assert trained["short"].tokens % tokens == 0
    with pytest.raises(ValueError, match="can no longer be used: toy.jsonl:1: the number is negative"):
        LaneStream(plan(group("short", [-1], weight=0.0), group("other", [50] * 9)), cursor).next_pack()
    with pytest.raises(ValueError, match="can no longer be used: toy.jsonl:1: 101 tokens, the budget is 100"):
        LaneStream(plan(group("short", [101], weight=0.0), group("other", [50] * 9)), cursor).next_pack()


def test_a_stream_rebuilt_from_any_cursor_goes_on_with_the_same_bytes():
    packs = take(LaneStream(plan(), LaneCursor(lane=1)), 30)
    assert any(p.cursor.waiting for p in packs)
    for i in range(0, 29, 3):
        cursor = LaneCursor.from_json(packs[i].cursor.to_json())
        again = LaneStream(plan(), cursor).next_pack()
        assert fingerprint(again) == fingerprint(packs[i + 1])


def test_no_sample_waits_forever():
    # The long one fills a pack alone, and the mandatory group wants a place in every pack.
    groups = (group("short", [10] * 50, mandatory=True), group("long", [98] * 50))
    packs = take(LaneStream(plan(*groups), LaneCursor(lane=0)), 40)
    ages = [b.cursor.read["long"].samples for b in packs]
    trained = Counter(o.group for p in packs for o in p.origins)
    assert trained["long"] >= ages[-1] - 8


def test_mandatory_groups_are_in_each_pack_where_they_fit():
    groups = (group("rare", [12] * 30, weight=0.0, mandatory=True), group("often", lengths(100, 5, 30)))
    for batch in take(LaneStream(plan(*groups), LaneCursor(lane=2)), 15):
        assert Counter(o.group for o in batch.origins)["rare"] == 1
        assert batch.num_tokens <= 100


def test_a_group_smaller_than_the_number_of_lanes_is_read_evenly():
    trained = Counter()
    for lane in range(48):
        stream = LaneStream(plan(group("tiny", [20, 20, 20]), num_lanes=48), LaneCursor(lane=lane))
        trained.update(o.where for o in stream.next_pack().origins[:3])
    assert trained == {"toy.jsonl:1": 48, "toy.jsonl:2": 48, "toy.jsonl:3": 48}


def test_finished_samples_are_a_function_of_the_position():
    settings_ = plan(group("image", [10] * 200, image=True))
    samples = [make_sample(settings_, settings_.groups[0], 0, p) for p in range(200)]
    dropped = [s.segments[1].dropped for s in samples]
    assert 0.2 < sum(dropped) / 200 < 0.4
    times = torch.tensor([s.segments[2].timestep for s in samples])
    assert 0 < times.min() and times.max() <= 1
    # median of sigmoid(N(0, 1)) is 0.5; the shift 3 moves it to 0.75
    assert float(times.median()) == pytest.approx(0.75, abs=0.05)
    assert (
        len({s.segments[2].noise_seed for s in samples} | {s.segments[1].noise_seed for s in samples}) == 400
    )
    undropped = make_sample(replace(settings_, dropout=DropoutSpec()), settings_.groups[0], 0, 7)
    assert undropped.segments[2].noise_seed == samples[7].segments[2].noise_seed


def test_rejects_name_file_and_line_and_are_counted():
    bad = lengths(3000, 5, 30)
    bad[7] = -1
    settings_ = plan(group("text", bad), num_lanes=1)
    stream = LaneStream(settings_, LaneCursor(lane=0))
    rejects, trained = [], {}
    while not rejects:
        batch = stream.next_pack()
        rejects += batch.rejects
        add_amounts(trained, count_trained(batch))
    (reject,) = rejects
    assert (reject.reason, reject.message) == ("bad_number", "toy.jsonl:8: the number is negative")
    assert batch.cursor.rejected == {"text": {"bad_number": Amount(samples=1)}}
    result = accounts([batch.cursor], trained)
    assert f"text {result['text'].read.samples} = {result['text'].trained.samples} + " in format_accounts(
        result
    )
    require_few_rejects(result, {"text": 3000}, 0.001)
    with pytest.raises(ValueError, match="group 'text': 1 of .* the limit is 0"):
        require_few_rejects(result, {"text": 3000}, 0.0001)
    with pytest.raises(ValueError, match="do not belong together"):
        accounts([batch.cursor], {**trained, "text": trained["text"] + Amount(-1)})


@pytest.mark.parametrize("fault, reason", [("skip", "negative"), ("shape", "KeyError: 'value'")])
def test_a_group_whose_every_record_is_bad_stops_the_run(fault, reason):
    with pytest.raises(
        ValueError, match=f"group 'bad': 1 record .*toy.jsonl.*{reason}.*--max_reject_fraction"
    ):
        LaneStream(plan(group("bad", [-1] * 3, fault=fault)), LaneCursor(lane=0)).next_pack()


def test_nothing_loops_forever_even_if_every_reject_is_allowed():
    with pytest.raises(ValueError, match="1000 records could not be used"):
        LaneStream(plan(group("bad", [-1] * 3), max_reject_fraction=1.0), LaneCursor(lane=0)).next_pack()


def test_an_error_in_a_dataset_class_is_not_taken_for_a_bad_record():
    with pytest.raises(ZeroDivisionError):
        LaneStream(plan(group("bad", [-1], fault="bug")), LaneCursor(lane=0)).next_pack()


def test_too_long_samples_are_rejected():
    made = make_sample(plan(), group("long", [101]), 0, 0)
    assert isinstance(made, Reject)
    assert made.reason == "too_long"
    assert made.message.startswith("toy.jsonl:1: 101 tokens")


class OneRow:
    """A row whose pictures cannot be read."""

    def __init__(self, row: dict):
        self.row = row

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> Record:
        def fetch(name: str) -> bytes:
            raise FileNotFoundError(name)

        return Record(data=self.row, where="rows.jsonl:1", fetch=fetch)


@pytest.mark.parametrize(
    ("dataset_class", "options", "pictures"),
    [
        (VlmDataset, {}, ["input_img"]),
        (EditDataset, {}, ["input_img", "output_img"]),
        (TextDataset, {}, []),
        (VlmDataset, {"max_turns": 1}, ["input_img"]),
        (EditDataset, {"upstream_compat": True}, ["input_img", "output_img"]),
    ],
)
def test_texts_that_are_too_long_are_rejected_before_pictures_are_read(
    tokenizer, dataset_class, options, pictures
):
    def rejected(*answers: str) -> str:
        turns = [
            {"from": "gpt" if i % 2 else "human", "value": a} for i, a in enumerate(["Say it.", *answers])
        ]
        row = {"message": turns, **{key: [{"path": "gone.png"}] for key in pictures}}
        dataset = dataset_class(
            tokenizer=tokenizer, vit_transform=TRANSFORM, vae_transform=TRANSFORM, **options
        )
        only = replace(group("words", [1]), dataset=dataset, source=OneRow(row))
        made = make_sample(plan(only), only, 0, 0)
        return f"{made.reason}: {made.message}" if isinstance(made, Reject) else "taken"

    missing = "missing_image" if pictures else "taken"
    assert rejected("a" * 80).startswith(missing)
    if options:  # not all of what a row says is in its sample
        assert rejected("a" * 200).startswith("missing_image")
        return
    assert rejected("a" * 99) == (
        "too_long: rows.jsonl:1: 101 tokens in its answers alone, the budget is 100; raise --max_num_tokens_per_sample"
    )
    assert rejected("a" * 50, "And?", "b" * 50).startswith(
        "too_long: rows.jsonl:1: 104 tokens in its answers"
    )


def test_long_words_of_few_tokens_are_not_too_long(tokenizer):
    """Bytes only say which texts to look at."""
    texts = ["<|im_start|>" * 20]  # 240 bytes, 20 tokens
    stream._require_short(texts, tokenizer, plan().budget)
    with pytest.raises(SkipSample, match="102 tokens in its answers alone"):
        stream._require_short(texts * 4 + ["a" * 12], tokenizer, plan().budget)


def test_a_cursor_of_another_mixture_is_refused():
    with pytest.raises(ValueError, match="made with a group 'gone'"):
        LaneStream(plan(), LaneCursor(lane=0, read={"gone": Amount(3)}))


IMAGE = Segment(kind="und_image", pixels=torch.zeros(3, 8, 16, dtype=torch.uint8))
ANSWER = Segment(kind="text", ids=torch.tensor([5]), supervised=True)


def sample_with(**region):
    region = Region(segment=1, token=0, image=0, name="the red 7", **region)
    return Sample(
        segments=(IMAGE, ANSWER), regions=(region,), origin=Origin(group="g", lane=0, position=0, where="f:3")
    )


@pytest.mark.parametrize(
    "box",
    [[0.5, 0.1, 0.5, 0.9], [0.1, 0.2, 0.3, 1.2], [0.9, 0.1, 0.2, 0.5], [0, 0, 0, 0], [0, 0, float("nan"), 1]],
)
def test_impossible_boxes_are_skipped(box):
    with pytest.raises(SkipSample, match="f:3: region 'the red 7': box") as e:
        check_sample(sample_with(head="box", boxes=torch.tensor([box])))
    assert e.value.reason == "bad_box"


def test_masks_have_the_size_of_their_picture():
    check_sample(sample_with(head="mask", mask=torch.ones(8, 16, dtype=torch.uint8)))
    with pytest.raises(SkipSample, match="mask of 8x16 px on an image of 16x8 px") as e:
        check_sample(sample_with(head="mask", mask=torch.ones(16, 8, dtype=torch.uint8)))
    assert e.value.reason == "mask_size"


def test_a_sample_without_a_target_is_skipped():
    rng = sample_rng(0, "g", 0, "finish")
    with pytest.raises(SkipSample) as e:
        finish_sample(Sample(segments=(IMAGE,)), rng, DropoutSpec(), 1.0)
    assert e.value.reason == "no_target"


def test_groups_share_a_pack():
    tasks = [set(b.tasks) for b in take(LaneStream(plan(), LaneCursor(lane=3)), 20)]
    assert max(len(t) for t in tasks) >= 3
    assert set().union(*tasks) == {g.name for g in mixed_groups()}
