"""Messages -> segments: order, supervision, placeholders, anchors, and prompts that are the beginning of a sample."""

import numpy as np
import pytest
import torch

from data.conversation import (
    Target,
    Turn,
    attach_targets,
    build_sample,
    choose_exchanges,
    end_with_images,
    lead_with_images,
    prompt_segments,
    text_segments,
)
from data.dataset_base import SkipSample
from data.tokens import SPECIAL_TOKENS, Tokenizer
from data.types import Sample, Segment


def und(value: int) -> tuple[Segment, ...]:
    return (Segment(kind="und_image", pixels=torch.full((3, 8, 8), value, dtype=torch.uint8)),)


def gen(value: int) -> tuple[Segment, ...]:
    return (Segment(kind="gen_image", pixels=torch.full((3, 16, 16), value, dtype=torch.uint8)),)


def human(text: str) -> Turn:
    return Turn(role="human", text=text)


def gpt(text: str, *targets: Target) -> Turn:
    return Turn(role="gpt", text=text, targets=targets)


def plan(sample: Sample | tuple[Segment, ...], tokenizer: Tokenizer) -> list[str]:
    """Readable: texts as they are ("*" before supervised ones), images as kind and value."""
    segments = sample.segments if isinstance(sample, Sample) else sample
    return [
        ("*" if s.supervised else "") + tokenizer.decode(s.ids, keep_special=True)
        if s.kind == "text"
        else f"{s.kind}:{int(s.pixels.flatten()[0])}"
        for s in segments
    ]


def reason(call, *args, **kwargs) -> str:
    with pytest.raises(SkipSample) as e:
        call(*args, **kwargs)
    return e.value.reason


def test_texts_and_pictures_stand_in_the_order_of_the_message(tokenizer):
    turns = [human("Compare <image>\n and <image>"), gpt("Same.")]
    sample = build_sample(turns, tokenizer, images=[und(1), und(2)], task="t")
    assert plan(sample, tokenizer) == ["Compare", "und_image:1", "and", "und_image:2", "*Same."]


def test_the_image_index_runs_through_all_turns(tokenizer):
    turns = [human("<image>a"), gpt("1"), human("<image>b"), gpt("2")]
    sample = build_sample(turns, tokenizer, images=[und(1), und(2)], task="t")
    assert plan(sample, tokenizer) == ["und_image:1", "a", "*1", "und_image:2", "b", "*2"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Done. <image>", ["*Done.", "gen_image:9"]),
        ("<image> Now it is.", ["gen_image:9", "*Now it is."]),
        ("Done.", ["*Done.", "gen_image:9"]),
        ("", ["gen_image:9"]),
        ("See <image> there.", ["*See", "gen_image:9", "*there."]),
    ],
)
def test_drawn_pictures_stand_where_the_answer_says(tokenizer, answer, expected):
    turns = end_with_images([human("Do."), gpt(answer)], 1)
    assert plan(build_sample(turns, tokenizer, drawn=[gen(9)], task="t"), tokenizer) == ["Do.", *expected]


def test_a_missing_answer_still_gets_its_picture(tokenizer):
    assert end_with_images([human("Do.")], 2) == (human("Do."), gpt("<image><image>"))


def test_answers_without_pictures_are_kept_as_written(tokenizer):
    assert plan(build_sample([human(" q "), gpt(" a\n")], tokenizer, task="t"), tokenizer) == ["q", "* a\n"]


def test_human_texts_are_droppable_on_request_and_answers_never(tokenizer):
    sample = build_sample([human("q"), gpt("a")], tokenizer, drop_text=True, task="t")
    assert [s.droppable for s in sample.segments] == [True, False]


@pytest.mark.parametrize("pictures", [0, 1, 3])
def test_other_numbers_of_placeholders_than_pictures_are_refused(tokenizer, pictures):
    turns = [human("<image>a<image>"), gpt("b")]
    images = [und(i) for i in range(pictures)]
    with pytest.raises(SkipSample, match=f"have 2 <image>, the row has {pictures} input pictures"):
        build_sample(turns, tokenizer, images=images, task="t")


def test_a_placeholder_in_an_answer_without_a_picture_is_refused(tokenizer):
    assert reason(build_sample, [human("a"), gpt("b <image>")], tokenizer, task="t") == "image_count"


def test_nothing_to_learn_is_refused(tokenizer):
    assert reason(build_sample, [human("a"), gpt(" ")], tokenizer, task="t") == "no_target"


def test_anchors_point_at_their_tokens_and_pictures(tokenizer):
    box, mask = torch.tensor([[0.1, 0.2, 0.3, 0.4]]), torch.ones(8, 8, dtype=torch.uint8)
    first, second = Target(head="box", name="a", image=1, boxes=box), Target(head="mask", name="b", mask=mask)
    turns = [human("<image><image>Where?"), gpt("at <BOX>, shape <SEG>", first, second)]
    sample = build_sample(turns, tokenizer, images=[und(1), und(2)], task="t")
    assert [(r.head, r.segment, r.image, r.name) for r in sample.regions] == [
        ("box", 3, 1, "a"),
        ("mask", 3, 0, "b"),
    ]
    for region in sample.regions:
        token = sample.segments[region.segment].ids[region.token]
        assert token == tokenizer.special.anchors[region.head]
    assert sample.regions[0].boxes is box and sample.regions[1].mask is mask


