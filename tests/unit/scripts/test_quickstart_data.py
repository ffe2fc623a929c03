"""The quickstart data: every format's schema, and what is promised of glyphs, boxes, masks, edits and repeatability."""

import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sklearn", reason="the extra `demo` is not installed")
pytest.importorskip("skimage", reason="the extra `demo` is not installed")

from data.tokens import SPECIAL_TOKENS, Tokenizer
from scripts.data import make_quickstart, make_quickstart_model, quickstart_scenes

SIZES = {
    "train": 260,
    "val": 3,
    "test": 12,
}  # more than one chunk, so that two workers share the training split
SPLITS = tuple(SIZES)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quickstart")
    make_quickstart.make(path, sizes=SIZES, seed=3, workers=1)
    return path


@pytest.fixture(scope="module")
def manifest(root: Path) -> dict[str, Any]:
    return json.loads((root / "manifest.json").read_text())


def rows(root: Path, task: str, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / f"{task}_{split}.jsonl").read_text().splitlines()]


def picture(root: Path, entry: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(root / entry["path"]))


def shards(root: Path, split: str) -> list[tuple[np.ndarray, dict[str, Any]]]:
    found = []
    for shard in sorted(root.glob(f"t2i_{split}-*.tar")):
        with tarfile.open(shard) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}
        for key in sorted({name.split(".")[0] for name in members}):
            image = np.asarray(Image.open(io.BytesIO(members[f"{key}.png"])))
            found.append((image, json.loads(members[f"{key}.json"])))
    return found


def unpacked(segmentation: dict[str, Any]) -> np.ndarray:
    counts = segmentation["counts"]
    flat = np.repeat(np.arange(len(counts)) % 2, counts)
    return flat.reshape(segmentation["size"], order="F")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("task", "inputs", "outputs"), [("vqa", 1, 0), ("edit", 1, 1), ("text", 0, 0)])
