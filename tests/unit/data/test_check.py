"""The check before a run: clean on the quickstart's mixture; on a broken copy every planted fault is found, with its place."""

import argparse
import ast
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

pytest.importorskip("sklearn", reason="the extra `demo` is not installed")
pytest.importorskip("skimage", reason="the extra `demo` is not installed")

from data import checks
from data.check import TRAINER_LIMITS, main
from data.check_groups import equal_pairs
from data.check_report import near_paths
from data.inspect import add_plan_flags, build_plan
from data.layout import num_tokens
from data.scan import content_of
from data.stream import LaneStream
from data.types import LaneCursor
from scripts.data import make_quickstart, make_quickstart_model
from tests.unit.html_page import Page
from train.args import DataArgs

ROOT = Path(__file__).parents[3]
LIMITS = ["--expected_num_tokens", "2900", "--max_num_tokens", "3200", "--max_num_tokens_per_sample", "1000"]
LANES = 8

Json = dict[str, Any]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Path:
    """A small copy of the quickstart: `data/`, `model/`, `mixture.yaml` and, of the validation data, `val.yaml`."""
    root = tmp_path_factory.mktemp("check")
    sizes = {"train": 36, "val": 9, "test": 1}
    make_quickstart.make(root / "data", sizes=sizes, seed=3, workers=1)
    make_quickstart_model.make(root / "data", root / "model", max_merges=100)
    text = (ROOT / "configs/quickstart.yaml").read_text()
    text = re.sub(r"\$\{WEFT_DATA:[^}]*\}", "data", text)
    # Conditions may be left out, so that the page has to show it.
    text = re.sub(r"( +type: edit_jsonl\n)", r"\1  drop_condition: true\n", text)
    (root / "mixture.yaml").write_text(text)
    (root / "val.yaml").write_text(text.replace("_train", "_val"))
    return root


def flags_of(root: Path) -> list[str]:
    files = ["--dataset_config_file", str(root / "mixture.yaml"), "--model_path", str(root / "model")]
    return [*files, *LIMITS, "--num_lanes", str(LANES)]


def quietly(root: Path, *flags: str) -> tuple[int, Json]:
    """Exit code and JSON of the command, all records looked at in this process."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        code = main([*flags_of(root), "--scan", "--num_workers", "0", "--json", *flags])
    return code, json.loads(out.getvalue())


# --------------------------------------------------------------------------------------------- nothing is wrong


@pytest.fixture(scope="module")
def clean_report(quickstart) -> tuple[int, Json]:
    """Exit code and JSON of the check of the quickstart's mixture, and `page.html` beside it."""
    return quietly(quickstart, "--html", str(quickstart / "page.html"), "--vit_cond_dropout_prob", "1")


def test_the_quickstart_is_clean(clean_report):
    code, report = clean_report
    assert code == 0 and report["clean"]
    assert [f["kind"] for f in report["faults"] if f["severity"] != "note"] == []
    groups = report["groups"]
    assert {name: g["records"] for name, g in groups.items()} == {
        "vqa": 36, "refer": 36, "t2i": 36, "edit": 36, "text": 12,
    }  # fmt: skip
    assert all(g["looked_at"] == g["usable"] == g["records"] for g in groups.values())
    # 8x8 ViT patches and two markers; six or four noised copies of 4x4 latent tokens and their markers; one clean one.
    assert groups["vqa"]["tokens"]["und"] == {"mean": 66, "median": 66, "p95": 66, "max": 66}
    assert groups["edit"]["tokens"]["gen"]["max"] == 6 * 18 and groups["edit"]["tokens"]["cond"]["max"] == 18
    assert groups["t2i"]["tokens"]["loss"]["max"] == 4 * 16
    for group in groups.values():
        parts = (group["tokens"][kind]["mean"] for kind in ("text", "und", "cond", "gen"))
        assert sum(parts) == pytest.approx(group["tokens"]["all"]["mean"])


