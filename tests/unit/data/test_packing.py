"""Branches in a pack: where the positions of each start, and what the attention layout says of them. Regions and views."""

from dataclasses import replace

import torch

from data.packing import content_hash, pack
from data.types import PackedBatch, Region, Sample, Segment
from tests.unit.data.toy_groups import LAYOUT, SPECIAL


def text(tokens: int, branch: int = 0) -> Segment:
    """A text that takes so many tokens, the one before and the one after it included."""
    return Segment(kind="text", ids=torch.arange(10, 8 + tokens), branch=branch, supervised=True)


PICTURE = Segment(
    kind="und_image", pixels=torch.zeros(3, 8, 16, dtype=torch.uint8)
)  # 2 patches and 2 markers


def test_regions_are_read_at_a_token_of_a_text_or_at_the_closing_token_of_their_picture() -> None:
    boxes = torch.tensor([[0.1, 0.1, 0.2, 0.2], [0.3, 0.3, 0.9, 0.9]])
    phrases = (torch.tensor([11, 12]), torch.tensor([13]))
    asked = Region(head="detr", segment=1, token=0, image=1, boxes=boxes, phrases=phrases)
    empty = Region(head="detr", segment=1, token=0, image=1)
    told = Region(head="box", segment=2, token=1, image=1, boxes=boxes[:1])
    samples = [Sample(segments=(text(3), PICTURE, text(5)), regions=(r, told)) for r in (asked, empty, asked)]
    regions = pack(samples, LAYOUT, SPECIAL).regions
    # Of 12 tokens each: a text 0-2, a picture 3-6, a text 7-11 whose first token is at 8.
    assert regions["detr"].anchor.tolist() == [6, 18, 30] and regions["box"].anchor.tolist() == [9, 21, 33]
    assert regions["detr"].num_boxes.tolist() == [2, 0, 2] and regions["box"].num_boxes.tolist() == [1, 1, 1]
    assert regions["detr"].box_region.tolist() == [0, 0, 2, 2]
    torch.testing.assert_close(regions["detr"].boxes, torch.cat([boxes, boxes]))
    assert regions["detr"].phrase_ids.tolist() == [11, 12, 13, 11, 12, 13]
    assert (
        regions["detr"].phrase_lens.tolist() == [2, 1, 2, 1]
        and regions["box"].phrase_lens.tolist() == [0] * 3
    )


def test_views_stand_beside_their_pictures_and_count_in_the_hash() -> None:
    view = torch.full((3, 4, 4), 7, dtype=torch.uint8)
    batch = packed((PICTURE, replace(PICTURE, view=view)))
    assert [v.shape[1] for v in batch.und_views] == [0, 4] and torch.equal(batch.und_views[1], view)
    other = packed((PICTURE, replace(PICTURE, view=view + 1)))
    assert content_hash(batch) != content_hash(other)


def packed(*samples: tuple[Segment, ...]) -> PackedBatch:
    return pack([Sample(segments=segments) for segments in samples], LAYOUT, SPECIAL)


def runs(batch: PackedBatch) -> list[list[int]]:
    """The positions of each split."""
    return [part.tolist() for part in batch.position.split(list(batch.split_lens))]


def test_each_branch_starts_where_the_trunk_stands() -> None:
    batch = packed((text(3), PICTURE, text(4, 1), text(3, 1), text(3, 2), text(4, 2)))
    assert runs(batch) == [
        [0, 1, 2],
        [3] * 4,
        [4, 5, 6, 7],
        [8, 9, 10],
        [4, 5, 6],
        [7, 8, 9, 10],
    ]
    assert batch.split_branches == (0, 0, 1, 1, 2, 2)
    assert batch.split_modes == ("causal", "full", *["causal"] * 4)


def test_the_trunk_goes_on_as_if_there_were_no_branch_and_branches_may_take_turns() -> None:
    batch = packed((text(3), text(4, 1), text(3), text(3, 2), text(3, 1)))
    assert runs(batch) == [[0, 1, 2], [3, 4, 5, 6], [3, 4, 5], [6, 7, 8], [7, 8, 9]]
    assert batch.split_branches == (0, 1, 0, 2, 1)


def test_branches_of_one_sample_say_nothing_of_the_next() -> None:
    batch = packed((PICTURE, text(3, 1), text(3, 2)), (text(3), text(3, 1)))
    assert runs(batch) == [[0] * 4, [1, 2, 3], [1, 2, 3], [0, 1, 2], [3, 4, 5]]
    assert batch.sample_lens == (10, 6)


def test_a_picture_left_out_keeps_its_gap_in_every_branch() -> None:
    batch = packed((replace(PICTURE, dropped=True), text(3, 1), text(3, 2)))
    assert runs(batch) == [[1, 2, 3], [1, 2, 3]]
    assert batch.split_branches == (1, 2)


def test_a_branch_predicts_what_its_text_would_predict_alone() -> None:
    question, answers = text(3), [text(4), text(5)]
    branched = packed((question, *(replace(a, branch=k) for k, a in enumerate(answers, 1))))
    alone = [packed((question, a)) for a in answers]
    ids = torch.cat([alone[0].label_ids, alone[1].label_ids[2:]])  # the question's two labels stand once
    assert torch.equal(branched.label_ids, ids)
    weights = torch.cat([alone[0].label_weight, alone[1].label_weight[2:]])
    assert torch.equal(branched.label_weight, weights)
