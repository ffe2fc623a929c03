"""Dataset classes: what each makes of a record, and how each refuses a bad one."""

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from data.conversation import IMAGE, image_segment, prompt_segments
from data.dataset_base import DropoutSpec, Record, SkipSample, TaskDataset, finish_sample
from data.dataset_info import DATASET_REGISTRY
from data.detection_dataset import DetectionCocoDataset, DetectionDataset
from data.grounding_dataset import GroundingDataset
from data.interleave_datasets.edit import CounterfactualDataset, EditDataset
from data.interleave_datasets.steps import StepsDataset
from data.layout import LayoutSpec
from data.medical_dataset import MedicalDataset, MedicalRowDataset
from data.mixture import load_mixture
from data.packing import pack
from data.perception_dataset import ReasonSegDataset, ReferDataset, ReferRowDataset
from data.sources import FORMATS
from data.t2i_dataset import ParquetT2iDataset, T2iDataset, T2iMessageDataset
from data.text_dataset import TextDataset
from data.tokens import Tokenizer
from data.transforms import ImageTransform
from data.types import Sample
from data.vlm_dataset import ReconstructionDataset, ReconstructionVer2Dataset, VlmDataset, VlmVer1Dataset

ROOT = Path(__file__).parents[3]
VIT = ImageTransform(max_image_size=32, min_image_size=32, stride=8)
VAE = ImageTransform(max_image_size=32, min_image_size=32, stride=16)


def png(width: int = 64, height: int = 64, value: int = 7) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (value, value, value)).save(file, "PNG")
    return file.getvalue()


FILES = {"a.png": png(value=1), "b.png": png(value=2), "png": png(value=3), "wide.png": png(128, 64)}
FILES |= {f"image_list/{i}": png(value=10 + i) for i in range(4)}


def record(data: dict, files: dict[str, bytes] = FILES) -> Record:
    return Record(data=data, where="rows.jsonl:1", fetch=files.__getitem__)


