"""Shikra-style rows: every task, tokens and coordinates, templates, what is put into them, and what is refused."""

import json

import numpy as np
import pytest
import torch

from data.conversation import IMAGE
from data.dataset_base import SkipSample
from data.grounding_dataset import OURS, TASKS, GroundingDataset, read_templates
from data.mixture import load_mixture
from data.tokens import ANCHORS
from tests.unit.data.test_datasets import make, plan, sample_of
from tests.unit.data.test_datasets import record as as_record

BOX, OTHER = [16, 8, 48, 40], [0, 0, 32, 64]  # of a picture of 64x64 px
ROW = {"img_path": "a.png", "expression": "the {red} <question> 7", "bbox": BOX}
MASK = {"size": [64, 64], "counts": [0, 64 * 32, 64 * 32]}
VQA = {
    "image_path": "a.png",
    "question": "Is <boxes> next to <boxes>?",
    "annotation": {"multiple_choice_answer": "Yes: <boxes>."},
    "boxes": [BOX, OTHER],
    "question_boxes_seq": [[0], [1, 0]],
    "answer_boxes_seq": [[1]],
}
SPOT = {
    "img_path": "a.png",
    "sentence": "<ph_st>A man<ph_ed> with <ph_st>two dogs<ph_ed>.",
    "boxes": [BOX, OTHER],
    "boxes_seq": [[0], [1, 0]],
}


@pytest.fixture
def of(tokenizer):
    """Makes the dataset of a task with one template, and what it says of a row."""

    def build(row: dict, template: str, seed: int = 0, **options):
        dataset = make(GroundingDataset, tokenizer, templates=[template], **options)
        sample = sample_of(dataset, row, seed)
        return plan(sample, tokenizer), sample

    return build


def test_rec_with_tokens_and_with_every_form_of_text(of):
    texts, sample = of(ROW, "Where, in <image>, is <expr>?")
    assert texts == ["Where, in", "und_image:1", ", is the {red} <question> 7?", "*<BOX>"]
    (region,) = sample.regions
    torch.testing.assert_close(region.boxes[0], torch.tensor([0.25, 0.125, 0.75, 0.625]))
    for options, written in [
        ({"box_format": "fraction"}, "[0.250,0.125,0.750,0.625]"),
        ({"box_format": "fraction", "box_digits": 2, "box_brackets": "round"}, "(0.25,0.12,0.75,0.62)"),
        ({"box_format": "thousandths"}, "[250,125,750,625]"),
        ({"box_format": "pixels"}, "[8,4,24,20]"),  # the model sees 32x32 px
        ({"box_format": "bins"}, "<b_st><bin_250> <bin_125> <bin_750> <bin_625><b_ed>"),
        ({"box_format": "fraction", "bbox_format": "xywh"}, "[0.250,0.125,1.000,0.750]"),
    ]:
        texts, sample = of(ROW, "<expr>?", **options)
        assert texts[-1] == f"*{written}" and not sample.regions


def test_res_with_several_masks_and_with_none(of):
    texts, sample = of({**ROW, "masks": [MASK, MASK]}, "Cut out <expr>.", task="res")
    assert texts == ["und_image:1", "Cut out the {red} <question> 7.", "*<SEG>;<SEG>"]
    assert [int(r.mask.sum()) for r in sample.regions] == [16 * 32] * 2
    texts, sample = of({**ROW, "absent": True}, "<expr>?", task="res", absent_answer="Not here.")
    assert texts[-1] == "*Not here." and not sample.regions
    with pytest.raises(SkipSample, match="`mask`.*`absent`"):
        of(ROW, "<expr>?", task="res")


def test_regions_described(of):
    for task in ("reg", "gc"):
        texts, sample = of(ROW, "What is at <boxes>?", task=task)
        assert texts == ["und_image:1", "What is at [0.250,0.125,0.750,0.625]?", "*the {red} <question> 7"]
        assert not sample.regions


def test_a_question_that_points_and_an_answer_that_does(of):
    texts, sample = of(VQA, "<question> {x}", task="vqa")
    first, second = "0.250,0.125,0.750,0.625", "0.000,0.000,0.500,1.000"
    assert texts == ["und_image:1", f"Is [{first}] next to [{second};{first}]? {{x}}", "*Yes: <BOX>."]
    torch.testing.assert_close(sample.regions[0].boxes[0], torch.tensor([0.0, 0.0, 0.5, 1.0]))
    for change in ({"question_boxes_seq": [[0]]}, {"answer_boxes_seq": [[2]]}, {"answer_boxes_seq": []}):
        with pytest.raises(SkipSample) as e:
            of({**VQA, **change}, "<question>", task="vqa")
        assert e.value.reason == "object_count"


