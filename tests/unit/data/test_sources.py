import io
import json
import logging
import os
import pickle
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from data.sources import (
    CocoSource,
    ConcatSource,
    JsonlSource,
    ParquetSource,
    ReasonSegSource,
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


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf \n"])
def test_one_json_list_in_the_place_of_lines_is_called_so(tmp_path, start):
    """LLaVA's own files are lists."""
    (tmp_path / "llava.json").write_bytes(start + json.dumps([{"id": 1}, {"id": 2}], indent=1).encode())
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n[1]\n')
    source = JsonlSource(tmp_path / "llava.json")
    for row in range(len(source)):
        with pytest.raises(
            SkipSample, match=r"llava.json:\d+: .*; the file is one JSON list: write a row per line"
        ):
            source.read(row)
    with pytest.raises(
        SkipSample, match="rows.jsonl:2: expected a JSON object, found list; correct or remove"
    ):
        JsonlSource(tmp_path / "rows.jsonl").read(1)


def test_a_record_with_two_members_of_one_kind_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("0.txt", b"a"), ("0.png", png()), ("0.txt", b"b"), ("1.txt", b"c")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    source = TarSource(tmp_path / "a.tar")
    with pytest.raises(SkipSample, match=r"a.tar#0: two members .txt, '0.txt' is the second"):
        source.read(0)
    assert source.read(1).data["txt"] == "c"


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
    assert record.open_image("/x.png").rgb[0, 0].tolist() == [200, 10, 10]


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
    with pytest.raises(
        SourceLost, match=r"s.tar: ends before byte [\d,]+, it had 20,480 when it was indexed"
    ):
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


# ------------------------------------------------------------------------------------------------------------ index


@pytest.mark.parametrize("place", [0.02, 0.3, 0.6, 0.97])
def test_a_flipped_bit_in_an_index_is_no_fault_of_the_records(tmp_path, caplog, place):
    caplog.set_level(logging.INFO)
    file = write_jsonl(tmp_path / "a.jsonl", 50)
    JsonlSource(file)
    kept = tmp_path / "a.jsonl.index.safetensors"
    content = bytearray(kept.read_bytes())
    content[int(len(content) * place)] ^= 16
    kept.write_bytes(content)
    source = JsonlSource(file)
    assert [source.read(i).data["i"] for i in range(50)] == list(range(50))
    assert "the index is made anew" in caplog.text


def test_only_the_file_that_changed_is_read_again(tmp_path, monkeypatch):
    for i in range(3):
        write_jsonl(tmp_path / f"{i}.jsonl", 2 + i)
    assert len(JsonlSource(tmp_path / "*.jsonl")) == 9
    assert len([p for p in tmp_path.iterdir() if p.name.endswith(".index.safetensors")]) == 1
    write_jsonl(tmp_path / "1.jsonl", 7)
    read = []
    build_file = index.build_file
    monkeypatch.setattr(
        index, "build_file", lambda build, path, tick: read.append(path) or build_file(build, path, tick)
    )
    source = JsonlSource(tmp_path / "*.jsonl")
    assert read == [f"{tmp_path}/1.jsonl"]
    assert [source.read(i).where for i in (1, 2, 8, 9, 12)] == [
        f"{tmp_path}/{at}" for at in ("0.jsonl:2", "1.jsonl:1", "1.jsonl:7", "2.jsonl:1", "2.jsonl:4")
    ]


def test_same_size_and_date_with_another_head_is_another_file(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"i": 1}\n')
    os.utime(file, (1, 1))
    JsonlSource(file)
    file.write_text('{"i":1}\n\n')
    os.utime(file, (1, 1))
    assert JsonlSource(file).read(0).data == {"i": 1}
    file.write_text('\n\n{"i":1}')
    os.utime(file, (1, 1))
    assert JsonlSource(file).read(0).where == f"{file}:3"


def test_files_are_indexed_in_processes_with_progress(tmp_path, monkeypatch, caplog):
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", 2 + i)
    alone = TarSource(tmp_path / "{0..2}.tar", tmp_path / "cache")
    monkeypatch.setattr(index, "SMALL_BYTES", 0)
    caplog.set_level(logging.INFO)
    together = TarSource(tmp_path / "*.tar", tmp_path / "other")
    assert "index of" in caplog.text and "0.tar and 2 more: " in caplog.text
    assert [together.read(i).where for i in range(9)] == [alone.read(i).where for i in range(9)]
    (tmp_path / "1.tar").write_text("no tar" * 200)
    with pytest.raises(ValueError, match="1.tar: not a readable, uncompressed tar"):
        TarSource(tmp_path / "*.tar", tmp_path / "other")


def test_the_cache_directory_may_be_given(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "data" / "a.jsonl")
    JsonlSource(file, cache_dir=tmp_path / "flag")
    monkeypatch.setenv(index.CACHE_VARIABLE, str(tmp_path / "variable"))
    JsonlSource(file)
    assert [p.name for p in file.parent.iterdir()] == ["a.jsonl"]
    assert len(list((tmp_path / "flag").iterdir())) == len(list((tmp_path / "variable").iterdir())) == 1
    with pytest.raises(ValueError, match="a.jsonl: cannot write here; choose another --index_cache_dir"):
        JsonlSource(file, cache_dir=file)


def test_an_index_is_small_and_mapped(tmp_path):
    source = JsonlSource(write_jsonl(tmp_path / "a.jsonl", 5000))
    assert (tmp_path / "a.jsonl.index.safetensors").stat().st_size < 5000 * 8 + 1000
    assert len(pickle.dumps(source)) < 1000
    (part,) = source.index.parts
    assert not part["start"].flags.owndata and not part["start"].flags.writeable


def test_an_index_made_anew_by_another_run_is_noticed_by_workers(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl")
    travelling = pickle.dumps(JsonlSource(file))
    write_jsonl(file, 7)
    JsonlSource(file)
    with pytest.raises(SourceLost, match="another process has indexed the data anew"):
        pickle.loads(travelling)


def test_processes_that_start_together_build_one_index(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    file = write_jsonl(tmp_path / "a.jsonl")
    built = []
    build = index._build

    def slowly(*args):
        built.append(threading.get_ident())
        deadline = time.monotonic() + 10
        while "waiting for the process that builds an index here" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return build(*args)

    monkeypatch.setattr(index, "_build", slowly)
    with ThreadPoolExecutor(2) as pool:
        sources = list(pool.map(JsonlSource, [file, file]))
    assert len(built) == 1 and [len(s) for s in sources] == [5, 5]


def test_indexes_are_no_shards(tmp_path):
    write_tar(tmp_path / "s-0.tar", 1)
    write_tar(tmp_path / "s-1.tar", 1)
    assert [len(TarSource(tmp_path / "s-*")) for _ in range(2)] == [2, 2]


# ------------------------------------------------------------------------------------------------ lost and refused


def test_a_file_that_vanishes_is_waited_for_and_then_ends_the_run(tmp_path, monkeypatch, caplog):
    file = write_jsonl(tmp_path / "a.jsonl")
    source = JsonlSource(file)
    pauses = []
    monkeypatch.setattr(time, "sleep", lambda s: pauses.append(s) or (len(pauses) == 2 and away.rename(file)))
    away = file.rename(tmp_path / "away")
    assert source.read(0).data == {"i": 0}  # came back during the second pause
    assert pauses == [0.5, 1.0] and "trying again in 0.5 s" in caplog.text
    again = pickle.loads(pickle.dumps(source))
    file.rename(away)
    pauses[:] = [0] * 2
    with pytest.raises(
        SourceLost, match=r"a.jsonl: cannot be read any more, 8 times within 61.5 s .*--auto_resume"
    ):
        again.read(0)
    assert pauses[2:] == [0.5, 1, 2, 4, 8, 16, 30]


def test_a_data_directory_that_vanishes_is_no_fault_of_the_row(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    record = JsonlSource(write_jsonl(tmp_path / "a.jsonl"), tmp_path / "images").read(0)
    monkeypatch.setattr(time, "sleep", lambda s: None)
    (tmp_path / "images").rmdir()
    with pytest.raises(SourceLost, match=r"images/x.png: cannot be read any more"):
        record.open_image("x.png")


@pytest.mark.parametrize(
    "name", ["../secret.png", "/../secret.png", "a/../../secret.png", "/a/../../images/../secret.png"]
)
def test_a_path_that_leaves_the_data_directory_is_refused(tmp_path, name):
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    record = JsonlSource(write_jsonl(tmp_path / "a.jsonl"), tmp_path / "images").read(1)
    with pytest.raises(SkipSample, match=r"a.jsonl:2: '.*' leads out of .*/images") as e:
        record.open_image(name)
    assert e.value.reason == "unsafe_path"
    (tmp_path / "images" / "..png").write_bytes(png())
    assert record.open_image("a/../..png").size == (6, 4)


def test_pipes_and_folders_are_no_pictures_and_nobody_waits_for_them(tmp_path):
    record = JsonlSource(write_jsonl(tmp_path / "a.jsonl")).read(0)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe.png", "folder.png", "nul\0.png", "x" * 300, 5):
        with pytest.raises(SkipSample, match="cannot be read") as e:
            record.open_image(name)
        assert e.value.reason == "missing_image"


def test_a_small_file_that_claims_a_huge_picture_is_refused(tmp_path):
    bomb = tmp_path / "bomb.png"
    record = JsonlSource(write_jsonl(tmp_path / "a.jsonl")).read(0)
    for size in (16000, 10000):  # Pillow itself refuses the first, and only warns of the second
        Image.new("1", (size, size)).save(bomb)
        assert bomb.stat().st_size < 50_000
        with pytest.raises(
            SkipSample, match="a.jsonl:1: image 'bomb.png' is larger than may be decoded"
        ) as e:
            record.open_image("bomb.png")
        assert e.value.reason == "too_large"


@pytest.mark.parametrize("root", ["", "file://"])
def test_a_file_that_is_too_large_for_a_picture_is_not_read(tmp_path, root):
    (tmp_path / "images").mkdir()
    with (tmp_path / "images" / "x.png").open("wb") as file:
        file.truncate((1 << 28) + 1)
    record = JsonlSource(write_jsonl(tmp_path / "a.jsonl"), f"{root}{tmp_path}/images").read(2)
    with pytest.raises(
        SkipSample, match=r"a.jsonl:3: .*x.png has 268,435,457 bytes, the limit is 268,435,456"
    ) as e:
        record.open_image("x.png")
    assert e.value.reason == "too_large"


def test_a_picture_format_that_starts_programs_is_not_opened(tmp_path):
    (tmp_path / "x.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    )
    record = JsonlSource(write_jsonl(tmp_path / "a.jsonl")).read(0)
    with pytest.raises(SkipSample, match="broken or not an image"):
        record.open_image("x.png")


def tar_member(tar, name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_folders_and_dates_of_all_tar_dialects_are_read(tmp_path, tar_format):
    names = ["a/" + "b" * 60 + "/" + "c" * 80, "ünï", "./d.e/x"]
    with tarfile.open(tmp_path / "s.tar", "w", format=tar_format) as tar:
        tar_member(tar, "a", type=tarfile.DIRTYPE)
        for name in names:
            tar_member(tar, f"{name}.txt", name.encode())
            tar_member(tar, f"{name}.Seg.PNG", png(), mtime=1.5 if tar_format == tarfile.PAX_FORMAT else 1)
    source = TarSource(tmp_path / "s.tar")
    for i, name in enumerate(names):
        assert source.read(i).data == {"__key__": name, "txt": name}
        assert source.read(i).open_image("seg.png").size == (6, 4)


@pytest.mark.parametrize(
    "name, fields",
    [
        ("b.txt", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("b.txt", {"type": tarfile.LNKTYPE, "linkname": "a.txt"}),
        ("b.txt", {"type": tarfile.FIFOTYPE}),
        ("/etc/b.txt", {}),
        ("x/../../b.txt", {}),
    ],
)
def test_hostile_members_are_refused_and_the_others_read(tmp_path, name, fields):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar_member(tar, "a.txt", b"a")
        tar_member(tar, name, **fields)
        tar_member(tar, "c.txt", b"c")
    source = TarSource(tmp_path / "s.tar")
    assert [source.read(i).data["txt"] for i in (0, 2)] == ["a", "c"]
    with pytest.raises(SkipSample, match=f"s.tar#{name}: ") as e:
        source.read(1)
    assert e.value.reason == "unsafe_member"


def test_shards_put_end_to_end_are_read_to_the_last(tmp_path):
    parts = [write_tar(tmp_path / f"{i}.tar", 2, first=2 * i).read_bytes() for i in range(3)]
    (tmp_path / "all.tar").write_bytes(b"".join(parts))
    source = TarSource(tmp_path / "all.tar")
    assert [source.read(i).data["json"]["caption"] for i in range(len(source))] == [f"c{i}" for i in range(6)]


def test_a_damaged_header_costs_its_member_only(tmp_path):
    file = write_tar(tmp_path / "s.tar", 4)
    content = bytearray(file.read_bytes())
    second = content.index(b"0001.json")  # its header
    content[second + 3] ^= 4
    file.write_bytes(content)
    source = TarSource(file)
    read, refused = [], []
    for i in range(len(source)):
        try:
            read.append(source.read(i).data)
        except SkipSample as e:
            refused.append(e)
    assert [r["json"]["caption"] for r in read if "json" in r] == ["c0", "c2", "c3"]
    (damage,) = refused
    assert damage.reason == "bad_tar"
    assert damage.message.startswith(
        f"{file}#byte {second - len('some/dir/')}: a header whose checksum does not match"
    )


# ----------------------------------------------------------------------------------------------------------- remote


@pytest.fixture
def remote(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    write_tar(tmp_path / "s-000.tar", 3)
    write_tar(tmp_path / "s-001.tar", 2, first=3)
    for name in ("s-000.tar", "s-001.tar"):
        fs.pipe(f"/shards/{name}", (tmp_path / name).read_bytes())
    yield fs
    fs.store.clear()


@pytest.mark.parametrize("pattern", ["s-{000..001}.tar", "s-*.tar"])
@pytest.mark.parametrize("scheme", ["memory://", "file://"])
def test_remote_shards_are_read_by_ranges(tmp_path, remote, monkeypatch, scheme, pattern):
    base = f"memory://shards/{pattern}" if scheme == "memory://" else f"file://{tmp_path}/{pattern}"
    source = TarSource(base, tmp_path / "cache")
    assert len(source) == 5
    monkeypatch.setattr(type(remote), "open", lambda *_, **__: pytest.fail("the whole file was opened"))
    assert [source.read(i).data["json"]["caption"] for i in (4, 2, 3, 0)] == ["c4", "c2", "c3", "c0"]
    assert source.read(3).where.endswith(
        "shards/s-001.tar#some/dir/0003" if scheme == "memory://" else "0003"
    )
    monkeypatch.setattr(index, "_build", lambda *_: pytest.fail("the index was built again"))
    assert pickle.loads(pickle.dumps(TarSource(base, tmp_path / "cache"))).read(1).open_image("png").size == (
        6,
        4,
    )


def test_remote_rows_and_pictures(tmp_path, remote, monkeypatch):
    remote.pipe("/set/rows.jsonl", b'{"i": 0}\n\n{"i": 1}\n')
    remote.pipe("/set/images/x.png", png())
    source = JsonlSource("memory://set/rows.jsonl", "memory://set/images", tmp_path / "cache")
    record = source.read(1)
    assert record.where == "memory://set/rows.jsonl:3" and record.open_image("/x.png").size == (6, 4)
    with pytest.raises(SkipSample, match="image 'gone.png' cannot be read"):
        record.open_image("gone.png")
    with pytest.raises(SkipSample, match="leads out of"):
        record.open_image("../rows.jsonl")
    monkeypatch.setattr(time, "sleep", lambda s: None)
    remote.rm("/set/rows.jsonl")
    with pytest.raises(SourceLost, match="rows.jsonl: cannot be read any more"):
        source.read(0)


def test_a_remote_file_that_is_not_there_is_named(tmp_path, remote):
    with pytest.raises(ValueError, match="memory://shards/t.tar: no such file; check 'tar_path'"):
        TarSource("memory://shards/t.tar", tmp_path)
    with pytest.raises(ValueError, match="nosuch://a.tar: .*nosuch"):
        TarSource("nosuch://a.tar", tmp_path)


class Busy(Exception):
    """What a store raises that answers with 503: of no kind that we know."""


def failing(times, method, error=Busy):
    """A method that fails so often before it works."""
    left = [times]

    def replacement(*args, **kwargs):
        left[0] -= 1
        if left[0] >= 0:
            raise error("503")
        return method(*args, **kwargs)

    return replacement


@pytest.mark.parametrize("method", ["info", "cat_file", "open", "glob"])
def test_a_busy_store_is_asked_again_at_the_start(tmp_path, remote, monkeypatch, caplog, method):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(type(remote), method, failing(2, getattr(type(remote), method)))
    assert len(TarSource("memory://shards/s-*.tar", tmp_path / "cache")) == 5
    assert (
        slept
        and set(slept) <= {0.5, 1.0}
        and "cannot be read (Busy: 503), trying again in 0.5 s" in caplog.text
    )


@pytest.mark.parametrize("method", ["info", "cat_file", "open", "glob"])
def test_a_store_that_goes_on_failing_is_no_missing_file(tmp_path, remote, monkeypatch, method):
    monkeypatch.setattr(time, "sleep", lambda s: None)
    monkeypatch.setattr(type(remote), method, failing(10**6, getattr(type(remote), method)))
    with pytest.raises(ValueError, match=r"memory://.*\.tar: cannot be (read|reached) \(Busy: 503\)"):
        TarSource(
            "memory://shards/s-*.tar" if method == "glob" else "memory://shards/s-000.tar", tmp_path / "c"
        )


@pytest.mark.parametrize("status, said", [(503, r"cannot be reached \(Busy: 503\)"), (404, "no such file")])
def test_a_failing_server_that_fsspec_calls_a_missing_file(tmp_path, remote, monkeypatch, status, said):
    def info(*_, **__):
        error = Busy(str(status))
        error.status = status  # as aiohttp's has
        raise FileNotFoundError("memory://shards/s-000.tar") from error

    monkeypatch.setattr(time, "sleep", lambda s: None)
    monkeypatch.setattr(type(remote), "info", info)
    with pytest.raises(ValueError, match=f"s-000.tar: {said}"):
        TarSource("memory://shards/s-000.tar", tmp_path / "cache")


def test_a_server_that_knows_no_ranges_is_found_out(tmp_path, remote, monkeypatch):
    """It sends the whole file, so every record would be the first one."""
    source = TarSource("memory://shards/s-000.tar", tmp_path / "cache")
    cat = type(remote).cat_file
    monkeypatch.setattr(type(remote), "cat_file", lambda fs, path, start=None, end=None: cat(fs, path))
    with pytest.raises(SourceLost, match=r"s-000.tar: [\d,]+ bytes came where [\d,]+ were asked for: .* no"):
        source.read(2)
    remote.pipe("/shards/large.tar", remote.cat("/shards/s-000.tar") + bytes(1 << 16))
    with pytest.raises(ValueError, match="large.tar: .* bytes came where 65,536 were asked for"):
        TarSource("memory://shards/large.tar", tmp_path / "cache")


def test_a_remote_file_that_changes_during_a_run_stops_it(tmp_path, remote):
    source = TarSource("memory://shards/s-000.tar", tmp_path / "cache")
    there = remote.cat("/shards/s-000.tar")
    remote.pipe("/shards/s-000.tar", there)  # put there anew: another date, the same head
    assert source.read(2).data["json"]["caption"] == "c2"
    remote.pipe("/shards/s-000.tar", write_tar(tmp_path / "other.tar", 3, first=7).read_bytes())
    with pytest.raises(SourceLost, match="s-000.tar: changed since it was indexed"):
        pickle.loads(pickle.dumps(source)).read(2)


def test_a_range_that_runs_backwards_is_named(tmp_path):
    with pytest.raises(ValueError, match="the range ends before it begins; check 'tar_path'"):
        TarSource(tmp_path / "s-{002..000}.tar")


# ---------------------------------------------------------------------------------------------------------- parquet


def write_parquet(path, rows, rows_per_group=2, **options):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=rows_per_group, **options)
    return path


def drawings(count, first=0):
    return [
        {"image": png((first + i, 0, 0)), "captions": json.dumps({"a": f"c{first + i}"})}
        for i in range(count)
    ]


def test_parquet_rows_have_names_in_the_place_of_bytes(tmp_path):
    write_parquet(tmp_path / "set" / "b.parquet", drawings(2, first=3))
    write_parquet(tmp_path / "set" / "a.parquet", drawings(3))
    source = pickle.loads(pickle.dumps(ParquetSource(tmp_path / "set")))
    assert len(source) == 5
    record = source.read(4)
    assert record.data == {"image": "image", "captions": '{"a": "c4"}'}
    assert record.where == f"{tmp_path}/set/b.parquet#row 1"
    assert [source.read(i).open_image("image").rgb[0, 0, 0] for i in (2, 0, 4, 1, 3)] == [
        2,
        0,
        4,
        1,
        3,
    ]
    with pytest.raises(SkipSample, match="'captions' cannot be read .*cells with bytes are image"):
        record.open_image("captions")


def test_lists_and_hugging_face_pictures_in_parquet(tmp_path):
    row = {
        "image_list": [png((1, 0, 0)), png((2, 0, 0))],
        "instruction_list": [["Paint it.", "Paint."]],
        "picture": {"bytes": png((3, 0, 0)), "path": "x.png"},
        "none": None,
    }
    record = ParquetSource(write_parquet(tmp_path / "a.parquet", [row])).read(0)
    assert record.data == {
        "image_list": ["image_list/0", "image_list/1"],
        "instruction_list": [["Paint it.", "Paint."]],
        "picture": "picture",
        "none": None,
    }
    assert [record.open_image(n).rgb[0, 0, 0] for n in (*record.data["image_list"], "picture")] == [
        1,
        2,
        3,
    ]


def test_remote_parquet(tmp_path, remote):
    for name in ("a", "b"):
        remote.pipe(
            f"/set/{name}.parquet", write_parquet(tmp_path / f"{name}.parquet", drawings(3)).read_bytes()
        )
    source = pickle.loads(pickle.dumps(ParquetSource("memory://set", cache_dir=tmp_path / "cache")))
    assert len(source) == 6
    assert source.read(5).where.endswith("/set/b.parquet#row 2")
    assert source.read(5).open_image("image").rgb[0, 0, 0] == 2


def test_the_published_list_of_row_groups(tmp_path):
    for name in ("a", "b", "c"):
        write_parquet(tmp_path / "set" / f"{name}.parquet", drawings(3))
    info = tmp_path / "info.json"
    stated = {
        f"{tmp_path}/set/b.parquet": {"num_row_groups": 2},
        "/elsewhere/c.parquet": {"num_row_groups": 2},
    }
    info.write_text(json.dumps(stated))
    source = ParquetSource(tmp_path / "set", info)
    assert len(source) == 6 and source.read(0).where == f"{tmp_path}/set/b.parquet#row 0"
    for wrong, message in (
        ({"/elsewhere/d.parquet": {"num_row_groups": 2}}, "d.parquet is not among the 3 Parquet files"),
        ({"a.parquet": {"num_row_groups": 5}}, "a.parquet: 2 row groups, .*info.json says 5"),
        ({"a.parquet": 2}, "info.json: expected"),
        ([], "info.json: expected"),
    ):
        info.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=message):
            ParquetSource(tmp_path / "set", info)


def test_row_groups_are_kept_up_to_a_limit(tmp_path, monkeypatch, caplog):
    from data.sources import parquet

    source = ParquetSource(write_parquet(tmp_path / "a.parquet", drawings(8)))
    source.read(0)
    size = next(iter(source._groups.values())).nbytes
    monkeypatch.setattr(parquet, "KEPT_BYTES", 2 * size + 100)
    for i in range(8):
        source.read(i)
        assert len(source._groups) <= 2
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 10)
    with pytest.raises(SkipSample, match=r"#row 0: row group 0 unpacks to [\d,]+ bytes"):
        source.read(0)
    monkeypatch.setattr(parquet, "LARGE_GROUP_BYTES", 10)
    ParquetSource(tmp_path / "a.parquet")
    assert "costs a whole one" in caplog.text


def test_broken_parquet_is_named(tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "a.parquet", drawings(4), compression="none", write_page_checksum=True)
    content = bytearray(file.read_bytes())
    (tmp_path / "cut.parquet").write_bytes(content[:-3])
    with pytest.raises(ValueError, match="cut.parquet: not a readable Parquet file"):
        ParquetSource(tmp_path / "cut.parquet")
    content[content.index(b"IDAT")] ^= 1  # in the first row group
    file.write_bytes(content)
    source = ParquetSource(file)
    with pytest.raises(SkipSample, match="a.parquet#row 1: row group 0 cannot be read") as e:
        source.read(1)
    assert e.value.reason == "bad_row_group"
    assert source.read(2).data["captions"] == '{"a": "c2"}'
    monkeypatch.setattr(time, "sleep", lambda s: None)
    again = pickle.loads(pickle.dumps(source))
    file.unlink()
    with pytest.raises(SourceLost, match="a.parquet: cannot be read any more"):
        again.read(2)


# -------------------------------------------------------------------------------------------------------- ReasonSeg


def test_reasonseg_folders(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    row = {
        "text": ["the thing"],
        "is_sentence": False,
        "shapes": [{"label": "target", "points": [[0, 0], [1, 1]]}],
    }
    for name, encoding in (("b", "utf-8"), ("a", "cp1252")):
        (folder / f"{name}.jpg").write_bytes(png())
        content = json.dumps({**row, "text": ["the café"]}, ensure_ascii=False)
        (folder / f"{name}.json").write_bytes(content.encode(encoding))
    (folder / "alone.jpg").write_bytes(png())
    (folder / "c.json").write_text("[")
    source = pickle.loads(pickle.dumps(ReasonSegSource(folder)))
    assert len(source) == 3
    for i, name in enumerate("ab"):
        record = source.read(i)
        assert record.data == {**row, "text": ["the café"], "image": f"{name}.jpg"}
        assert record.where == f"{folder}/{name}.json"
        assert record.open_image(record.data["image"]).size == (6, 4)
    with pytest.raises(SkipSample, match="c.json: not valid JSON"):
        source.read(2)
    (folder / "d.json").write_text("{}")
    assert len(ReasonSegSource(folder)) == 4
    with pytest.raises(SkipSample, match=r"d.json: image 'd.jpg' cannot be read"):
        ReasonSegSource(folder).read(3).open_image("d.jpg")
    with pytest.raises(ValueError, match="gone: no such folder; check 'reasonseg_path'"):
        ReasonSegSource(tmp_path / "gone")
