"""Detection rows: what they may look like, how a bad one is refused, what sample they become, who teaches."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from data.dataset_base import Record, SkipSample, check_sample
from data.detection_dataset import DetectionCocoDataset, DetectionDataset
from data.detections import PROMPTS, answer_text, read_detection, reading_order, written_box
from data.layout import LayoutSpec
from data.packing import pack
from data.prediction import _OutlineDataset
from data.scan import outline
from data.teachers import STRATEGIES, TeacherPool
from data.tokens import Tokenizer
from data.transforms import ImageTransform

VIT = ImageTransform(max_image_size=32, min_image_size=32, stride=8)
SPEC = LayoutSpec(vit_patch_size=8, vit_positions_per_side=8, latent_stride=16, latent_positions_per_side=4)


def png(width: int = 64, height: int = 64) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


FILES = {f"{i}.png": png() for i in range(6)} | {"wide.png": png(128, 64)}


def scene(name: str, *labels: str, **rest: Any) -> dict[str, Any]:
    objects = [{"bbox_2d": [8 * i, 8, 8 * i + 8, 24], "label": label} for i, label in enumerate(labels)]
    return {"images": [name], "objects": objects, **rest}


def make(tokenizer: Tokenizer, **options: Any) -> DetectionDataset:
    return DetectionDataset(tokenizer=tokenizer, vit_transform=VIT, **options)


def sample_of(dataset: DetectionDataset, row: Any, seed: int = 0):
    record = Record(data=row, where="train.jsonl:37", fetch=FILES.__getitem__)
    return dataset.to_sample(record, np.random.default_rng(seed))


def said(sample, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(s.ids) if s.kind == "text" else "(picture)" for s in sample.segments]


def test_three_shapes_say_the_same() -> None:
    a, b = scene("0.png", "nut"), scene("1.png", "螺丝", id=7)
    rows = [
        read_detection(row) for row in ({"teachers": [a], "student": b}, {"examples": [a], "target": b}, b)
    ]
    assert rows[0] == rows[1] and rows[0].student == rows[2].student and not rows[2].teachers
    assert rows[0].student.name == "7" and rows[0].teachers[0].labels == {"nut"}
    alias = {"images": ["0.png"], "objects": [{"bbox": [0, 8, 8, 24], "description": " nut "}]}
    assert read_detection(alias).student == read_detection(a).student


BAD = [
    (3, "bad_row", "the row is 3, not an object"),
    ({"a": 1}, "bad_row", "the row has the keys a; it must be {teachers, student}"),
    ({"teachers": {}, "student": scene("0.png")}, "bad_row", "teachers: is {}; it must be a list"),
    ({"teachers": [], "student": 5}, "bad_row", "student: is 5; it must be"),
    ({"images": [], "objects": []}, "bad_image_list", r"images: is \[\]"),
    ({"images": ["0.png"]}, "bad_objects", r"objects: is None; it must be a list"),
    (
        {"examples": [{"images": ["0.png"], "objects": [4]}], "target": scene("1.png")},
        "bad_objects",
        r"examples\[0\].objects\[0\]: is 4",
    ),
    (scene("0.png", ""), "no_label", r"objects\[0\].label: is ''"),
    (scene("0.png", "a", width=64), "bad_size", "height: is None"),
    (scene("0.png", "a", width=32, height=64), "bad_size", "says 32x64 px, the picture has 64x64 px"),
    (scene("gone.png", "a"), "missing_image", "gone.png"),
]
BAD_BOXES = [
    ([1, 2, 3], "four numbers"), (["1", 2, 3, 4], "four numbers"), ([0, 0, float("nan"), 4], "finite"),
    ([131, 0, 120, 9], r"x2 \(120\) must be greater than x1 \(131\)"), ([0, 9, 5, 9], r"y2 \(9\) must be greater than y1 \(9\)"),
    ([-1, 0, 5, 5], r"x1 \(-1\) must not be negative"), ([0, 0, 65, 5], r"x2 \(65\) lies outside the picture of 64x64 px"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason", "message"), BAD)
def test_a_bad_row_is_refused_where_it_is_wrong(
    tokenizer: Tokenizer, row: Any, reason: str, message: str
) -> None:
    with pytest.raises(SkipSample, match=message) as e:
        sample_of(make(tokenizer), row)
    assert e.value.reason == reason


@pytest.mark.parametrize(("box", "message"), BAD_BOXES)
def test_a_bad_box_is_refused(tokenizer: Tokenizer, box: list[Any], message: str) -> None:
    row = {
        "images": ["0.png"],
        "objects": [{"bbox_2d": [0, 0, 4, 4], "label": "a"}, {"bbox_2d": box, "label": "b"}],
    }
    with pytest.raises(SkipSample, match=rf"objects\[1\].bbox_2d: .*{message}"):
        sample_of(make(tokenizer), row)


def test_a_sample_asks_shows_and_answers(tokenizer: Tokenizer) -> None:
    row = {"teachers": [scene("0.png", "a")], "student": scene("wide.png", "b", "c")}
    sample = sample_of(make(tokenizer, system_prompt="Look.", language="chinese"), row)
    # The answer is in pixels of what the model sees.
    assert said(sample, tokenizer) == [
        "Look.", PROMPTS["chinese"], "(picture)", '[{"bbox_2d":[0,4,4,12],"label":"a"}]',
        PROMPTS["chinese"], "(picture)",
        '[{"bbox_2d":[0,2,2,6],"label":"b"},{"bbox_2d":[2,2,4,6],"label":"c"}]',
    ]  # fmt: skip
    (region,) = sample.regions
    assert (region.head, region.segment, region.image) == ("detr", 5, 5)
    torch.testing.assert_close(region.boxes[1], torch.tensor([8 / 128, 8 / 64, 16 / 128, 24 / 64]))
    assert [tokenizer.decode(p) for p in region.phrases] == ["b", "c"]
    assert all(int(p[-1]) == tokenizer.special.end for p in region.phrases)
    batch = pack([sample], SPEC, tokenizer.special)
    assert batch.regions["detr"].num_boxes.tolist() == [2]
    # Every answer and its end, by who gives it.
    counts = [int((batch.label_role == role).sum()) for role in range(3)]
    answers = [len(s.ids) + 1 for s in sample.segments if s.supervised]
    assert counts == [0, *answers]


def test_order_and_coordinates_of_the_answer() -> None:
    boxes = [[0.5, 0.2, 1.0, 0.4], [0.1, 0.2, 0.3, 0.4], [0.0, 0.1234, 0.1, 0.2]]
    assert reading_order(boxes, ["x", "y", "z"]) == [2, 1, 0]
    assert written_box(boxes[2], (200, 100), "pixels") == [0, 12, 20, 20]
    assert written_box(boxes[2], (200, 100), "thousandths") == [0, 123, 100, 200]
    assert written_box(boxes[2], (200, 100), "fraction") == [0.0, 0.123, 0.1, 0.2]
    assert answer_text([[1, 2, 3, 4]], ["螺丝/连接正确"]) == '[{"bbox_2d":[1,2,3,4],"label":"螺丝/连接正确"}]'
    assert answer_text([], []) == "[]"


def test_nothing_in_the_picture_is_an_answer(tokenizer: Tokenizer) -> None:
    sample = sample_of(make(tokenizer), scene("0.png"))
    assert said(sample, tokenizer)[-1] == "[]" and sample.regions[0].boxes.shape == (0, 4)


def test_limits(tokenizer: Tokenizer) -> None:
    with pytest.raises(SkipSample, match="there are 3, max_objects is 2; raise it together with num_queries"):
        sample_of(make(tokenizer, max_objects=2), scene("0.png", "a", "b", "c"))
    with pytest.raises(SkipSample, match=r"objects\[1\].label: 'b' is none of the 1 `labels`"):
        sample_of(make(tokenizer, labels=["a"]), scene("0.png", "a", "b"))


def pool_file(tmp_path: Path, *scenes: dict[str, Any]) -> str:
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps(s, ensure_ascii=False) + "\n" for s in scenes), encoding="utf-8")
    return str(path)


POOL = [scene("0.png", "a"), scene("1.png", "b"), scene("2.png", "a", "b", "c"), scene("3.png", "c", id="x")]


def test_teachers_are_drawn_for_a_share_of_the_samples_and_change_with_the_draw(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    dataset = make(tokenizer, teacher_pool=pool_file(tmp_path, *POOL), teacher_ratio=0.5, num_teachers=2)
    taught = [len(sample_of(dataset, scene("4.png", "a"), seed).segments) for seed in range(40)]
    assert set(taught) == {3, 9} and 10 < taught.count(9) < 30
    assert len({tuple(said(sample_of(dataset, scene("4.png", "a"), s), tokenizer)) for s in range(40)}) > 4
    own = {"teachers": [scene("5.png", "z")], "student": scene("4.png", "a")}
    assert all(len(sample_of(dataset, own, seed).segments) == 6 for seed in range(5)), "the row's own stay"


def test_teachers_that_are_too_much_are_left_out(tokenizer: Tokenizer) -> None:
    row = {"teachers": [scene("0.png", "a"), scene("1.png", "b")], "student": scene("2.png", "c")}
    tokens = pack([sample_of(make(tokenizer), row)], SPEC, tokenizer.special).num_tokens
    fewer = sample_of(make(tokenizer, max_sample_tokens=tokens - 1), row)
    assert len(fewer.segments) == 6 and '"b"' in said(fewer, tokenizer)[2], "the first one goes first"
    assert len(sample_of(make(tokenizer, max_sample_tokens=tokens), row).segments) == 9
    for options in ({"over_length": "skip"}, {"max_sample_tokens": 10}):
        with pytest.raises(SkipSample, match="max_sample_tokens is") as e:
            sample_of(make(tokenizer, **{"max_sample_tokens": tokens - 1, **options}), row)
        assert e.value.reason == "too_long"


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("fixed", ["1.png", "2.png"]),
        ("round_robin", ["2.png", "3.png"]),  # line 37, three to choose from
        ("label_overlap", ["2.png", "1.png"]),
        ("label_coverage", ["2.png"]),
        ("similar_image", ["3.png", "2.png"]),
        ("hard", ["3.png", "1.png"]),
    ],
)
def test_strategies(tmp_path: Path, strategy: str, expected: list[str]) -> None:
    vectors = {f"{i}.png": np.array([1.0, i], np.float32) for i in range(5)}
    save_file(vectors, tmp_path / "features.safetensors")
    (tmp_path / "hard.json").write_text('{"x": 5, "1.png": 2, "0.png": 9}', encoding="utf-8")
    pool = TeacherPool.open(
        pool_file(tmp_path, *POOL),
        strategy,
        features=str(tmp_path / "features.safetensors") if strategy == "similar_image" else "",
        difficulty=str(tmp_path / "hard.json") if strategy == "hard" else "",
    )
    student = read_detection({**scene("0.png", "b", "a"), "images": ["0.png"]}).student
    if strategy == "similar_image":
        student = read_detection(scene("4.png", "a")).student
    chosen = pool.choose(student, 2, np.random.default_rng(0), "train.jsonl:37")
    assert [s.pictures[0] for s in chosen][: len(expected)] == expected
    assert all(s.pictures[0] not in student.pictures for s in chosen)


def test_strategies_that_need_labels_draw_at_random_without(tmp_path: Path) -> None:
    student = read_detection(scene("4.png")).student
    for strategy in ("label_overlap", "label_coverage"):
        pool = TeacherPool.open(pool_file(tmp_path, *POOL), strategy)
        drawn = {pool.choose(student, 1, np.random.default_rng(seed))[0].pictures for seed in range(20)}
        assert len(drawn) > 2
    assert len(STRATEGIES) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_ratio": 0.5}, "needs a teacher_pool"),
        ({"teacher_ratio": 2}, r"teacher_ratio must be in \[0, 1\]"),
        ({"language": "klingon"}, "language must be one of english, chinese"),
        ({"coordinates": "inches"}, "coordinates must be one of pixels, thousandths, fraction"),
        ({"teacher_pool": "no.jsonl"}, "no.jsonl: there is no such file"),
        ({"max_objects": 0}, "max_objects must be at least 1"),
        ({"writes": False, "detects": False}, "nothing would be learnt"),
    ],
)
def test_options_that_cannot_be(tokenizer: Tokenizer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tokenizer, **options)


def test_a_bad_pool_names_its_line(tmp_path: Path) -> None:
    path = pool_file(tmp_path, POOL[0], {"images": ["1.png"], "objects": [{"label": "a"}]})
    with pytest.raises(ValueError, match=r"pool.jsonl:2: objects\[0\]: has no bbox_2d"):
        TeacherPool.open(path, "random")
    with pytest.raises(ValueError, match="teacher_sampling must be one of random"):
        TeacherPool.open(path, "best")


def test_candidates_are_named_in_the_question(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"phrase_list": ["nut", "bolt"]}', encoding="utf-8")
    dataset = make(tokenizer, candidates_file=str(tmp_path / "c.json"))
    assert said(sample_of(dataset, scene("0.png")), tokenizer)[0].endswith("\nLabels: nut, bolt")


def test_coco(tokenizer: Tokenizer) -> None:
    dataset = DetectionCocoDataset(tokenizer=tokenizer, vit_transform=VIT)
    row = {
        "image": {"file_name": "0.png"},
        "annotations": [
            {"bbox": [16, 8, 8, 16], "category_id": 1},
            {"bbox": [0, 0, 64, 64], "category_id": 1, "iscrowd": 1},
        ],
        "categories": {1: {"id": 1, "name": "nut"}},
    }
    sample = sample_of(dataset, row)
    assert said(sample, tokenizer)[-1] == '[{"bbox_2d":[8,4,12,12],"label":"nut"}]'
    row["annotations"][0]["category_id"] = 9
    with pytest.raises(SkipSample, match=r"annotations\[0\].category_id: 9 is no category"):
        sample_of(dataset, row)


def test_a_picture_that_is_mirrored_takes_region_and_answer_along(tokenizer: Tokenizer) -> None:
    row = {"images": ["0.png"], "objects": [{"bbox_2d": [0, 8, 16, 24], "label": "a"}]}
    dataset = make(tokenizer, augment={"flip": 1.0})
    record = Record(data=row, where="train.jsonl:1", fetch=FILES.__getitem__)
    made = dataset.sample(record, np.random.default_rng(0))
    assert said(made, tokenizer)[-1] == '[{"bbox_2d":[24,4,32,12],"label":"a"}]'
    torch.testing.assert_close(made.regions[0].boxes, torch.tensor([[0.75, 0.125, 1.0, 0.375]]))


def test_packs_of_regions_alone_are_predicted(tokenizer: Tokenizer) -> None:
    sample = sample_of(make(tokenizer, writes=False), scene("0.png", "a"))
    dataset = _OutlineDataset(tokenizer=tokenizer)
    record = Record(data={"outline": outline(sample)}, where="record 1", fetch=FILES.__getitem__)
    stand_in = dataset.to_sample(record, np.random.default_rng(0))
    check_sample(stand_in)
    assert [s.kind for s in stand_in.segments] == ["text", "und_image"] and not sample.segments[0].supervised
