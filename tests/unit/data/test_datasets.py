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
from data.interleave_datasets.edit import CounterfactualDataset, EditDataset
from data.interleave_datasets.steps import StepsDataset
from data.layout import LayoutSpec
from data.mixture import load_mixture
from data.packing import pack
from data.perception_dataset import ReferDataset
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
}


@pytest.mark.parametrize(
    ("dataset_class", "options", "expected"),
    [
        (VlmDataset, {}, ["und_image:1", "q0", "*a0", "q1", "*a1"]),
        (VlmVer1Dataset, {}, ["?und_image:1", "q0", "*a0", "q1", "*a1"]),
        (VlmVer1Dataset, {"drop_image": False}, ["und_image:1", "q0", "*a0", "q1", "*a1"]),
        (EditDataset, {}, ["cond_image:1", "und_image:1", "Paint it.", "*Done.", "gen_image:2"]),
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
    assert dataset_class.source_format in ("jsonl", "tar", "coco", "parquet") and dataset_class.__doc__
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


def test_the_prompt_of_an_edit_is_the_beginning_of_its_sample(tokenizer):
    sample = sample_of(make(EditDataset, tokenizer), EDIT)
    picture = Image.open(io.BytesIO(FILES["a.png"]))
    pair = (image_segment("cond_image", picture, VAE), image_segment("und_image", picture, VIT))
    prompt = prompt_segments("Paint it.", tokenizer, [pair])
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


@pytest.mark.parametrize("dataset_class", [T2iDataset, EditDataset])
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
        torch.testing.assert_close(box.box, torch.tensor([0.25, 0.25, 0.5, 0.75]))
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
    (region,) = sample_of(only_box, coco(annotation())).regions
    torch.testing.assert_close(region.box, torch.tensor([16, 8, 18, 40]) / 64)
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