def test_the_prediction_is_what_the_stream_does(quickstart, clean_report):
    """Packs of real samples of the same mixture are as full, and hold as many samples, as was predicted from outlines."""
    predicted = clean_report[1]["packs"]
    parser = argparse.ArgumentParser()
    add_plan_flags(parser)
    parser.set_defaults(**{**TRAINER_LIMITS, "vit_cond_dropout_prob": 1.0})
    plan, _ = build_plan(parser.parse_args(flags_of(quickstart)))
    streams = [LaneStream(plan, LaneCursor(lane=lane)) for lane in range(LANES)]
    packs = [stream.next_samples() for stream in streams for _ in range(3)]
    full = sum(num_tokens(s, plan.layout) for pack in packs for s in pack) / len(packs) / 3200
    assert predicted["efficiency"] == pytest.approx(full, abs=0.02)
    assert predicted["samples_per_pack"] == pytest.approx(sum(map(len, packs)) / len(packs), rel=0.1)
    records = sum(g["records"] for g in clean_report[1]["groups"].values())
    assert predicted["steps_per_epoch"] == pytest.approx(records / predicted["samples_per_pack"], rel=0.1)


# ---------------------------------------------------------------------------------------------- planted faults

PLANTED: list[tuple[str, str]] = []
"""(kind, end of the place) of every fault that `broken` plants."""


def edit_line(file: Path, line: int, change: Callable[[Json], Any]) -> None:
    """Change the row of a JSONL line (from 1); what `change` returns is written as it is, if it is a text."""
    lines = file.read_text().splitlines()
    row = json.loads(lines[line - 1])
    changed = change(row)
    lines[line - 1] = changed if isinstance(changed, str) else json.dumps(row)
    file.write_text("\n".join(lines) + "\n")


def plant(file: Path, line: int, kind: str, change: Callable[[Json], Any]) -> None:
    edit_line(file, line, change)
    PLANTED.append((kind, f"{file.name}:{line}"))


def boxes_of(row: Json) -> list[list[float]]:
    return [box for box in row["objects"]["bbox"] if box]


def new_boxes(row: Json, change: Callable[[list[float]], list[float]]) -> None:
    row["objects"]["bbox"] = [change(box) if box else None for box in row["objects"]["bbox"]]


def new_mask(row: Json, mask: Any) -> None:
    place = next(k for k, m in enumerate(row["objects"]["mask"]) if m)
    row["objects"]["mask"][place] = mask


def own_picture(root: Path, name: str, key: str, make: Callable[[Path], None]) -> Callable[[Json], None]:
    """Gives a row a picture of its own, made by `make`."""
    make(root / "data" / name)

    def change(row: Json) -> None:
        row[key] = [{"path": name}]

    return change


