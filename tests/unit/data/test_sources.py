import io
import json
import logging
import os
import pickle
import tarfile

import pytest
from PIL import Image

from data.sources import (
    CocoSource,
    ConcatSource,
    JsonlSource,
    SelectedSource,
    SkipSample,
    SourceLost,
    TarSource,
    index,
)


def png(colour=(200, 10, 10), size=(6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


def write_jsonl(path, count=5):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"i": i}) + "\n" for i in range(count)))
    return path


def write_tar(path, count, first=0):
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + count):
            members = {
                "png": png(),
                "json": json.dumps({"caption": f"c{i}"}).encode(),
                "note.txt": b"n",
                "txt": b"t",
            }
            for ext, content in members.items():
                info = tarfile.TarInfo(f"some/dir/{i:04d}.{ext}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def coco(images=2):
    return {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(images)],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 7},
            {"id": 2, "image_id": 1, "category_id": 3},
        ],
        "categories": [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}],
    }


def test_jsonl_reads_any_row_and_passes_over_blank_lines(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"i": 0}\n\n{"i": "ü"}\r\n   \n{"i": 2}')  # no newline at the end
    source = JsonlSource(file)
    assert len(source) == 3
    assert [source.read(i).data["i"] for i in (2, 0, 1)] == [2, 0, "ü"]
    assert source.read(2).where == f"{file}:5"


@pytest.mark.parametrize("line", ['{"i": ', "[1]", '{"i": "\xff"}'])
def test_a_malformed_line_is_skipped_with_file_and_line(tmp_path, line):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"i": 0}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(SkipSample) as e:
        JsonlSource(file).read(1)
    assert e.value.reason == "bad_json"
    assert e.value.message.startswith(f"{file}:2: ")
    assert "\n" not in e.value.message


def test_the_index_is_kept_and_made_again_when_the_file_changes(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "a.jsonl")
    JsonlSource(file)
    assert (tmp_path / "a.jsonl.index.safetensors").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(index, "_build", lambda *_: pytest.fail("the index was built again"))
        assert JsonlSource(file).read(4).data == {"i": 4}
    write_jsonl(file, 7)
    assert len(JsonlSource(file)) == 7
    (tmp_path / "a.jsonl.index.safetensors").write_bytes(b"PK broken")
    assert len(JsonlSource(file)) == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.index.safetensors"]


def test_without_a_place_beside_the_data_the_index_is_in_the_users_cache(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "data" / "a.jsonl")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    writable = index._is_writable
    monkeypatch.setattr(index, "_is_writable", lambda folder: folder != file.parent and writable(folder))
    assert len(JsonlSource(file)) == 5
    assert [p.name for p in file.parent.iterdir()] == ["a.jsonl"]
    assert len(list((tmp_path / "cache" / "weft").iterdir())) == 1
    monkeypatch.setattr(index, "_build", lambda *_: pytest.fail("the index was built again"))
    assert JsonlSource(file).read(4).data == {"i": 4}


