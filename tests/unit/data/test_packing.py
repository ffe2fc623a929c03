"""Branches in a pack: where the positions of each start, and what the attention layout says of them."""

from dataclasses import replace

import torch

from data.packing import pack
from data.types import PackedBatch, Sample, Segment
from tests.unit.data.toy_groups import LAYOUT, SPECIAL


def text(tokens: int, branch: int = 0) -> Segment:
    """A text that takes so many tokens, the one before and the one after it included."""
    return Segment(kind="text", ids=torch.arange(10, 8 + tokens), branch=branch, supervised=True)


PICTURE = Segment(
    kind="und_image", pixels=torch.zeros(3, 8, 16, dtype=torch.uint8)
)  # 2 patches and 2 markers


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
