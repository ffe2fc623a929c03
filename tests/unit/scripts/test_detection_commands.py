"""Commands on files of detection rows: conversion, pool, split, validation, results."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.detection_tools import choose_pool, read_lines, split_rows, traits, write_rows
from data.detections import Scene, Thing, read_detection
from data.vendor_json import Conversion, Report, convert, read_hierarchy, smart_size
from scripts.detection import classes, make_pool, split, validate, validate_results
from scripts.detection import convert as convert_command


def scene(name: str, *labels: str, size: int = 90) -> Scene:
    things = tuple(
        Thing(box=(i, i, i + size // 10, i + size // 10), label=label) for i, label in enumerate(labels)
    )
    return Scene(pictures=(name,), things=things, size=(size, size), name=name)


def row(name: str, *labels: str, **rest: Any) -> dict[str, Any]:
    objects = [{"bbox_2d": [i, 0, i + 5, 9], "label": label} for i, label in enumerate(labels)]
    return {"images": [name], "objects": objects, "width": 64, "height": 64, **rest}


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((70, 70), (56, 56)),  # 2.5 cells: to the even number
        ((2000, 10), (812, 28)),
        ((1000, 800), (700, 560)),
        ((28, 28), (56, 56)),
        ((420, 896), (420, 896)),
    ],
)
def test_smart_size_is_the_processors(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert smart_size(*size, 28, 3136, 401408) == expected
    assert smart_size(*expected, 28, 3136, 401408) == expected, "a size it gives stays"


def test_a_picture_too_thin() -> None:
    with pytest.raises(ValueError, match="more than 200 times"):
        smart_size(4000, 10, 28, 3136, 401408)


def test_traits_and_pool() -> None:
    one = traits(scene("a", "x/y/z", "x/w"))
    assert one.labels == {"x", "x/y", "x/y/z", "x/w"} and (one.density, one.place, one.area) == (
        "sparse",
        "0,0",
        "small",
    )
    scenes = [scene("c", "a"), scene("b", "a"), scene("a", "a", "b"), scene("d", "c"), scene("e")]
    chosen, report = choose_pool(scenes, 3, 0)
    assert chosen[:2] == [2, 3] and report["labels_missing"] == [], (
        "most labels first, then the one that is left"
    )
    assert choose_pool(scenes, 3, 0)[0] == chosen
    with pytest.raises(ValueError, match="has no width and height"):
        traits(Scene(pictures=("a",), things=()))


def test_split_keeps_groups_and_rare_labels() -> None:
    rows = [{"g": i // 3, "labels": ["rare"] if i in (4, 25) else ["often"]} for i in range(30)]
    train, val = split_rows(rows, 0.2, 0, lambda r: str(r["g"]), lambda r: r["labels"])
    assert len(val) == 6 and not {r["g"] for r in train} & {r["g"] for r in val}
    assert all(any("rare" in r["labels"] for r in part) for part in (train, val))
    assert (train, val) == split_rows(rows, 0.2, 0, lambda r: str(r["g"]), lambda r: r["labels"])
    assert len(split_rows(rows, 0.01, 0)[1]) == 1
    with pytest.raises(ValueError, match="all would be for validation"):
        split_rows(rows[:1], 0.1, 0)


def annotated(tmp_path: Path) -> Path:
    """Two annotation files: a photograph that lies on its side, and one of the other form."""
    raw = tmp_path / "raw"
    (raw / "site").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 120), "red").save(raw / "site" / "a.jpeg", exif=exif)
    entry = {
        "coordinates": [[80, 50], [10, 5]],
        "properties": {"contentZh": {"标签": "螺丝/正确/多", "备注": "远"}},
    }
    tiny = {**entry, "coordinates": [[0, 0], [0.2, 0.2]]}
    content = {"info": {"width": 120, "height": 60}, "dataList": [entry, tiny]}
    (raw / "site" / "a.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    Image.new("RGB", (112, 56)).save(raw / "b.png")
    polygon = {"type": "Polygon", "coordinates": [[[1, 2], [31, 2], [31, 42], [1, 42]]]}
    features = [
        {"geometry": polygon, "properties": {"contentZh": {"标签": name}}}
        for name in ("柜/开", "柜/关", "门")
    ]
    content = {"info": {"width": 112, "height": 56}, "markResult": {"features": features}}
    (raw / "b.json").write_text(json.dumps(content), encoding="utf-8")
    (raw / "c.json").write_text("{}", encoding="utf-8")
    return raw


def test_convert(tmp_path: Path) -> None:
    raw = annotated(tmp_path)
    (tmp_path / "h.json").write_text(
        '[{"object_type": "螺丝", "property": ["正确"]}, {"object_type": "柜", "property": ["开"]}]'
    )
    how = Conversion(
        levels=("property", "object_type"),
        hierarchy=read_hierarchy(tmp_path / "h.json"),
        resize=(28, 3136, 401408),
    )
    report = Report()
    cabinet, screw = convert(raw, tmp_path / "images", how, report)
    assert (screw["width"], screw["height"]) == (112, 56)
    assert (screw["orig_width"], screw["orig_height"]) == (120, 60)
    # In the order of the levels, whatever they were asked for in; x by 112/120, y by 56/60.
    assert screw["objects"] == [{"bbox_2d": [9, 5, 75, 47], "label": "螺丝/正确"}]
    assert cabinet["objects"] == [{"bbox_2d": [1, 2, 31, 42], "label": "柜/开"}]
    assert report.dropped == {
        "box too small after the resize": 1,
        "property 关 is not one of 柜": 1,
        "unknown object type 门": 1,
    }
    assert len(report.errors) == 1 and "c.json: no picture beside it" in report.errors[0]
    with Image.open(tmp_path / "images" / "site" / "a.jpeg") as image:
        assert image.size == (112, 56) and not image.getexif()
    assert read_detection(screw).student.size == (112, 56)


def test_convert_command(tmp_path: Path) -> None:
    raw = annotated(tmp_path)
    command = [
        "--input_dir",
        str(raw),
        "--output_dir",
        str(tmp_path / "o"),
        "--output_image_dir",
        str(tmp_path / "o"),
    ]
    assert convert_command.main([*command, "--max_teachers", "0"]) == 0
    counts = {
        n: len((tmp_path / "o" / f"{n}.jsonl").read_text().splitlines())
        for n in ("train", "val", "all_samples")
    }
    assert counts == {"train": 1, "val": 1, "all_samples": 2}
    report = json.loads((tmp_path / "o" / "report.json").read_text(encoding="utf-8"))
    assert report["objects"] == 4 and report["errors"]
    assert validate.main([str(tmp_path / "o" / "all_samples.jsonl"), "--check-images"]) == 0
    assert convert_command.main([*command, "--response_types", "colour"]) == 1


def test_english_labels_go_through_the_table() -> None:
    from data.vendor_json import _label

    report = Report()
    how = Conversion(language="english", tokens={"scr": "screw", "ok": "correct"})
    properties = {"label": "scr", "question": ["ok", "odd"], "question_ex": ""}
    assert _label(properties, how, report) == "screw/correct, odd"
    assert report.missing_tokens == {"odd"}


def test_validate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, pool = tmp_path / "train.jsonl", tmp_path / "pool.jsonl"
    bad = row("b.png", "x", id="seven")
    bad["objects"][0]["bbox_2d"] = [131, 0, 120, 5]
    write_rows(
        file, [row("a.png", "x", "y"), bad, {**row("c.png"), "objects": row("c.png", "x")["objects"] * 2}]
    )
    write_rows(pool, [row("a.png", "x")])
    assert validate.main([str(file), "--pool", str(pool), "--max_objects", "1"]) == 1
    told = capsys.readouterr().out
    assert f"{file}:2 id=seven: objects[0].bbox_2d: x2 (120) must be greater than x1 (131)" in told
    assert "line 1: a.png is in the pool of teachers too" in told and "warning: line 3: the same box" in told
    assert "line 1: 2 objects, --max_objects is 1" in told and "1 of 3 rows are valid" in told
    assert validate.main([str(pool), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["valid"] == 1
    assert validate.main([str(pool), "--check-images"]) == 1
    assert "a.png is missing; give --image_root" in capsys.readouterr().out
    assert validate.main([str(tmp_path / "gone.jsonl")]) == 1


def test_pool_and_split_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(f"{i}.png", "ab"[i % 2], meta={"site": i // 2}) for i in range(8)]
    write_rows(tmp_path / "all.jsonl", [{"teachers": [], "student": rows[0]}, *rows[1:]])
    pool, rest = tmp_path / "pool.jsonl", tmp_path / "rest.jsonl"
    arguments = [
        str(tmp_path / "all.jsonl"),
        "--output",
        str(pool),
        "--rest",
        str(rest),
        "--max_teachers",
        "3",
    ]
    assert make_pool.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["teachers"] == 3
    assert [len(read_lines(p)) for p in (pool, rest)] == [3, 5]
    train, val = tmp_path / "t.jsonl", tmp_path / "v.jsonl"
    write_rows(tmp_path / "flat.jsonl", rows)
    command = [str(tmp_path / "flat.jsonl"), "--train", str(train), "--val", str(val), "--val_ratio", "0.25"]
    assert split.main([*command, "--group_key", "site", "--stratify"]) == 0
    sites = [{json.loads(line)["meta"]["site"] for line in p.read_text().splitlines()} for p in (train, val)]
    assert not sites[0] & sites[1] and len(sites[1]) == 1
    assert split.main([*command, "--group_key", "town"]) == 1


def test_validate_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.jsonl"
    good = {
        "pred_result": "[]",
        "predictions": [{"label": "x"}],
        "truncated": True,
        "parse_status": "recovered_truncated",
    }
    write_rows(
        file, [good, {"pred_result": "", "error": "broken"}, {"pred_result": "", "parse_status": "failed"}]
    )
    assert validate_results.main([str(file), "--count-only"]) == 0
    assert capsys.readouterr().out == "3:1:2\n"
    (tmp_path / "labels.txt").write_text("y\n")
    assert validate_results.main([str(file), "--labels", str(tmp_path / "labels.txt")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "answers not understood 1" in told and "answers cut off 1" in told and "not known 1" in told
    write_rows(file, [{"error": "x"}])
    assert validate_results.main([str(file)]) == 1
    assert validate_results.main([str(tmp_path / "gone")]) == 1


def test_classes(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.path.read_bytes())
    (tmp_path / "bagel_config.json").write_text('{"heads": {"detr": {"width": 32}}}')
    (tmp_path / "labels.txt").write_text("ab\n螺丝\n", encoding="utf-8")
    command = ["--model_path", str(tmp_path), "--labels", str(tmp_path / "labels.txt")]
    assert classes.main(command) == 0
    head = json.loads((tmp_path / "bagel_config.json").read_text())["heads"]["detr"]
    assert head["caption"] == "classes" and head["width"] == 32
    assert [tokenizer.decode(ids) for ids in head["class_ids"]] == ["ab", "螺丝"]
    (tmp_path / "bagel_config.json").write_text('{"heads": {}}')
    assert classes.main(command) == 1