def test_the_region_of_an_edit_names_the_understanding_picture(tokenizer):
    cond = Segment(kind="cond_image", pixels=torch.zeros(3, 16, 16, dtype=torch.uint8))
    turns = [human("<image>"), gpt("<BOX>", Target(head="box", boxes=torch.tensor([[0, 0, 1.0, 1.0]])))]
    sample = build_sample(turns, tokenizer, images=[(cond, *und(1))], task="t")
    assert sample.segments[sample.regions[0].image].kind == "und_image"


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([human("<image>"), gpt("<BOX>")], "object_count"),
        ([human("<image>"), gpt("<BOX>", Target(head="box", image=1))], "object_image"),
        ([human("<image><SEG>?"), gpt("a")], "object_count"),
    ],
)
def test_anchors_without_a_thing_are_refused(tokenizer, turns, expected):
    assert reason(build_sample, turns, tokenizer, images=[und(1)], task="t") == expected


def test_targets_are_handed_out_per_head_in_order():
    boxes, masks = [Target(head="box", name=n) for n in "ab"], [Target(head="mask", name="c")]
    turns = attach_targets(
        [human("?"), gpt("<BOX> <SEG>"), human("?"), gpt("<BOX>")], {"box": boxes, "mask": masks}
    )
    assert [[t.name for t in turn.targets] for turn in turns] == [[], ["a", "c"], [], ["b"]]
    assert reason(attach_targets, [gpt("<BOX>")], {"box": boxes}) == "object_count"
    assert reason(attach_targets, [gpt("<BOX>")], {}) == "object_count"


def test_a_vocabulary_without_the_anchor_is_a_configuration_error(save_tokenizer):
    tokenizer = save_tokenizer(SPECIAL_TOKENS[:4])
    turns = [human("<image>"), gpt("<BOX>", Target(head="box"))]
    with pytest.raises(ValueError, match="lacks <BOX>"):
        build_sample(turns, tokenizer, images=[und(1)], task="t")


CONVERSATION = (human("<image>\nq0"), gpt("a0"), human("q1"), gpt("a1"), human("q2"), gpt("a2"))


def test_exchanges_are_shuffled_as_pairs_and_the_picture_stays_first():
    seen = set()
    for seed in range(40):
        turns = choose_exchanges(CONVERSATION, np.random.default_rng(seed), shuffle=True)
        assert turns[0].text.startswith("<image>") and sum("<image>" in t.text for t in turns) == 1
        questions = [t.text.removeprefix("<image>") for t in turns[::2]]
        assert [t.text for t in turns[1::2]] == [q.replace("q", "a") for q in questions]
        seen.add(tuple(questions))
    assert len(seen) == 6


def test_a_subset_keeps_its_order_unless_shuffled():
    for seed in range(10):
        turns = choose_exchanges(CONVERSATION, np.random.default_rng(seed), shuffle=False, max_exchanges=2)
        questions = [t.text for t in turns[::2]]
        assert len(turns) == 4 and questions[0].startswith("<image>")
        assert [q.removeprefix("<image>") for q in questions] in (["q0", "q1"], ["q0", "q2"], ["q1", "q2"])


def test_exchanges_with_pictures_of_their_own_stay_as_they_are():
    turns = (*CONVERSATION, human("<image>q3"), gpt("a3"))
    assert choose_exchanges(turns, np.random.default_rng(0), shuffle=True, max_exchanges=1) == turns


@pytest.mark.parametrize(
    ("turns", "branches"),
    [
        ([human("<image><image>\nq0"), gpt("a0"), human("q1"), gpt("a1")], [0, 0, 1, 1, 2, 2]),
        ([human("<image>"), human("q0"), gpt("a0"), human("q1"), gpt("a1")], [0, 1, 1, 2, 2]),
        ([human("q0 <image> and?"), gpt("a0"), human("q1"), gpt("a1")], [1, 1, 1, 1, 2, 2]),
        ([human("<image>q0"), gpt("a0"), human("<image>q1"), gpt("a1")], [0, 1, 1, 2, 2, 2]),
        ([human("q0"), gpt("a0")], [1, 1]),
        ([human("<image>"), gpt("a0"), human("q1"), gpt("a1")], [0, 1, 2, 2]),
    ],
)
def test_independent_exchanges_have_a_branch_each_and_the_pictures_before_them_the_trunk(
    tokenizer, turns, branches
):
    images = [und(i) for i in range(sum(turn.text.count("<image>") for turn in turns))]
    independent = build_sample(turns, tokenizer, images=images, independent=True, task="t")
    assert [s.branch for s in independent.segments] == branches
    together = build_sample(turns, tokenizer, images=images, task="t")
    assert plan(independent, tokenizer) == plan(together, tokenizer)
    assert {s.branch for s in together.segments} == {0}


@pytest.mark.parametrize(
    "question", ["<image>\nWhich digits are there?", "Which digits are there?", "Compare <image> to nothing."]
)
def test_a_prompt_is_the_beginning_of_the_training_sample(tokenizer, question):
    images = [und(1)]
    turns = [*lead_with_images([human(question)], 1), gpt("7")]
    sample = build_sample(turns, tokenizer, images=images, task="t")
    prompt = prompt_segments(question, tokenizer, images)
    assert plan(prompt, tokenizer) == plan(sample, tokenizer)[:-1]
    assert all(torch.equal(p.ids, s.ids) for p, s in zip(prompt, sample.segments, strict=False))


def test_single_segments_are_those_of_a_prompt(tokenizer):
    (alone,), (_, prompted) = (
        text_segments(" q\n", tokenizer),
        prompt_segments("<image> q\n", tokenizer, [und(1)]),
    )
    assert torch.equal(alone.ids, prompted.ids) and text_segments(" \n", tokenizer) == ()