def test_without_any_place_the_index_is_in_memory_and_travels(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(index, "_is_writable", lambda folder: False)
    source = JsonlSource(write_jsonl(tmp_path / "a.jsonl"))
    assert "nowhere to keep the index; every process has its own" in caplog.text
    assert pickle.loads(pickle.dumps(source)).read(4).data == {"i": 4}


@pytest.mark.parametrize(
    "source, key", [(JsonlSource, "jsonl_path"), (TarSource, "tar_path"), (CocoSource, "coco_path")]
)
def test_a_missing_file_is_named_with_its_key(tmp_path, source, key):
    with pytest.raises(ValueError, match=f"gone.*no such file; check '{key}' in dataset_info"):
        source(tmp_path / "gone")


def test_empty_data_sets_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    (tmp_path / "a.json").write_text(json.dumps({**coco(3), "annotations": []}))
    write_tar(tmp_path / "a.tar", 0)
    for source, name in ((JsonlSource, "a.jsonl"), (CocoSource, "a.json"), (TarSource, "a.tar")):
        with pytest.raises(ValueError, match=f"{name}: the data set is empty"):
            source(tmp_path / name)


def test_images_lie_below_the_data_directory(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.png").write_bytes(png())
    record = JsonlSource(write_jsonl(tmp_path / "a.jsonl"), tmp_path / "images").read(0)
    assert record.open_image("x.png").size == (6, 4)
    assert record.open_image("/x.png").getpixel((0, 0)) == (200, 10, 10)


@pytest.mark.parametrize(
    "name, reason", [("gone.png", "missing_image"), ("cut.png", "bad_image"), ("text.png", "bad_image")]
)
def test_unreadable_images_are_skipped_with_the_row_that_names_them(tmp_path, name, reason):
    (tmp_path / "cut.png").write_bytes(png(size=(60, 60))[:-40])
    (tmp_path / "text.png").write_text("not a picture")
    source = JsonlSource(write_jsonl(tmp_path / "a.jsonl"))
    with pytest.raises(SkipSample, match=f"a.jsonl:2: image '{name}'") as e:
        source.read(1).open_image(name)
    assert e.value.reason == reason


@pytest.mark.parametrize("pattern", ["s-{000..001}.tar", "s-*.tar"])
def test_tar_shards_are_one_list_of_records(tmp_path, pattern):
    write_tar(tmp_path / "s-000.tar", 3)
    write_tar(tmp_path / "s-001.tar", 2, first=3)
    source = TarSource(tmp_path / pattern)
    assert len(source) == 5
    assert [source.read(i).data["json"]["caption"] for i in (4, 2, 3, 0)] == ["c4", "c2", "c3", "c0"]
    record = source.read(3)
    assert record.data == {"__key__": "some/dir/0003", "json": {"caption": "c3"}, "txt": "t"}
    assert record.open_image("png").size == (6, 4)
    assert record.fetch("note.txt") == b"n"
    assert record.where == f"{tmp_path}/s-001.tar#some/dir/0003"
    with pytest.raises(SkipSample, match="image 'jpg' cannot be read .*members are json, note.txt, png, txt"):
        record.open_image("jpg")


def test_bad_shards_are_named(tmp_path):
    write_tar(tmp_path / "s-000.tar", 3)
    with pytest.raises(ValueError, match="s-001.tar: no such file; check 'tar_path'"):
        TarSource(tmp_path / "s-{000..001}.tar")
    with pytest.raises(ValueError, match="no such file"):
        TarSource(tmp_path / "t-*.tar")
    (tmp_path / "no.tar").write_text("no tar" * 200)
    with pytest.raises(ValueError, match="no.tar: not a readable, uncompressed tar"):
        TarSource(tmp_path / "no.tar")


def test_a_shard_that_changes_after_it_was_indexed_stops_the_run(tmp_path):
    file = write_tar(tmp_path / "s.tar", 3)
    source = TarSource(file)
    os.utime(file, (1, 1))
    assert source.read(0).data["txt"] == "t"  # the same bytes under another date
    again = pickle.loads(pickle.dumps(source))
    os.truncate(file, 3000)
    with pytest.raises(SkipSample, match=r"s.tar: ends before byte"):
        source.read(2)
    with pytest.raises(
        SourceLost, match=r"s.tar: changed since it was indexed \(20,480 bytes then, 3,000 now\)"
    ):
        again.read(0)


def test_coco_gives_one_record_per_annotated_image(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "a.json").write_text(json.dumps(coco(3)))
    (tmp_path / "1.png").write_bytes(png())
    source = CocoSource(tmp_path / "a.json")
    record = source.read(0)
    assert len(source) == 1
    assert "2 images without annotations are left out" in caplog.text
    assert [a["id"] for a in record.data["annotations"]] == [1, 2]
    assert record.data["categories"][7]["name"] == "seven"
    assert record.open_image(record.data["image"]["file_name"]).size == (6, 4)
    record.data["annotations"].clear()
    assert len(source.read(0).data["annotations"]) == 2


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_coco_tables_must_be_there(tmp_path, key):
    (tmp_path / "a.json").write_text(json.dumps({k: v for k, v in coco().items() if k != key}))
    with pytest.raises(ValueError, match=f"a.json: no list '{key}' at the top level"):
        CocoSource(tmp_path / "a.json")


def test_broken_coco_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"images": [')
    with pytest.raises(ValueError, match="a.json:1: not valid JSON"):
        CocoSource(tmp_path / "a.json")


def test_parts_and_combinations(tmp_path):
    source = JsonlSource(write_jsonl(tmp_path / "a.jsonl", 10))

    def rows(part):
        return [part.read(i).data["i"] for i in range(len(part))]

    assert rows(SelectedSource(source, 3, 6)) == [3, 4, 5]
    assert rows(SelectedSource(source, 8, 60)) == [8, 9]
    shuffled = rows(SelectedSource(source, 0, 10, shuffle_seed=1))
    assert sorted(shuffled) == list(range(10)) != shuffled
    assert rows(SelectedSource(source, 2, 5, shuffle_seed=1)) == shuffled[2:5]
    assert rows(ConcatSource([SelectedSource(source, 0, 2), SelectedSource(source, 7, 9)])) == [0, 1, 7, 8]
    with pytest.raises(ValueError, match="records 10 to 12 were asked for, there are 10"):
        SelectedSource(source, 10, 12)


def test_sources_travel_to_workers(tmp_path):
    write_tar(tmp_path / "s.tar", 3)
    source = ConcatSource([JsonlSource(write_jsonl(tmp_path / "a.jsonl")), TarSource(tmp_path / "s.tar")])
    source.read(0), source.read(6)  # files are open
    again = pickle.loads(pickle.dumps(source))
    assert again.read(1).data == {"i": 1}
    assert again.read(7).data["json"] == {"caption": "c2"}