def message(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def make(dataset_class: type[TaskDataset], tokenizer: Tokenizer, **options) -> TaskDataset:
    return dataset_class(tokenizer=tokenizer, vit_transform=VIT, vae_transform=VAE, **options)


def sample_of(dataset: TaskDataset, data: dict, seed: int = 0) -> Sample:
    return dataset.to_sample(record(data), np.random.default_rng(seed))


def plan(sample: Sample, tokenizer: Tokenizer) -> list[str]:
    """Readable: "*" marks a supervised text, "?" a droppable segment; pictures as kind and value."""
    marks = ["*" * s.supervised + "?" * s.droppable for s in sample.segments]
    return [
        mark
        + (
            tokenizer.decode(s.ids, keep_special=True)
            if s.kind == "text"
            else f"{s.kind}:{s.pixels[0, 0, 0]}"
        )
        for mark, s in zip(marks, sample.segments, strict=True)
    ]


VQA = {
    "input_img": [{"path": "a.png"}],
    "message": message("<image>\nq0", "a0", "q1", "a1"),
    "main_task_type": "vqa",
}
EDIT = {
    "input_img": [{"path": "a.png"}],
    "output_img": [{"path": "b.png"}],
    "message": message("<image>\nPaint it.", "Done. <image>"),
}
TEXT = {"message": message("2 <image> +\n3", "5")}
T2I = {"json": {"caption": "a red 7"}}
PARQUET = {"image": "a.png", "captions": '{"short": "a red 7", "long": "a red 7"}'}
STEPS = {"image_list": ["image_list/0", "image_list/1"], "instruction_list": [["Make it red."]]}
DRAW = {"output_img": [{"path": "b.png"}], "message": message("Draw.", "Here: <image>")}


def annotation(**changes) -> dict:
    mask = {"size": [64, 64], "counts": [64 * 16, 128, 64 * 46]}
    plain = {"id": 5, "image_id": 1, "category_id": 7, "bbox": [16, 8, 2, 32], "segmentation": mask}
    return {**plain, "expressions": ["the red 7"], **changes}


def coco(*annotations: dict, file_name: str = "a.png") -> dict:
    return {
        "image": {"id": 1, "file_name": file_name, "width": 64, "height": 64},
        "annotations": list(annotations),
        "categories": {7: {"id": 7, "name": "7"}},
    }


REFER = coco(annotation(), annotation(id=6, bbox=[0, 0, 32, 64], expressions=["the blue 7", "the big 7"]))
THING = {"img_path": "a.png", "expression": "the red 7", "bbox": [16, 8, 48, 40]}
SCAN = {**REFER, "image": {**REFER["image"], "modality": "X-ray", "patient_id": "p1", "spacing": [0.5, 0.5]}}
FINDINGS = {
    "image": "a.png",
    "labels": ["the heart"],
    "boxes": [[16, 8, 32, 32]],
    "modality": "X-ray",
    "slice_idx": 0,
}
SQUARE = [[0, 0], [31, 0], [31, 31], [0, 31]]
REASON = {
    "image": "a.png",
    "text": ["What counts here?"],
    "is_sentence": True,
    "shapes": [{"label": "target", "points": SQUARE}],
}
SCENE = {
    "student": {"images": ["a.png"], "objects": [{"bbox_2d": [16, 8, 48, 40], "label": "a red 7"}]},
    "teachers": [
        {
            "images": ["b.png"],
            "objects": [{"bbox_2d": [0, 0, 8, 8], "desc": "a 3"}],
            "width": 64,
            "height": 64,
        }
    ],
}
ROWS = {
    VlmDataset: VQA,
    VlmVer1Dataset: VQA,
    ReconstructionDataset: VQA,
    ReconstructionVer2Dataset: VQA,
    EditDataset: EDIT,
    CounterfactualDataset: EDIT,
    StepsDataset: STEPS,
    ParquetT2iDataset: PARQUET,
    TextDataset: TEXT,
    T2iDataset: T2I,
    T2iMessageDataset: DRAW,
    ReferDataset: REFER,
    ReferRowDataset: THING,
    ReasonSegDataset: REASON,
    GroundingDataset: THING,
    MedicalDataset: SCAN,
    MedicalRowDataset: FINDINGS,
    DetectionDataset: SCENE,
    DetectionCocoDataset: REFER,
}


@pytest.mark.parametrize(
    ("dataset_class", "options", "expected"),
    [
        (VlmDataset, {}, ["und_image:1", "q0", "*a0", "q1", "*a1"]),
        (VlmVer1Dataset, {}, ["?und_image:1", "q0", "*a0", "q1", "*a1"]),
        (VlmVer1Dataset, {"drop_image": False}, ["und_image:1", "q0", "*a0", "q1", "*a1"]),
        (
            ReconstructionDataset,
            {"request": "Again."},
            ["und_image:1", "q0", "*a0", "q1 Again.", "*a1", "gen_image:1"],
        ),
        (
            ReconstructionVer2Dataset,
            {"request": "Again."},
            ["cond_image:1", "und_image:1", "q0", "*a0", "q1 Again.", "*a1", "gen_image:1"],
        ),
        (EditDataset, {}, ["cond_image:1", "und_image:1", "Paint it.", "*Done.", "gen_image:2"]),
        (CounterfactualDataset, {}, ["cond_image:1", "und_image:1", "Paint it.", "gen_image:2", "*Done."]),
        (StepsDataset, {}, ["?cond_image:10", "?und_image:10", "?Make it red.", "gen_image:11"]),
        (ParquetT2iDataset, {}, ["?a red 7", "gen_image:1"]),
        (ReferRowDataset, {}, ["und_image:1", "Where is the red 7?", "*<BOX>"]),
        (ReasonSegDataset, {}, ["und_image:1", "What counts here?", "*<SEG>"]),
        (
            EditDataset,
            {"drop_condition": True},
            ["?cond_image:1", "?und_image:1", "?Paint it.", "*Done.", "gen_image:2"],
        ),
        (TextDataset, {}, ["2 + 3", "*5"]),
        (T2iDataset, {}, ["?a red 7", "gen_image:3"]),
        (T2iMessageDataset, {}, ["?Draw.", "*Here:", "gen_image:2"]),
        (T2iDataset, {"draws": 3}, ["?a red 7", "gen_image:3", "gen_image:3", "gen_image:3"]),
        (
            EditDataset,
            {"draws": 2},
            ["cond_image:1", "und_image:1", "Paint it.", "*Done.", "gen_image:2", "gen_image:2"],
        ),
    ],
)
def test_plans(tokenizer, dataset_class, options, expected):
    assert (
        plan(sample_of(make(dataset_class, tokenizer, **options), ROWS[dataset_class]), tokenizer) == expected
    )


@pytest.mark.parametrize("name", DATASET_REGISTRY)
def test_every_class_is_a_pure_function_that_says_what_it_reads(tokenizer, name):
    dataset_class = DATASET_REGISTRY[name]
    assert dataset_class.source_format in FORMATS and dataset_class.__doc__
    dataset, row = make(dataset_class, tokenizer), ROWS[dataset_class]
    before = json.dumps(row)
    one, other = sample_of(dataset, row, 3), sample_of(dataset, row, 3)
    assert json.dumps(row) == before, "the record was changed"
    assert plan(one, tokenizer) == plan(other, tokenizer) and one.task == other.task != ""
    assert IMAGE not in "".join(plan(one, tokenizer))
    for s in one.segments:
        assert s.kind == "text" or (s.pixels.dtype == torch.uint8 and s.pixels.shape == (3, 32, 32))
    finish_sample(one, np.random.default_rng(0), DropoutSpec(text=1.0, vit=1.0, vae=1.0), 1.0)


@pytest.mark.parametrize("name", DATASET_REGISTRY)
def test_every_class_skips_an_empty_record(tokenizer, name):
    empty = {"coco": {"image": {}, "annotations": [], "categories": {}}}
    dataset = make(DATASET_REGISTRY[name], tokenizer)
    with pytest.raises(SkipSample):
        sample_of(dataset, empty.get(dataset.source_format, {}))


ODD = [
    None, "", 0, -1, 3.5, float("nan"), True, [], {}, [None], ["x"], {"a": 1}, "\ud800", 10**400, [1, 2, 3, 4], "<image><SEG>",
]  # fmt: skip


def places(value, path=()):
    """The places of everything inside a row."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*path, key)
        yield from places(part, (*path, key))


def changed(row, path, value):
    if not path:
        return value
    copy = dict(row) if isinstance(row, dict) else list(row)
    copy[path[0]] = changed(row[path[0]], path[1:], value)
    return copy


@pytest.mark.parametrize("dataset_class", ROWS)
def test_whatever_stands_in_a_row_it_is_a_sample_or_refused(tokenizer, dataset_class):
    row = ROWS[dataset_class]
    if dataset_class is VlmDataset:
        mask = {"size": [64, 64], "counts": [0, 4096]}
        objects = {"ref": ["a"], "bbox": [[1, 1, 5, 5]], "mask": [mask], "image": [0]}
        row = {**row, "message": message("<image>q", "<BOX> <SEG>"), "objects": objects}
    dataset, refused = make(dataset_class, tokenizer), 0
    for path in places(row):
        for odd in ODD:
            try:
                sample_of(dataset, changed(row, path, odd))
            except SkipSample as e:
                assert e.reason and e.message
                refused += 1
    assert refused > 20


def test_an_edit_whose_answer_follows_the_picture(tokenizer):
    row = {**EDIT, "message": message("Paint it.", "<image> Now it is blue.")}
    expected = ["cond_image:1", "und_image:1", "Paint it.", "gen_image:2", "*Now it is blue."]
    assert plan(sample_of(make(EditDataset, tokenizer), row), tokenizer) == expected


def test_an_edit_that_points_before_it_draws(tokenizer):
    row = {
        **EDIT,
        "message": message("Paint the 7. <image>", "Here: <BOX> <image>"),
        "objects": {"ref": ["the 7"], "bbox": [[8, 0, 16, 32]]},
    }
    sample = sample_of(make(EditDataset, tokenizer, drop_condition=True), row)
    # The picture that a box lies in is never left out.
    expected = ["?Paint the 7.", "?cond_image:1", "und_image:1", "*Here: <BOX>", "gen_image:2"]
    assert plan(sample, tokenizer) == expected
    (region,) = sample.regions
    assert (region.head, region.image, region.segment, region.name) == ("box", 2, 3, "the 7")


@pytest.mark.parametrize("missing", ["input_img", "output_img"])
def test_an_edit_without_a_picture_is_refused(tokenizer, missing):
    with pytest.raises(SkipSample, match=f"`{missing}` is missing or empty; it must be a path"):
        sample_of(make(EditDataset, tokenizer), {**EDIT, missing: []})


@pytest.mark.parametrize(
    ("dataset_class", "question", "kinds"),
    [
        (VlmDataset, "q0", ("und_image",)),
        (VlmVer1Dataset, "q0", ("und_image",)),
        (EditDataset, "Paint it.", ("cond_image", "und_image")),
        (CounterfactualDataset, "Paint it.", ("cond_image", "und_image")),
        (StepsDataset, "Make it red.", ("cond_image", "und_image")),
        (ReferRowDataset, "Where is the red 7?", ("und_image",)),
        (ReasonSegDataset, "What counts here?", ("und_image",)),
        (T2iDataset, "a red 7", ()),
        (ParquetT2iDataset, "a red 7", ()),
        (T2iMessageDataset, "Draw.", ()),
        (TextDataset, "2 + 3", ()),
    ],
)
def test_the_prompt_of_inference_is_the_beginning_of_a_sample(tokenizer, dataset_class, question, kinds):
    sample = sample_of(make(dataset_class, tokenizer), ROWS[dataset_class])
    picture = Image.open(io.BytesIO(FILES["image_list/0" if dataset_class is StepsDataset else "a.png"]))
    towers = {"cond_image": VAE, "und_image": VIT}
    shown = [tuple(image_segment(kind, picture, towers[kind]) for kind in kinds)] if kinds else []
    prompt = prompt_segments(question, tokenizer, shown)
    assert len(prompt) == len(kinds) + 1
    for ours, trained in zip(prompt, sample.segments, strict=False):
        assert ours.kind == trained.kind
        assert torch.equal(ours.ids, trained.ids) and torch.equal(ours.pixels, trained.pixels)


@pytest.mark.parametrize("dataset_class", [T2iDataset, EditDataset])
def test_every_draw_has_its_own_noise_at_the_place_of_the_first(tokenizer, dataset_class):
    sample = sample_of(make(dataset_class, tokenizer, draws=3), ROWS[dataset_class])
    sample = finish_sample(sample, np.random.default_rng(0), DropoutSpec(), 1.0)
    draws = [s for s in sample.segments if s.kind == "gen_image"]
    assert len({s.timestep for s in draws}) == len({s.noise_seed for s in draws}) == 3
    assert all(0 < s.timestep < 1 for s in draws)
    batch = pack([sample], LayoutSpec(vit_patch_size=8, latent_stride=16), tokenizer.special)
    assert batch.split_modes[-3:] == ("noise",) * 3 and set(batch.split_branches) == {0}
    first, *others = batch.position[-3 * 6 :].split(6)  # 2 x 2 latent patches between two markers
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dataset_class", [T2iDataset, EditDataset, StepsDataset])
@pytest.mark.parametrize("draws", [0, -1, 1.5, True, "2"])
def test_draws_has_to_be_a_positive_whole_number(tokenizer, dataset_class, draws):
    with pytest.raises(ValueError, match=f"draws must be a whole number of at least 1, not {draws!r}"):
        make(dataset_class, tokenizer, draws=draws)


@pytest.mark.parametrize("dataset_class", [VlmDataset, ReferDataset])
def test_independent_turns_share_the_picture_and_nothing_else(tokenizer, dataset_class):
    independent = sample_of(make(dataset_class, tokenizer, independent_turns=True), ROWS[dataset_class])
    together = sample_of(make(dataset_class, tokenizer), ROWS[dataset_class])
    assert plan(independent, tokenizer) == plan(together, tokenizer)
    exchanges = (len(together.segments) - 1) // 2
    branches = [0, *(k for k in range(1, exchanges + 1) for _ in ("question", "answer"))]
    assert exchanges > 1 and [s.branch for s in independent.segments] == branches
    assert [r.segment for r in independent.regions] == [r.segment for r in together.regions]


def test_llava_rows_mean_the_same(tokenizer):
    dataset = make(VlmDataset, tokenizer)
    llava = {"image": "a.png", "conversations": VQA["message"]}
    assert plan(sample_of(dataset, llava), tokenizer) == plan(sample_of(dataset, VQA), tokenizer)


def test_vqa_rows_with_objects(tokenizer):
    row = {
        "image": "wide.png",
        "message": message("<image>q0", "a0", "Where is the 7?", "<BOX>", "Segment it.", "<SEG>"),
        "objects": {
            "ref": ["the 7", "it"],
            "bbox": [[32, 16, 64, 48], None],
            "mask": [None, [[64, 0, 127, 0, 127, 63, 64, 63]]],
        },
    }
    dataset = make(VlmVer1Dataset, tokenizer, shuffle_turns=True)
    for seed in range(6):
        sample = sample_of(dataset, row, seed)
        box, mask = sorted(sample.regions, key=lambda r: r.head)
        torch.testing.assert_close(box.boxes[0], torch.tensor([0.25, 0.25, 0.5, 0.75]))
        assert (box.name, mask.name, box.image, mask.image) == ("the 7", "it", 0, 0)
        assert mask.mask.shape == sample.segments[0].pixels.shape[1:] == (16, 32)
        assert mask.mask[:, 16:].all() and not mask.mask[:, :16].any()
        assert not sample.segments[0].droppable, "a picture with regions stays"


def test_objects_that_do_not_fit_are_refused(tokenizer):
    row = {"image": "a.png", "message": message("<image>q", "<BOX>")}
    for objects, reason in [
        ({"bbox": []}, "object_count"),
        ({"bbox": [[1, 1, 5, 5]] * 2}, "object_count"),
        ({"bbox": [[1, 1, 5, 5]], "ref": []}, "bad_objects"),
        ({"bbox": [[1, 1, 5, 5]], "image": [1]}, "bad_objects"),
        ({"bbox": [[1, 1, 1, 5]]}, "bad_box"),
        ([1], "bad_objects"),
    ]:
        with pytest.raises(SkipSample) as e:
            sample_of(make(VlmDataset, tokenizer), {**row, "objects": objects})
        assert e.value.reason == reason


# ------------------------------------------------------------------------------- the published code's behaviour


def test_a_second_turn_gets_the_next_picture_or_as_published_the_first_again(tokenizer):
    row = {
        "input_img": [{"path": "a.png"}, {"path": "b.png"}],
        "message": message("<image> q0", "a0", "And <image>?", "a1"),
    }
    ours = sample_of(make(VlmVer1Dataset, tokenizer), row)
    assert plan(ours, tokenizer) == ["?und_image:1", "q0", "*a0", "And", "?und_image:2", "?", "*a1"]
    published = sample_of(make(VlmVer1Dataset, tokenizer, upstream_compat=True), row)
    assert plan(published, tokenizer) == ["?und_image:1", "q0", "*a0", "And", "?und_image:1", "?", "*a1"]
    more = {**row, "input_img": [{"path": "a.png"}], "message": message("<image> <image> q", "a")}
    published = sample_of(make(VlmVer1Dataset, tokenizer, upstream_compat=True), more)
    assert plan(published, tokenizer) == ["?und_image:1", "q", "*a"]
    with pytest.raises(SkipSample, match="2 <image>, the row has 1 input pictures"):
        sample_of(make(VlmVer1Dataset, tokenizer), more)


def test_reconstruction_asks_in_every_turn_as_published(tokenizer):
    dataset = make(ReconstructionDataset, tokenizer, request="Again.", upstream_compat=True)
    expected = ["und_image:1", "q0 Again.", "*a0", "q1Again.", "*a1", "gen_image:1"]
    assert plan(sample_of(dataset, VQA), tokenizer) == expected


@pytest.mark.parametrize("upstream_compat", [False, True])
def test_the_request_joins_the_last_words_of_a_question(tokenizer, upstream_compat):
    dataset = make(ReconstructionDataset, tokenizer, request="Again.", upstream_compat=upstream_compat)
    row = {"image": "a.png", "message": message("q <image>", "a")}
    assert plan(sample_of(dataset, row), tokenizer) == ["q Again.", "und_image:1", "*a", "gen_image:1"]


@pytest.mark.parametrize(
    "dataset_class", [VlmDataset, ReconstructionVer2Dataset, EditDataset, CounterfactualDataset]
)
def test_the_published_code_knows_no_objects(tokenizer, dataset_class):
    row = {**ROWS[dataset_class], "objects": {"bbox": [[1, 1, 5, 5]]}}
    with pytest.raises(SkipSample, match="a group that has them cannot be upstream_compat"):
        sample_of(make(dataset_class, tokenizer, upstream_compat=True), row)


@pytest.mark.parametrize("request_", [" ", None, 3])
def test_a_request_is_words(tokenizer, request_):
    with pytest.raises(ValueError, match=f"request must be words that ask for the drawing, not {request_!r}"):
        make(ReconstructionDataset, tokenizer, request=request_)


def test_reconstruction_without_pictures_is_a_conversation(tokenizer):
    row = {"message": message("q", "a")}
    assert plan(sample_of(make(ReconstructionVer2Dataset, tokenizer), row), tokenizer) == ["q", "*a"]


@pytest.mark.parametrize(
    ("dataset_class", "expected"),
    [
        (EditDataset, ["<image>\nPaint it.", "*Done. <image>", "gen_image:2"]),
        (CounterfactualDataset, ["Paint it.", "gen_image:2", "*Done. <image>"]),
    ],
)
def test_edits_as_published_keep_the_letters(tokenizer, dataset_class, expected):
    dataset = make(dataset_class, tokenizer, upstream_compat=True)
    assert plan(sample_of(dataset, EDIT), tokenizer) == ["cond_image:1", "und_image:1", *expected]
    several = {
        "input_img": [{"path": "a.png"}, {"path": "b.png"}],
        "output_img": [{"path": "b.png"}, {"path": "a.png"}],
        "message": message("first", "one", "<image>\nPaint it.", "Done. <image>"),
    }
    assert plan(sample_of(dataset, several), tokenizer) == ["cond_image:1", "und_image:1", *expected]
    with pytest.raises(SkipSample, match="no instruction"):
        sample_of(dataset, {**EDIT, "message": message("", "Done.")})


def test_a_counterfactual_is_drawn_before_it_is_explained(tokenizer):
    row = {**EDIT, "message": message("What if?", "Clear. <image> No shadow.")}
    ours = sample_of(make(CounterfactualDataset, tokenizer), row)
    expected = ["cond_image:1", "und_image:1", "What if?", "gen_image:2", "*Clear.   No shadow."]
    assert plan(ours, tokenizer) == expected


@pytest.mark.parametrize(
    "dataset_class", [VlmVer1Dataset, EditDataset, T2iMessageDataset, ReconstructionDataset]
)
def test_large_pictures_are_rejected_only_as_published(tokenizer, dataset_class):
    files = {name: png(4096, 16) for name in ("a.png", "b.png")}
    row = record(ROWS[dataset_class], files)
    make(dataset_class, tokenizer).to_sample(row, np.random.default_rng(0))
    with pytest.raises(SkipSample, match="4096x16 px") as e:
        make(dataset_class, tokenizer, upstream_compat=True).to_sample(row, np.random.default_rng(0))
    assert e.value.reason == "too_large"


def test_bagels_own_classes_take_large_pictures(tokenizer):
    row = record(VQA, {"a.png": png(4096, 16)})
    make(VlmDataset, tokenizer, upstream_compat=True).to_sample(row, np.random.default_rng(0))


def test_a_picture_without_a_caption_is_rejected_or_as_published_drawn_from_a_blank(tokenizer):
    row = {"image": "a.png", "captions": "{}"}
    with pytest.raises(SkipSample) as e:
        sample_of(make(ParquetT2iDataset, tokenizer), row)
    assert e.value.reason == "no_caption"
    published = sample_of(make(ParquetT2iDataset, tokenizer, upstream_compat=True), row)
    assert plan(published, tokenizer) == ["? ", "gen_image:1"]


# --------------------------------------------------------------------------------------------------- parquet


def test_one_caption_is_drawn_from_the_dict(tokenizer):
    row = {**PARQUET, "captions": json.dumps({"short": "7", "long": "a red 7", "empty": ""})}
    dataset = make(ParquetT2iDataset, tokenizer)
    assert {plan(sample_of(dataset, row, seed), tokenizer)[0] for seed in range(20)} == {"?7", "?a red 7"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"captions": "a red 7"}, "no_caption"),
        ({"captions": '{"a": 3}'}, "no_caption"),
        ({"image": None}, "missing_image"),
        ({"image": 3}, "missing_image"),
        ({"image": "gone.png"}, "missing_image"),
    ],
)
def test_bad_parquet_rows_are_refused(tokenizer, changes, reason):
    with pytest.raises(SkipSample) as e:
        sample_of(make(ParquetT2iDataset, tokenizer), {**PARQUET, **changes})
    assert e.value.reason == reason


FOUR = {
    "image_list": [f"image_list/{i}" for i in range(4)],
    "instruction_list": [["a", "A"], ["b."], ["c"]],
}


def steps_plans(tokenizer, row, **options) -> set[tuple[str, ...]]:
    dataset = make(StepsDataset, tokenizer, **options)
    return {tuple(plan(sample_of(dataset, row, seed), tokenizer)) for seed in range(200)}


def shown(k: int) -> tuple[str, str]:
    return f"?cond_image:{10 + k}", f"?und_image:{10 + k}"


def test_steps_go_over_one_or_two_instructions(tokenizer):
    texts = [("a", "A"), ("b.",), ("c",)]
    one = {(*shown(k), f"?{text}", f"gen_image:{11 + k}") for k in range(3) for text in texts[k]}
    chain, at_once = set(), set()
    for k in range(2):
        for first in texts[k]:
            for second in texts[k + 1]:
                last = f"gen_image:{12 + k}"
                chain.add((*shown(k), f"?{first}", f"gen_image:{11 + k}", *shown(k + 1), f"?{second}", last))
                joined = f"?{first.rstrip('.')}. {second.rstrip('.')}."
                at_once.add((*shown(k), joined, last))
    assert steps_plans(tokenizer, FOUR) == one | chain | at_once
    published = steps_plans(tokenizer, FOUR, upstream_compat=True)
    # Two at once that would end at the last picture stop one short of it; "b." gets another full stop.
    at_once = {(*shown(0), f"?{x}. b..", "gen_image:12") for x in "aA"}
    at_once.add((*shown(1), "?b..", "gen_image:12"))
    assert published == one | chain | at_once


def test_the_first_drawing_of_a_chain_is_not_seen_as_noise_later(tokenizer):
    dataset = make(StepsDataset, tokenizer)
    samples = (sample_of(dataset, FOUR, seed) for seed in range(50))
    sample = next(s for s in samples if len(s.segments) == 8)
    batch = pack([sample], LayoutSpec(vit_patch_size=8, latent_stride=16), tokenizer.special)
    expected = ("full", "full", "causal", "noise", "full", "full", "causal", "noise")
    assert batch.split_modes == expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image_list": ["image_list/0"]}, "image_count"),
        ({"instruction_list": [["a"]]}, "image_count"),
        ({"instruction_list": []}, "no_instruction"),
        ({"instruction_list": [["a"], [], ["c"]]}, "no_instruction"),
        ({"instruction_list": [["a"], [" "], ["c"]]}, "no_instruction"),
        ({"image_list": [3, 4]}, "bad_image_list"),
    ],
)
def test_bad_steps_are_refused(tokenizer, changes, reason):
    with pytest.raises(SkipSample) as e:
        sample_of(make(StepsDataset, tokenizer), {**FOUR, **changes})
    assert e.value.reason == reason


def test_captions_come_from_any_of_the_usual_members(tokenizer):
    dataset = make(T2iDataset, tokenizer)
    captions = [{"txt": "x"}, {"json": {"captions": ["x", "x"]}}, {"json": {"captions": {"long": "x"}}}]
    assert {plan(sample_of(dataset, data), tokenizer)[0] for data in captions} == {"?x"}
    jpg = record(T2I, {"jpg": FILES["png"]})
    assert plan(dataset.to_sample(jpg, np.random.default_rng(0)), tokenizer) == ["?a red 7", "gen_image:3"]
    for data, files, reason in [
        ({"json": {}}, FILES, "no_caption"),
        ({"json": {"caption": 3}}, FILES, "no_caption"),
        ({"json": ["x"]}, FILES, "no_caption"),
        (T2I, {}, "missing_image"),
        (T2I, {"png": b"\x89PNG"}, "bad_image"),
    ]:
        with pytest.raises(SkipSample) as e:
            dataset.to_sample(record(data, files), np.random.default_rng(0))
        assert e.value.reason == reason


def test_referring_turns_carry_their_regions(tokenizer):
    dataset = make(ReferDataset, tokenizer)
    orders, names = set(), set()
    for seed in range(20):
        sample = sample_of(dataset, REFER, seed)
        texts = plan(sample, tokenizer)
        assert texts[0] == "und_image:1" and len(texts) == 9 and len(sample.regions) == 4
        for region in sample.regions:
            question, answer = texts[region.segment - 1], texts[region.segment]
            asked = {"box": f"Where is {region.name}?", "mask": f"Segment {region.name}."}
            assert (
                question == asked[region.head] and answer == {"box": "*<BOX>", "mask": "*<SEG>"}[region.head]
            )
            assert sample.segments[region.image].kind == "und_image"
        orders.add(tuple(texts))
        names |= {r.name for r in sample.regions}
    assert len(orders) > 5 and names == {"the red 7", "the blue 7", "the big 7"}


def test_referring_geometry(tokenizer):
    only_box = make(ReferDataset, tokenizer, mask_templates=[])
    assert (only_box.heads, make(ReferDataset, tokenizer).heads) == (("box",), ("box", "mask"))
    (region,) = sample_of(only_box, coco(annotation())).regions
    torch.testing.assert_close(region.boxes[0], torch.tensor([16, 8, 18, 40]) / 64)
    only_mask = make(ReferDataset, tokenizer, box_templates=[], mask_templates=["Cut out {ref}."])
    (region,) = sample_of(only_mask, coco(annotation(segmentation=[[0, 0, 31, 0, 31, 63, 0, 63]]))).regions
    assert region.mask.shape == (32, 32) and region.mask[:, :16].all() and not region.mask[:, 16:].any()


def test_max_turns_bounds_the_questions(tokenizer):
    sample = sample_of(make(ReferDataset, tokenizer, max_turns=3), REFER)
    assert len(sample.regions) == 3 and len(sample.segments) == 7


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bbox": [1, 1, 0, 5]}, "bad_box"),
        ({"bbox": [1, 1]}, "bad_box"),
        ({"bbox": None}, "bad_box"),
        ({"segmentation": {"size": [64, 63], "counts": [0, 64 * 63]}}, "mask_size"),
        ({"segmentation": None}, "bad_mask"),
        ({"category_id": 8}, "unknown_category"),
        ({"expressions": []}, "no_expression"),
        ({"expressions": None}, "no_expression"),
    ],
)
def test_a_bad_annotation_is_named_whatever_is_drawn(tokenizer, changes, reason):
    dataset = make(ReferDataset, tokenizer, max_turns=1)
    for seed in range(5):
        with pytest.raises(SkipSample, match="annotation 9") as e:
            sample_of(dataset, coco(annotation(), annotation(id=9, **changes)), seed)
        assert e.value.reason == reason


def test_referring_rows_ask_for_what_they_have(tokenizer):
    mask = {"size": [64, 64], "counts": [0, 64 * 32, 64 * 32]}
    both = sample_of(make(ReferRowDataset, tokenizer), {**THING, "mask": mask})
    assert {r.head for r in both.regions} == {"box", "mask"} and len(both.segments) == 5
    (region,) = sample_of(
        make(ReferRowDataset, tokenizer, mask_templates=[]), {**THING, "mask": mask}
    ).regions
    torch.testing.assert_close(region.boxes[0], torch.tensor([0.25, 0.125, 0.75, 0.625]))
    (region,) = sample_of(
        make(ReferRowDataset, tokenizer, bbox_format="xywh"), {**THING, "bbox": [16, 8, 32, 32]}
    ).regions
    torch.testing.assert_close(region.boxes[0], torch.tensor([0.25, 0.125, 0.75, 0.625]))
    for changes, reason in [
        ({"bbox": None}, "no_target"),
        ({"bbox": [1, 2]}, "bad_box"),
        ({"bbox": [16, 8, 10, 40]}, "bad_box"),
        ({"expression": []}, "no_expression"),
        ({"img_path": None}, "bad_image_list"),
    ]:
        with pytest.raises(SkipSample) as e:
            sample_of(make(ReferRowDataset, tokenizer), {**THING, **changes})
        assert e.value.reason == reason
    with pytest.raises(ValueError, match="bbox_format must be xyxy or xywh, not 'xy'"):
        make(ReferRowDataset, tokenizer, bbox_format="xy")


def test_shapes_of_reasonseg_are_painted_from_large_to_small(tokenizer):
    shapes = [
        {"label": "Ignore part", "points": [[8, 8], [15, 8], [15, 15], [8, 15]]},
        {"label": "target", "points": SQUARE},
        {"label": "flag", "points": [[0, 0], [63, 0], [63, 63], [0, 63]]},
    ]
    row = {**REASON, "shapes": shapes, "is_sentence": False, "text": "the thing"}
    sample = sample_of(make(ReasonSegDataset, tokenizer), row)
    assert plan(sample, tokenizer) == ["und_image:1", "Segment the thing.", "*<SEG>"]
    mask = sample.regions[0].mask  # of 32x32 px, half the picture's size
    assert mask[:16, :16].sum() == 16 * 16 - 4 * 4 and mask.sum() == mask[:16, :16].sum()
    for broken, reason in [
        ([{"label": "target", "points": [[1, 2]]}], "bad_mask"),
        ([{"label": "target", "points": 5}], "bad_mask"),
        ([shapes[2]], "empty_mask"),
        ([{"label": "target", "points": [["x", 1], [2, 2], [3, 3]]}], "bad_mask"),
    ]:
        with pytest.raises(SkipSample) as e:
            sample_of(make(ReasonSegDataset, tokenizer), {**row, "shapes": broken})
        assert e.value.reason == reason
    with pytest.raises(ValueError, match="ReasonSeg has masks only"):
        make(ReasonSegDataset, tokenizer, box_templates=["Where is {ref}?"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"box_templates": ["Where?"]}, "does not contain {ref}"),
        ({"box_templates": [], "mask_templates": []}, "nothing would be asked"),
        ({"box_templates": "Where is {ref}?"}, "must be a list"),
        ({"max_turns": -1}, "max_turns"),
    ],
)
def test_bad_options_are_named(tokenizer, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(ReferDataset, tokenizer, **options)
    if "max_turns" in options:
        with pytest.raises(ValueError, match=re.escape(message)):
            make(VlmDataset, tokenizer, **options)


def test_the_quickstart_mixture_names_known_classes_and_keys(monkeypatch):
    monkeypatch.setenv("WEFT_DATA", "/elsewhere")
    groups = {g.name: g for g in load_mixture(ROOT / "configs" / "quickstart.yaml")}
    assert set(groups) == {"vqa", "refer", "t2i", "edit", "text"}
    assert sum(g.weight for g in groups.values()) == pytest.approx(1.0)
    assert all(
        str(v).startswith("/elsewhere")
        for g in groups.values()
        for s in g.sources
        for v in s.location.values()
    )


class CountDataset(TaskDataset):
    """A seventh task as CONTRIBUTING describes it: one class, one row."""

    source_format: ClassVar[str] = "jsonl"

    def to_sample(self, record: Record, rng: np.random.Generator) -> Sample:
        sample = make(TextDataset, self.tokenizer).to_sample(record, rng)
        return replace(sample, task="count")


def test_a_seventh_task_is_one_class_and_one_row(tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(TEXT) + "\n")
    (tmp_path / "mixture.yaml").write_text(
        "dataset_info: {count: {mine: {jsonl_path: rows.jsonl}}}\ncount: {dataset_names: [mine]}\n"
    )
    (group,) = load_mixture(tmp_path / "mixture.yaml", {**DATASET_REGISTRY, "count": CountDataset})
    assert group.dataset_class is CountDataset
    assert sample_of(make(CountDataset, tokenizer), TEXT).task == "count"


def test_the_core_needs_no_optional_package():
    code = "import sys, data.dataset_info; print([m for m in ('torchvision', 'pycocotools', 'scipy') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