def test_message_rows(root: Path, task: str, inputs: int, outputs: int, split: str) -> None:
    found = rows(root, task, split)
    assert len(found) == (SIZES[split] if task != "text" else -(-SIZES[split] // 3))
    keys = {"main_task_type", "sub_task_type", "input_img", "output_img", "message", "meta"}
    for row in found:
        assert set(row) == keys | ({"objects"} if (task, split) == ("vqa", "train") else set())
        assert (len(row["input_img"]), len(row["output_img"])) == (inputs, outputs)
        assert [m["from"] for m in row["message"]] == ["human", "gpt"] * (len(row["message"]) // 2)
        human = "".join(m["value"] for m in row["message"][::2])
        gpt = "".join(m["value"] for m in row["message"][1::2])
        assert (human.count("<image>"), gpt.count("<image>")) == (inputs, outputs)
        for entry in row["input_img"] + row["output_img"]:
            assert picture(root, entry).shape == (entry["height"], entry["width"], 3) == (64, 64, 3)


def test_every_answer_is_true_and_every_question_has_one(root: Path) -> None:
    kinds = Counter()
    for row in rows(root, "vqa", "train"):
        digits = row["meta"]["digits"]
        assert [d["box"][0] + d["box"][2] for d in digits] == sorted(
            d["box"][0] + d["box"][2] for d in digits
        )
        assert len({(d["digit"], d["colour"]) for d in digits}) == len(digits)
        turns = zip(row["message"][::2], row["message"][1::2], row["meta"]["kinds"], strict=True)
        for question, answer, kind in turns:
            kinds[kind] += 1
            words = question["value"].removeprefix("<image>\n").rstrip("?.").split()
            wanted = {
                "box": ["<BOX>"],
                "mask": ["<SEG>"],
                "count": [str(len(digits))],
                "digits": [" ".join(str(d["digit"]) for d in digits)],
                "colours": [" ".join(dict.fromkeys(d["colour"] for d in digits))],
                "colour_of": [d["colour"] for d in digits if str(d["digit"]) == words[-1]],
                "digit_of": [str(d["digit"]) for d in digits if d["colour"] == words[-1]],
            }[kind]
            assert wanted == [answer["value"]]
    assert len(kinds) == 7 and kinds["box"] == kinds["mask"]


def test_pointing_turns_name_one_digit_and_show_where_it_is(root: Path) -> None:
    for row in rows(root, "vqa", "train"):
        turns = zip(row["message"][::2], row["message"][1::2], strict=True)
        asked = [q["value"] for q, a in turns if a["value"] in ("<BOX>", "<SEG>")]
        names, boxes, masks = (row["objects"][key] for key in ("ref", "bbox", "mask"))
        assert len(asked) == len(names) == 2 * len(row["meta"]["digits"])
        for question, name, box, mask in zip(asked, names, boxes, masks, strict=True):
            assert name in question and (box is None) != (mask is None)
            (digit,) = (d for d in row["meta"]["digits"] if is_called(d, name))
            if mask is not None:
                columns, rows_ = (np.flatnonzero(unpacked(mask).any(axis)) for axis in (0, 1))
                box = [columns[0], rows_[0], columns[-1] + 1, rows_[-1] + 1]
            assert list(box) == digit["box"]


def is_called(digit: dict[str, Any], name: str) -> bool:
    """Whether every word of "the red 7", "the 7" or "the red digit" fits."""
    return set(name.split()) <= {"the", "digit", digit["colour"], str(digit["digit"])}


def test_glyphs_of_the_splits_are_disjoint_and_stratified(root: Path, manifest: dict[str, Any]) -> None:
    glyphs = {split: set(places) for split, places in manifest["glyphs"].items()}
    assert abs(len(glyphs["val"]) - 180) <= 5  # per class, so the total is rounded ten times
    assert abs(len(glyphs["test"]) - 360) <= 5
    assert sum(len(g) for g in glyphs.values()) == 1797
    assert len(set().union(*glyphs.values())) == 1797
    labels = make_quickstart.load_glyphs().labels
    for split in SPLITS:
        used = {d["glyph"]: d["digit"] for row in rows(root, "vqa", split) for d in row["meta"]["digits"]}
        used |= {
            d["glyph"]: d["digit"] for _, record in shards(root, split) for d in record["meta"]["digits"]
        }
        assert set(used) <= glyphs[split]
        assert all(labels[glyph] == digit for glyph, digit in used.items())
        share = np.bincount(labels[sorted(glyphs[split])]) / len(glyphs[split])
        assert np.abs(share - np.bincount(labels) / 1797).max() < 0.005


def test_boxes_are_the_tight_bounds_of_masks_and_stand_apart(root: Path) -> None:
    coco = json.loads((root / "refer_train.json").read_text())
    images = {image["id"]: image for image in coco["images"]}
    assert [c["name"] for c in coco["categories"]] == [str(n) for n in range(10)]
    taken: dict[int, np.ndarray] = {}
    for a in coco["annotations"]:
        image, mask = images[a["image_id"]], unpacked(a["segmentation"])
        assert mask.shape == (image["height"], image["width"])
        assert mask.sum() == a["area"] > 20
        x, y, w, h = a["bbox"]
        columns, rows_ = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        assert (columns[0], columns[-1] + 1, rows_[0], rows_[-1] + 1) == (x, x + w, y, y + h)
        before = taken.setdefault(a["image_id"], np.zeros((64, 64), bool))
        margin = quickstart_scenes.MARGIN
        assert not before[
            max(y - margin + 1, 0) : y + h + margin - 1, max(x - margin + 1, 0) : x + w + margin - 1
        ].any()
        before[y : y + h, x : x + w] = True
        value, colour = a["category_id"], a["colour"]
        assert a["expressions"][0] == f"the {colour} {value}"
        others = [b for b in coco["annotations"] if b["image_id"] == a["image_id"] and b is not a]
        assert (f"the {value}" in a["expressions"]) == all(b["category_id"] != value for b in others)
        assert (f"the {colour} digit" in a["expressions"]) == all(b["colour"] != colour for b in others)
    assert len({a["id"] for a in coco["annotations"]}) == len(coco["annotations"])


def test_edits_change_their_digit_and_no_pixel_outside_its_box(root: Path) -> None:
    kinds = Counter()
    for row in rows(root, "edit", "train"):
        before, after = picture(root, row["input_img"][0]), picture(root, row["output_img"][0])
        edit, answer = row["meta"]["edit"], row["message"][1]["value"]
        kinds[edit["kind"], row["meta"]["order"]] += 1
        x0, y0, x1, y1 = edit["box"]
        changed = (before != after).any(-1)
        assert changed.any()
        changed[y0:y1, x0:x1] = False
        assert not changed.any()
        place, said = answer.split(": ")
        column, number = "abcdefgh".index(place[-2]), int(place[-1]) - 1
        assert (column, number) == ((x0 + x1) // 2 // 8, (y0 + y1) // 2 // 8)
        assert said.startswith("<image>") == (row["meta"]["order"] == "image_first")
        assert said.endswith("<image>") == (row["meta"]["order"] == "text_first")
        wanted = [(d["digit"], d["colour"]) for d in row["meta"]["digits"]]
        if edit["kind"] == "remove":
            del wanted[edit["index"]]
        else:
            wanted[edit["index"]] = (edit["digit"], edit["to"])
        assert [(d["digit"], d["colour"]) for d in row["meta"]["after"]] == wanted
        assert len(set(wanted)) == len(wanted)
    assert len(kinds) == 4


def test_captions_name_every_digit(root: Path) -> None:
    found = shards(root, "train")
    assert len(found) == SIZES["train"]
    for image, record in found:
        assert image.shape == (64, 64, 3)
        names = [f"{d['colour']} {d['digit']}" for d in record["meta"]["digits"]]
        assert all(name in record["caption"] for name in names)
        places = record["meta"]["places"]
        assert len(places) == len(names)
        assert all(f"{place} and" in record["caption"] for place in places[:-1])
        for d in record["meta"]["digits"]:
            said = re.search(rf"{d['colour']} {d['digit']} (.+?)(?: and| on|$)", record["caption"])
            assert said is not None and said[1] in places
            words = said[1].split()
            x, y = (d["box"][0] + d["box"][2]) / 2, (d["box"][1] + d["box"][3]) / 2
            assert ("left" in words) == (x < 24) and ("right" in words) == (x > 40)
            assert ("top" in words) == (y < 24) and ("bottom" in words) == (y > 40)
    single = sum(len(record["meta"]["digits"]) == 1 for _, record in found) / len(found)
    assert 0.65 < single < 0.85


@pytest.mark.timeout(120)
def test_bytes_depend_on_the_seed_and_not_on_the_workers(
    tmp_path: Path, root: Path, manifest: dict[str, Any]
) -> None:
    again = make_quickstart.make(tmp_path / "two", sizes=SIZES, seed=3, workers=2)
    assert again["sha256"] == manifest["sha256"]
    other = make_quickstart.make(tmp_path / "other", sizes={**SIZES, "train": 5}, seed=4, workers=1)
    assert not set(other["sha256"].values()) & set(manifest["sha256"].values())
    assert other["glyphs"] != manifest["glyphs"]


def test_run_lengths_round_trip() -> None:
    rng = np.random.default_rng(0)
    for mask in (
        np.zeros((3, 4), np.uint8),
        np.ones((3, 4), np.uint8),
        rng.integers(0, 2, (7, 5)).astype(np.uint8),
    ):
        coded = make_quickstart.run_lengths(mask)
        assert (unpacked(coded) == mask).all()
        assert all(n > 0 for n in coded["counts"][1:])


def test_an_unwritable_directory_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file.*choose another --output_dir"):
        make_quickstart.main(["--output_dir", str(tmp_path / "file" / "data")])


def test_model_directory(tmp_path: Path, root: Path) -> None:
    make_quickstart_model.main(["--data_dir", str(root), "--output_dir", str(tmp_path)])
    tokenizer = Tokenizer(tmp_path)
    llm = json.loads((tmp_path / "llm_config.json").read_text())
    assert len(tokenizer) <= llm["vocab_size"] < len(tokenizer) + 8
    for text in (
        "Which digits are there?",
        "Paint the red 7 blue.",
        "Where is the red 7?",
        "naïve 数字 \n\t <BOX>",
    ):
        assert tokenizer.decode(tokenizer.encode(text), keep_special=True) == text
    assert len(tokenizer.encode("Which digits are there?")) == 5
    assert len(tokenizer.encode("".join(SPECIAL_TOKENS))) == len(SPECIAL_TOKENS)
    assert set(tokenizer.special.anchors) == {"box", "mask"}


def test_model_directory_needs_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_quickstart_model.main(["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "base")])
    assert "make_quickstart.py first" in capsys.readouterr().err