def test_a_caption_that_points_as_it_names(of):
    texts, sample = of(SPOT, "Tell.", task="spot")
    assert texts == ["und_image:1", "Tell.", "*A man <BOX> with two dogs <BOX>;<BOX>."]
    torch.testing.assert_close(sample.regions[1].boxes[0], torch.tensor([0.0, 0.0, 0.5, 1.0]))
    texts, _ = of(SPOT, "Tell.", task="spot", box_format="thousandths")
    assert texts[-1] == "*A man [250,125,750,625] with two dogs [0,0,500,1000;250,125,750,625]."
    texts, _ = of({"img_path": "a.png", "caption": "{0} %s <expr>"}, "Say.", task="caption")
    assert texts[-1] == "*{0} %s <expr>"


def test_our_templates_ask_in_words_of_their_own_for_every_task(tokenizer):
    rows = {"vqa": VQA, "spot": SPOT, "caption": {"img_path": "a.png", "caption": "a dog"}}
    for task, kind in TASKS.items():
        templates = read_templates(str(OURS / f"{task}.json"), kind.needs)
        assert len(set(templates)) == len(templates) >= 5
        assert all(t.count(IMAGE) <= 1 and not any(a in t for a in ANCHORS.values()) for t in templates)
        dataset = make(GroundingDataset, tokenizer, task=task)
        row = rows.get(task, {**ROW, "expression": "the 7", "mask": MASK})
        questions = {"".join(plan(sample_of(dataset, row, seed), tokenizer)[:-1]) for seed in range(20)}
        assert len(questions) > 2


def test_templates_of_a_file_lie_beside_the_yaml(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(["<expr>?"]))
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "data.yaml").write_text(
        "grounding_jsonl: {dataset_names: [a], weight: 1, templates: mine.json, "
        "vit_image_transform_args: {image_stride: 8, max_image_size: 32, min_image_size: 32}}\n"
        "dataset_info: {grounding_jsonl: {a: {jsonl_path: rows.jsonl}}}\n"
    )
    (spec,) = load_mixture(tmp_path / "data.yaml")
    assert read_templates(spec.options["templates"], ("expr",)) == ("<expr>?",)


def test_what_an_evaluation_asks(tokenizer):
    record = {**ROW, "expression": ["the 7", "it"], "mask": MASK}
    rec = make(GroundingDataset, tokenizer, templates=["<expr>?"])
    file, asked = rec.asked(as_record(record))
    assert (file, [a.question for a in asked], asked[0].answer) == ("a.png", ["the 7?", "it?"], "<BOX>")
    assert asked[0].box == (16, 8, 48, 40)
    written = make(GroundingDataset, tokenizer, templates=["<expr>?"], box_format="pixels")
    assert written.asked(as_record(record))[1][0].answer == ""
    res = make(GroundingDataset, tokenizer, task="res", templates=["<expr>?"])
    assert res.asked(as_record(record))[1][0].mask((64, 64)).sum() == 64 * 32
    assert res.asked(as_record({**ROW, "absent": True}))[1][0].mask((64, 64)).sum() == 0
    assert make(GroundingDataset, tokenizer, task="reg").asked(as_record(record))[1] == []


def test_a_moved_picture_moves_its_coordinates(tokenizer):
    dataset = make(
        GroundingDataset, tokenizer, templates=["<expr>?"], box_format="fraction", augment={"flip": 1.0}
    )
    sample = dataset.sample(as_record(ROW), np.random.default_rng(0))
    assert plan(sample, tokenizer)[-1] == "*[0.250,0.125,0.750,0.625]"  # in the middle
    sample = dataset.sample(as_record({**ROW, "bbox": OTHER}), np.random.default_rng(0))
    assert plan(sample, tokenizer)[-1] == "*[0.500,0.000,1.000,1.000]"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "detect"}, "task must be one of rec"),
        ({"templates": ["Where?"]}, "lacks <expr>"),
        ({"templates": "nowhere.json"}, "nowhere.json: not a JSON list"),
        ({"box_format": "inches"}, "inches"),
        ({"bbox_format": "xy"}, "bbox_format must be"),
        ({"absent_answer": " "}, "absent_answer"),
    ],
)
def test_wrong_options_are_named(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        make(GroundingDataset, tokenizer, **options)


def test_sentences_of_one_thing_share_a_mask_whose_overlapping_parts_count_once(tokenizer):
    parts = [[0, 0, 31, 0, 31, 31, 0, 31], [16, 0, 47, 0, 47, 31, 16, 31]]
    dataset = make(GroundingDataset, tokenizer, task="res", templates=["<expr>"])
    row = {**ROW, "expression": ["the 7", "the red one", "it"], "segmentation": parts}
    _, asked = dataset.asked(as_record(row))
    masks = [one.mask((64, 64)) for one in asked]
    assert [one.name for one in asked] == row["expression"]
    assert all(mask.max() == 1 and mask.sum() == 48 * 32 for mask in masks)