@pytest.fixture(scope="module")
def broken(quickstart, tmp_path_factory) -> Path:
    """The quickstart with a fault of every kind."""
    PLANTED.clear()
    root = tmp_path_factory.mktemp("broken") / "copy"
    shutil.copytree(quickstart, root, ignore=shutil.ignore_patterns("*.npz", "*.index*"))
    scene = Image.open(root / "data/train/images/scene_000000.png")

    def truncated(path: Path) -> None:
        noisy = Image.effect_noise((64, 64), 90)
        noisy.save(path)
        path.write_bytes(path.read_bytes()[:2000])

    def turned(path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        scene.save(path, exif=exif)

    def deep(path: Path) -> None:
        Image.fromarray(np.asarray(scene.convert("L"), np.uint16) * 16).save(path)

    vqa = root / "data/vqa_train.jsonl"
    plant(vqa, 1, "bad_json", lambda row: json.dumps(row)[:-20])
    plant(vqa, 2, "schema", lambda row: row.pop("message"))
    plant(vqa, 3, "schema", lambda row: row["message"][0].update({"from": "user"}))
    plant(
        vqa, 4, "missing_picture", lambda row: row["input_img"][0].update(path="train/images/not_there.png")
    )
    plant(vqa, 5, "bad_picture", own_picture(root, "cut.png", "input_img", truncated))
    plant(
        vqa,
        6,
        "bad_picture",
        own_picture(root, "page.png", "input_img", lambda p: p.write_text("<html>404</html>")),
    )
    plant(vqa, 7, "image_count", lambda row: row["message"][0].update(value="<image>\n<image>\nHow many?"))
    plant(vqa, 8, "object_count", lambda row: row["message"][-1].update(value="I see nothing."))
    plant(vqa, 9, "box_scale", lambda row: new_boxes(row, lambda box: [v / 64 for v in box]))
    plant(vqa, 10, "box_scale", lambda row: new_boxes(row, lambda box: [v / 64 * 1000 for v in box]))
    plant(vqa, 11, "box_outside", lambda row: new_boxes(row, lambda box: [box[0], box[1], 70, 64]))
    plant(vqa, 12, "box_corners", lambda row: new_boxes(row, lambda box: [*box[2:], *box[:2]]))
    plant(vqa, 13, "bad_box", lambda row: row["objects"]["bbox"].__setitem__(0, ["left", 0, 3, 4]))
    plant(vqa, 14, "empty_mask", lambda row: new_mask(row, {"size": [64, 64], "counts": [64 * 64]}))
    plant(vqa, 15, "mask_size", lambda row: new_mask(row, {"size": [32, 64], "counts": [2000, 48]}))
    plant(vqa, 16, "bad_mask", lambda row: new_mask(row, {"size": [64, 64], "counts": [1, 2, 3]}))
    plant(vqa, 17, "declared_size", lambda row: row["input_img"][0].update(width=128, height=128))
    plant(
        vqa,
        18,
        "blank_picture",
        own_picture(root, "blank.png", "input_img", lambda p: Image.new("RGB", (64, 64)).save(p)),
    )
    plant(vqa, 19, "framing_token", lambda row: row["message"][1].update(value="Three.<|im_end|>"))
    plant(vqa, 20, "exif_rotation", own_picture(root, "turned.jpg", "input_img", turned))
    plant(vqa, 23, "deep_picture", own_picture(root, "ct.png", "input_img", deep))
    plant(
        vqa,
        21,
        "over_budget",
        lambda row: [m.update(value=m["value"] + " more" * 200) for m in row["message"][1:]],
    )
    plant(vqa, 22, "unsafe_path", lambda row: row["input_img"][0].update(path="../../secret.png"))
    with vqa.open("a") as file:
        file.write(vqa.read_text().splitlines()[29] + "\n")
    PLANTED.append(("duplicate_row", f"{vqa.name}:37"))

    edit = root / "data/edit_train.jsonl"
    wide = own_picture(root, "wide.png", "output_img", lambda p: scene.crop((0, 0, 64, 16)).save(p))
    plant(edit, 4, "pair_size", wide)
    plant(edit, 5, "image_count", lambda row: row.update(output_img=[]))
    text = root / "data/text_train.jsonl"
    plant(text, 2, "nothing_to_learn", lambda row: row["message"].__delitem__(slice(1, None)))
    plant(text, 3, "bad_json", lambda row: "[1, 2]")
    shutil.copy(text, root / "data/repeated.jsonl")
    edit_line(root / "data/repeated.jsonl", 7, lambda row: json.dumps(json.loads(lines_of(text)[7])))

    refer = root / "data/refer_train.json"
    coco = json.loads(refer.read_text())
    by_image = {a["image_id"]: a for a in coco["annotations"]}
    by_image[3]["category_id"] = 77
    by_image[4]["expressions"] = []
    by_image[5]["bbox"] = [v / 64 for v in by_image[5]["bbox"]]
    for annotation in coco["annotations"]:
        if annotation["image_id"] == 5:
            annotation["bbox"] = [v / 64 for v in by_image[5]["bbox"]]
    coco["images"][6]["width"] = 640
    refer.write_text(json.dumps(coco))
    PLANTED.extend([("schema", "refer_train.json#image 3"), ("schema", "refer_train.json#image 4")])
    PLANTED.extend([("box_scale", "refer_train.json#image 5"), ("declared_size", "refer_train.json#image 6")])

    shard = root / "data/t2i_train-000000.tar"
    rewrite_tar(
        shard, {"000003.json": b'{"caption": ', "000004.png": b"\x89PNG\r\n\x1a\n", "000005.json": b"{}"}
    )
    PLANTED.extend([("bad_json", f"{shard.name}#000003"), ("bad_picture", f"{shard.name}#000004")])
    PLANTED.append(("schema", f"{shard.name}#000005"))
    break_mixture(root)
    return root


def lines_of(file: Path) -> list[str]:
    return file.read_text().splitlines()


def rewrite_tar(shard: Path, contents: Mapping[str, bytes]) -> None:
    """Write a shard again with other contents of some members."""
    with tarfile.open(shard) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]
    with tarfile.open(shard, "w") as tar:
        for name, content in members:
            content = contents.get(name, content)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_referring_rows(file: Path) -> None:
    """One box per row as x, y, width, height; one in fractions, one too wide."""
    boxes = [[40, 40, 10 + k, 20] for k in range(LANES)]
    boxes[2] = [0.5, 0.5, 0.25, 0.25]
    boxes[5] = [40, 40, 30, 20]
    rows = [
        {"img_path": f"train/images/scene_{k:06d}.png", "expression": "that", "bbox": box}
        for k, box in enumerate(boxes)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    PLANTED.extend([("box_scale", f"{file.name}:3"), ("box_outside", f"{file.name}:6")])


def break_mixture(root: Path) -> None:
    """Groups with faults of the YAML itself, one beside the other."""
    file = root / "mixture.yaml"
    mixture = yaml.safe_load(file.read_text())
    texts = mixture["dataset_info"]["text_only"]
    texts["few"] = {"jsonl_path": "data/few.jsonl"}
    texts["repeated"] = {"jsonl_path": "data/repeated.jsonl"}
    texts["gone"] = {"jsonl_path": "data/gone.jsonl"}
    texts["empty"] = {"jsonl_path": "data/empty.jsonl"}
    (root / "data/few.jsonl").write_text("\n".join(lines_of(root / "data/text_train.jsonl")[3:7]) + "\n")
    (root / "data/empty.jsonl").write_text("\n")
    write_referring_rows(root / "data/pointed.jsonl")
    shutil.copy(root / "data/edit_val.jsonl", root / "data/large.jsonl")
    large = own_picture(root, "large.png", "input_img", lambda p: Image.new("RGB", (4096, 16)).save(p))
    plant(root / "data/large.jsonl", 2, "too_large", large)
    mixture["dataset_info"]["edit_jsonl"]["large"] = {"jsonl_path": "data/large.jsonl"}
    mixture["dataset_info"]["refer_jsonl"] = {"pointed": {"jsonl_path": "data/pointed.jsonl"}}
    mixture |= {
        "large": {
            **mixture["edit"],
            "type": "edit_jsonl",
            "dataset_names": ["large"],
            "upstream_compat": True,
        },
        "pointed": {
            "type": "refer_jsonl",
            "dataset_names": ["pointed"],
            "bbox_format": "xywh",
            "mask_templates": [],
            "vit_image_transform_args": mixture["vqa"]["vit_image_transform_args"],
            "weight": 0.1,
        },
        "misnamed": {"type": "text_only", "dataset_names": ["digits_txet"]},
        "heavy": {"type": "text_only", "dataset_names": ["digits_text"], "weight": "much"},
        "misspelt": {"type": "text_only", "dataset_names": ["digits_text"], "wieght": 1.0},
        "counted": {"type": "text_only", "dataset_names": ["digits_text"], "num_used_data": [1, 2, 3]},
        "few": {"type": "text_only", "dataset_names": ["few"], "num_used_data": 50},
        "unused": {"type": "text_only", "dataset_names": ["digits_text"], "weight": 0},
        "repeated": {"type": "text_only", "dataset_names": ["repeated", "gone", "empty"], "weight": 0.1},
        "odd": {
            "type": "vlm_sft",
            "dataset_names": ["digits_vqa"],
            "vit_image_transform_args": {"image_stride": 12, "max_image_size": 60, "min_image_size": 60},
            "weight": 0.1,
        },
    }
    mixture["text"]["resume_data_status"] = False
    mixture["dataset_info"]["vlm_sft"] = {"digits_vqa": {"jsonl_path": "data/vqa_val.jsonl"}}
    text = yaml.safe_dump(mixture, sort_keys=False)
    file.write_text(text)
    lines = text.splitlines()

    def line(start: str, after: str = "") -> str:
        first = lines.index(after) if after else 0
        return f"mixture.yaml:{next(n for n in range(first, len(lines)) if lines[n].startswith(start)) + 1}"

    PLANTED.extend(
        [
            ("unknown_dataset", line("  dataset_names:", "misnamed:")),
            ("wrong_weight", line("  weight:", "heavy:")),
            ("bad_key", line("  wieght:", "misspelt:")),
            ("wrong_count", line("  num_used_data:", "counted:")),
            ("missing_source", line("      jsonl_path: data/gone.jsonl")),
            ("missing_source", line("      jsonl_path: data/empty.jsonl")),
            ("no_effect", line("  resume_data_status:", "text:")),
            ("short_source", line("few:")),
            ("tiny_group", line("few:")),
            ("never_drawn", line("unused:")),
            ("too_many_rejects", line("vqa:")),
            ("transform", "vqa_val.jsonl:1"),
            ("repeated_text", "repeated.jsonl:8"),
        ]
    )


@pytest.fixture(scope="module")
def broken_report(broken) -> tuple[int, Json]:
    """Exit code and JSON of the check of the broken copy."""
    return quietly(broken, "--html", str(broken / "check.html"))


def test_every_planted_fault_is_found_at_its_place(broken_report):
    code, report = broken_report
    assert code == 1 and not report["clean"]
    found = {
        (fault["kind"], place["where"].rpartition("/")[2])
        for fault in report["faults"]
        for place in fault["first"]
    }
    missed = sorted(set(PLANTED) - found)
    assert not missed, missed
    assert len({kind for kind, _ in PLANTED}) >= 35


def test_every_kind_of_the_table_is_planted(broken_report):
    # Leaks have a test of their own; `unusable` is for reasons that are not in the table.
    assert set(checks.CHECKS) - {kind for kind, _ in PLANTED} == {
        "leaked_picture",
        "leaked_text",
        "leaked_patient",
        "unusable",
    }


def test_nothing_else_is_found(broken_report):
    _, report = broken_report
    planted = set(PLANTED)
    # These stand for several planted faults, or for a fault of every record of a group.
    of_many = {"too_many_rejects", "transform", "repeated_text", "duplicate_row"}
    more = [
        (fault["kind"], place["where"], place["message"])
        for fault in report["faults"]
        for place in fault["first"]
        if (fault["kind"], place["where"].rpartition("/")[2]) not in planted
        and fault["kind"] not in of_many
        # The same faulty lines, read again by the groups that break the YAML.
        and fault["group"] not in ("unused", "repeated", "few")
    ]
    assert not more, more


def test_faults_come_worst_first_with_what_to_do(broken_report):
    _, report = broken_report
    severities = [fault["severity"] for fault in report["faults"]]
    assert severities == sorted(severities, key=checks.SEVERITIES.index)
    assert all(fault["remedy"] and fault["title"] for fault in report["faults"])
    scale = next(f for f in report["faults"] if f["kind"] == "box_scale" and f["group"] == "vqa")
    assert [("fractions" in p["message"], "thousandths" in p["message"]) for p in scale["first"]] == [
        (True, False), (False, True),
    ]  # fmt: skip


def test_the_text_names_what_the_json_names(broken, capsys):
    assert main([*flags_of(broken), "--scan", "--num_workers", "0"]) == 1
    text = capsys.readouterr().out
    for kind, where in PLANTED:
        assert f" {kind}: " in text and where in text, (kind, where)
    assert max(map(len, text.splitlines()[2:9])) < 180  # the table
    assert f"\npaths are relative to {broken}\n" in text and "\n  data/" in text
    assert text.count(str(broken)) == 2  # there, and the mixture as it was named


def test_the_page_of_a_broken_mixture_is_whole(broken, broken_report):
    text = (broken / "check.html").read_text(encoding="utf-8")
    page = Page(text)
    assert set(page.ids) >= {"groups", "faults", "group-vqa", "group-t2i", "group-edit", "attention"}
    assert page.loads and all(load.startswith(("#", "data:image/png;base64,")) for load in page.loads)
    assert not re.search(r"https?://|@import|url\(|<script", text)
    assert all(image["alt"] for image in page.images)
    for kind, where in PLANTED:
        assert kind in text and where in text
    assert text.count(str(broken)) == 2  # what paths are relative to, and the mixture as it was named


def test_the_page_shows_samples_as_the_model_gets_them(quickstart, clean_report):
    assert clean_report[0] == 0
    text = (quickstart / "page.html").read_text(encoding="utf-8")
    sections = re.split(r'<section id="', text)
    edit = next(s for s in sections if s.startswith("group-edit"))
    assert edit.count("to the VAE, clean: condition") == edit.count("to the VAE, noised: target") == 4
    assert edit.count("left out this time") >= 4 and "6 times, t = " in edit
    assert '<td>max</td><td class="n">217</td>' in edit  # tokens
    refer = next(s for s in sections if s.startswith("group-refer"))
    assert 'class="given">Where is ' in refer and 'class="learnt"><span class="anchor"' in refer
    assert refer.count("<rect") == 2 * refer.count(">box: ")  # each box is two lines, one over the other


# ------------------------------------------------------------------------------------------------ how it is run


def test_leaks_between_train_and_validation_are_named(quickstart, tmp_path):
    root = tmp_path / "leaky"
    shutil.copytree(quickstart, root)
    shutil.copy(root / "data/train/images/scene_000007.png", root / "data/val/images/scene_000002.png")
    text = lines_of(root / "data/text_train.jsonl")[4]
    with (root / "data/text_val.jsonl").open("a") as file:
        file.write(text + "\n")
    added = len(lines_of(root / "data/text_val.jsonl"))
    code, report = quietly(root, "--against", str(root / "val.yaml"))
    assert code == 1
    leaked = {
        (f["kind"], f["group"], p["where"].rpartition("/")[2], p["message"].rpartition("/")[2])
        for f in report["faults"]
        for p in f["first"]
    }
    assert {entry for entry in leaked if entry[0] == "leaked_picture"} == {
        ("leaked_picture", "vqa", "vqa_train.jsonl:8", "vqa_val.jsonl:3"),
        ("leaked_picture", "edit", "edit_train.jsonl:8", "vqa_val.jsonl:3"),
        ("leaked_picture", "refer", "refer_train.json#image 7", "vqa_val.jsonl:3"),
    }
    assert ("leaked_text", "text", "text_train.jsonl:5", f"text_val.jsonl:{added}") in leaked


def test_groups_of_validation_are_looked_at_too(quickstart, tmp_path):
    root = tmp_path / "validated"
    shutil.copytree(quickstart, root)
    shutil.copy(root / "data/train/images/scene_000007.png", root / "data/val/images/scene_000002.png")
    edit_line(
        root / "data/vqa_val.jsonl",
        5,
        lambda row: row["message"][0].update(value="<image>\n<image>\nHow many?"),
    )
    mixture = yaml.safe_load((root / "mixture.yaml").read_text())
    places = {"data_dir": "data", "jsonl_path": "data/vqa_val.jsonl"}
    mixture["dataset_info"]["SftJSONLIterableDataset_Ver1"]["held_out"] = places
    mixture["val"] = {"vqa": {"dataset_names": ["held_out"]}}
    (root / "mixture.yaml").write_text(yaml.safe_dump(mixture))
    code, report = quietly(root)
    assert code == 1 and report["groups"]["val.vqa"]["records"] == 9
    found = {
        (f["kind"], f["group"], p["where"].rpartition("/")[2]) for f in report["faults"] for p in f["first"]
    }
    assert ("image_count", "val.vqa", "vqa_val.jsonl:5") in found
    assert ("leaked_picture", "vqa", "vqa_train.jsonl:8") in found
    assert report["packs"]["share"].keys() == set(report["groups"]) - {
        "val.vqa"
    }  # nothing of it is trained on


def test_a_tiny_group_is_a_fault_unless_accepted(quickstart):
    code, report = quietly(quickstart, "--num_lanes", "20", "--packs_per_step", "2")
    assert code == 1 and [f["kind"] for f in report["faults"] if f["severity"] == "warning"] == ["tiny_group"]
    # Of the same lanes: which samples they draw decides how many fit.
    single = quietly(quickstart, "--num_lanes", "20", "--packs_per_step", "1")[1]["packs"]
    assert report["packs"]["steps_per_epoch"] == pytest.approx(single["steps_per_epoch"] / 2, rel=0.02)


def test_some_records_stand_for_all(quickstart, capsys):
    few = ["--samples", "10", "--num_workers", "0", "--num_lanes", "20"]
    assert main([*flags_of(quickstart), *few, "--accept", "tiny_group"]) == 0
    said = capsys.readouterr().out
    assert "50 of 156 records of 5 groups looked at" in said and "NOTE tiny_group" in said
    assert "--scan looks at all" in said


def test_processes_find_the_same(broken, broken_report):
    command = [
        sys.executable,
        "-m",
        "data.check",
        *flags_of(broken),
        "--scan",
        "--num_workers",
        "2",
        "--json",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert {**json.loads(done.stdout), "seconds": 0} == {**broken_report[1], "seconds": 0}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dataset_config_file", "nowhere.yaml"], "nowhere.yaml"),
        (["--dataset_config_file", "mixture.yaml", "--model_path", "nowhere"], "nowhere"),
        (["--dataset_config_file", "mixture.yaml", "--samples", "0"], "--samples"),
        (["--dataset_config_file", "mixture.yaml", "--config", "nowhere_run.yaml"], "nowhere_run.yaml"),
    ],
)
def test_what_cannot_be_checked_is_said_in_one_line(quickstart, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(quickstart)
    assert main(["--model_path", "model", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err and err.count("\n") == 1


def test_limits_come_from_the_run_file_of_the_trainer(quickstart, tmp_path, capsys):
    (tmp_path / "base.yaml").write_text("max_num_tokens: 3200\nmax-num-tokens-per-sample: 150\nlr: 0.1\n")
    run_file = tmp_path / "run.yaml"
    run_file.write_text(
        f"_base_: base.yaml\nexpected_num_tokens: 2900\ndataset_config_file: {quickstart}/mixture.yaml\n"
    )
    flags = ["--config", str(run_file), "--model_path", str(quickstart / "model"), "--num_lanes", str(LANES)]
    few = ["--samples", "5", "--num_workers", "0"]
    assert main([*flags, *few]) == 1
    said = capsys.readouterr().out
    assert "of 3,200 tokens full" in said and "216 tokens, the limit is 150" in said
    assert main([*flags, *few, "--max_num_tokens_per_sample", "1000"]) == 0  # the command line wins


def test_a_mixture_without_a_usable_group_cannot_be_checked(quickstart, capsys):
    file = quickstart / "nothing.yaml"
    file.write_text("text_only: {dataset_names: [nowhere]}\n")
    assert main(["--dataset_config_file", str(file), "--model_path", str(quickstart / "model")]) == 2
    assert "nothing says where 'nowhere' is" in capsys.readouterr().err


def test_a_record_read_twice_on_request_is_no_copy():
    # Number, hash of the content, hash of the place: the third is the first once more, the fourth a copy of it.
    hashes = np.array([[0, 7, 100], [1, 8, 101], [2, 7, 100], [3, 7, 103]], np.uint64)
    assert equal_pairs(hashes) == [(0, 3)]


def test_rows_that_ask_the_same_of_different_things_are_no_copies():
    row = {"message": [{"from": "human", "value": "Where is it?"}], "objects": {"bbox": [[1, 2, 3, 4]]}}
    moved = {**row, "objects": {"bbox": [[1, 2, 3, 5]]}}
    renamed = {**row, "input_img": [{"path": "b.png"}], "id": "17"}
    assert list(content_of(row)) != list(content_of(moved))
    assert list(content_of(row)) == list(content_of(renamed))


# ------------------------------------------------------------------------------------------------------- tables


def test_the_limits_are_those_of_the_trainer():
    defaults = {f.name: f.default for f in fields(DataArgs)}
    assert {name: defaults[name] for name in TRAINER_LIMITS} == TRAINER_LIMITS


def test_every_reason_of_the_data_code_is_a_kind_of_fault():
    reasons = set()
    for file in (ROOT / "data").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", "")
                given = [node.args[0]] if name == "SkipSample" and node.args else []
                given += [k.value for k in node.keywords if k.arg == "reason"]
                reasons |= {v.value for v in given if isinstance(v, ast.Constant)}
    assert len(reasons) > 20
    unknown = {reason for reason in reasons if checks.kind_of(reason) == "unusable"} - {"unusable"}
    assert not unknown, f"give each a row in CHECKS (data/checks.py): {unknown}"


def test_paths_are_relative_to_the_mixture_or_to_the_data_variable(tmp_path, monkeypatch):
    folder = tmp_path / "a" / "b"
    monkeypatch.setenv("WEFT_DATA", f"{tmp_path}/a/b/../../data")
    told = [
        (f"{folder}/rows.jsonl:7", "rows.jsonl:7"),
        (f"the same as '{folder}/x y.png'", "the same as 'x y.png'"),
        (f"{tmp_path}/a/c.json#image 1", "../c.json#image 1"),
        (f"{tmp_path}/runs/c.json", "../../runs/c.json"),
        (f"{tmp_path}/data/c.json and {tmp_path}/data/d", "$WEFT_DATA/c.json and $WEFT_DATA/d"),
        (f"file://{folder}/c.json", f"file://{folder}/c.json"),
        (f"/mnt{folder}/c.json", f"/mnt{folder}/c.json"),
        ("/usr/share/c.json", "/usr/share/c.json"),
    ]
    assert [near_paths(text, folder) for text, _ in told] == [short for _, short in told]
    monkeypatch.delenv("WEFT_DATA")
    assert near_paths(f"{tmp_path}/data/c.json", folder) == "../../data/c.json"
    assert near_paths("/data/c.json", Path("/")) == "/data/c.json"
