"""Two thousand corrupted inputs among good ones, in every format: each is rejected with its place, all good ones arrive."""

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.dataset_base import TaskDataset
from data.mixture import Group
from data.perception_dataset import ReasonSegDataset, ReferDataset
from data.policy import PackBudget
from data.sources import CocoSource, JsonlSource, ParquetSource, ReasonSegSource, Source, TarSource
from data.sources.record import IMAGE_ERRORS, decode_image
from data.stream import LaneStream, StreamPlan
from data.t2i_dataset import ParquetT2iDataset, T2iDataset
from data.transforms import ImageTransform
from data.types import LaneCursor, Reject
from data.vlm_dataset import VlmDataset
from tests.unit.data.toy_groups import LAYOUT

BAD = 400
"""Corrupted inputs per format."""

GOOD = 100
"""Good ones among them."""

TRANSFORM = ImageTransform(max_image_size=16, min_image_size=16, stride=16)
Rng = np.random.Generator


def png(size: tuple[int, int] = (12, 9), colour: tuple[int, int, int] = (9, 8, 7)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of a few hundred bytes that says it has 60,000 x 60,000 pixels."""
    content = bytearray(png())
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


PNG = png()
Spoil = Callable[[Rng], Any]


OUTSIDE = ("../outside.png", "/../outside.png", "a/../../outside.png", "/etc/hostname")
NO_PICTURE = ("gone.png", "folder", "pipe", "good.png/x", "a\0b", "y" * 300)


def cut(content: bytes, rng: Rng) -> bytes:
    return content[: int(rng.integers(1, len(content) - 1))]


def flip(content: bytes, rng: Rng, low: int = 0, high: int | None = None, bit: int | None = None) -> bytes:
    """One bit of one byte is another: of a PNG every such change shows in a checksum."""
    changed = bytearray(content)
    place = int(rng.integers(low, len(content) if high is None else high))
    changed[place] ^= 1 << (int(rng.integers(8)) if bit is None else bit)
    return bytes(changed)


BAD_PICTURES: tuple[Spoil, ...] = (
    lambda rng: cut(PNG, rng),
    lambda rng: flip(PNG, rng),
    lambda rng: b"",
    lambda rng: bomb(),
    lambda rng: rng.bytes(int(rng.integers(1, 400))),
    lambda rng: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage",
    lambda rng: b"GIF89a" + rng.bytes(40),
    lambda rng: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
)

ODD: tuple[Any, ...] = (None, 5, 1.5, True, "text", [], {}, [[]], [None], {"a": 1}, -1, 10**400, "\ud800")
"""Values of a type that is not asked for."""


# ------------------------------------------------------------------------------------------------ one format each


@dataclass(frozen=True)
class Built:
    """A data set on disk: what reads it, and what its good samples say."""

    source: Source
    dataset: TaskDataset
    good: set[str]
    bad: int


def mixed(rng: Rng) -> Iterator[bool]:
    """For each input whether it is good, in random order."""
    order = np.repeat([True, False], [GOOD, BAD])
    rng.shuffle(order)
    return iter(order.tolist())


def chat(text: Any, *images: Any) -> dict[str, Any]:
    said = [{"from": "human", "value": "<image>" * len(images)}, {"from": "gpt", "value": text}]
    return {"input_img": [{"path": image} for image in images], "message": said}


def jsonl(folder: Path, tokenizer: Any, rng: Rng) -> Built:
    data = folder / "images"
    data.mkdir()
    (folder / "outside.png").write_bytes(PNG)
    (data / "good.png").write_bytes(PNG)
    (data / "folder").mkdir()
    os.mkfifo(data / "pipe")

    def picture(content: bytes) -> str:
        name = f"{len(os.listdir(data))}.png"
        (data / name).write_bytes(content)
        return name

    def changed(row: dict[str, Any], key: str, value: Any) -> bytes:
        return json.dumps({**row, key: value}).encode()

    row = chat("Grüße", "good.png")
    line = json.dumps(row, ensure_ascii=False).encode()
    messages = (*(v for v in ODD if v not in (5,)), 5)
    turns = (
        [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "\ud800"}],
        [{"from": "human", "value": 5}],
        [{"from": "who", "value": "x"}],
        [5],
        [{}],
        [{"value": "x"}],
    )
    spoils: tuple[Spoil, ...] = (
        lambda rng: cut(line, rng),
        lambda rng: flip(line, rng, bit=7),  # no longer UTF-8
        lambda rng: json.dumps(row, ensure_ascii=False).encode("latin-1"),
        lambda rng: json.dumps(row).encode("utf-16" if rng.random() < 0.5 else "utf-32-be"),
        lambda rng: (
            json.dumps(ODD[int(rng.integers(len(ODD)))])
            .encode()
            .replace(b"{}", b"[]")
            .replace(b'{"a": 1}', b"1")
        ),
        lambda rng: b"[" * 100_000,
        lambda rng: b'{"message": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
        lambda rng: b'{"message": ' + b"9" * 5_000 + b"}",
        lambda rng: changed(row, "message", messages[int(rng.integers(len(messages)))]),
        lambda rng: changed(row, "message", turns[int(rng.integers(len(turns)))]),
        lambda rng: changed(row, "input_img", [{"path": ODD[int(rng.integers(len(ODD)))]}]),
        lambda rng: changed(row, "input_img", [5, "good.png"]),
        lambda rng: json.dumps(chat("x", OUTSIDE[int(rng.integers(len(OUTSIDE)))])).encode(),
        lambda rng: json.dumps(chat("x", NO_PICTURE[int(rng.integers(len(NO_PICTURE)))])).encode(),
        *(
            lambda rng, spoil=spoil: json.dumps(chat("x", picture(spoil(rng)))).encode()
            for spoil in BAD_PICTURES
        ),
    )
    lines, good = [], set()
    kinds = 0
    for is_good in mixed(rng):
        if is_good:
            good.add(f"good {len(good)}")
            lines.append(json.dumps(chat(f"good {len(good) - 1}", "good.png")).encode())
        else:
            lines.append(spoils[kinds % len(spoils)](rng).replace(b"\n", b" "))
            kinds += 1
    (folder / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return Built(
        JsonlSource(folder / "a.jsonl", data),
        VlmDataset(tokenizer=tokenizer, vit_transform=TRANSFORM),
        good,
        BAD,
    )


Members = list[tuple[tarfile.TarInfo, bytes]]


def member(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def tar(folder: Path, tokenizer: Any, rng: Rng) -> Built:
    def caption(value: Any) -> bytes:
        return json.dumps({"caption": value}).encode()

    text = caption("Grüße")
    odd = tuple(v for v in ODD if v not in ("text", "\ud800"))

    def sample(key: str, image: bytes = PNG, json_content: bytes = text) -> Members:
        return [member(f"{key}.json", json_content), member(f"{key}.png", image)]

    spoils: tuple[Callable[[str, Rng], Members], ...] = (
        lambda key, rng: sample(key, json_content=cut(text, rng)),
        lambda key, rng: sample(key, json_content=flip(text, rng, bit=7)),
        lambda key, rng: sample(
            key, json_content=json.dumps({"caption": "ü"}, ensure_ascii=False).encode("latin-1")
        ),
        lambda key, rng: sample(key, json_content=caption(odd[int(rng.integers(len(odd)))])),
        lambda key, rng: sample(key, json_content=b"[" * 20_000),
        lambda key, rng: [member(f"{key}.png", PNG), member(f"{key}.txt", b"\xff\xfe\xfa")],
        lambda key, rng: [member(f"{key}.json", text)],
        lambda key, rng: [member(f"{key}.png", PNG)],
        lambda key, rng: [member(f"/etc/{key}.json", text), member(f"/etc/{key}.png", PNG)],
        lambda key, rng: [member(f"../{key}.json", text), member(f"../{key}.png", PNG)],
        lambda key, rng: [
            member(f"{key}.json", text),
            member(f"{key}.png", type=tarfile.SYMTYPE, linkname="/etc/hostname"),
        ],
        lambda key, rng: [
            member(f"{key}.json", text),
            member(f"{key}.png", type=tarfile.LNKTYPE, linkname="0.png"),
        ],
        lambda key, rng: [member(f"{key}.json", text), member(f"{key}.png", type=tarfile.CHRTYPE)],
        lambda key, rng: [member(f"{key}.json", text), member(f"{key}.png", PNG, type=b"S")],
        *(lambda key, rng, spoil=spoil: sample(key, spoil(rng)) for spoil in BAD_PICTURES),
    )
    shards, count, good = 4, 0, set()
    files = [tarfile.open(folder / f"{i}.tar", "w", format=tarfile.GNU_FORMAT) for i in range(shards)]
    broken_headers: list[list[str]] = [[] for _ in range(shards)]
    for number, is_good in enumerate(mixed(rng)):
        if is_good:
            good.add(f"good {number}")
            members = sample(f"{number}", json_content=caption(f"good {number}"))
        elif number % 10 == 0:  # one member whose header is damaged below
            members = [member(f"damaged{number}.png", PNG)]
            broken_headers[number % shards].append(f"damaged{number}.png")
        else:
            members = spoils[count % len(spoils)](f"{number}", rng)
            count += 1
        for info, content in members:
            files[number % shards].addfile(info, io.BytesIO(content))
    for file, names in zip(files, broken_headers, strict=True):
        file.close()
        shard = bytearray(Path(file.name).read_bytes())
        for name in names:
            start = shard.index(name.encode() + b"\0")
            # Of the header, within name, size or checksum: fields beyond are zero, and so is their weight in the sum.
            shard[start : start + 512] = flip(bytes(shard[start : start + 512]), rng, 0, len(name))
        Path(file.name).write_bytes(shard)
    # And one shard more whose last record is cut off.
    with tarfile.open(folder / f"{shards}.tar", "w") as last:
        for info, content in (*sample("z0", json_content=caption("good z")), *sample("z1")):
            last.addfile(info, io.BytesIO(content))
    path = folder / f"{shards}.tar"
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"z1.json") + 700])
    good.add("good z")
    return Built(
        TarSource(folder / "{0..4}.tar"),
        T2iDataset(tokenizer=tokenizer, vae_transform=TRANSFORM),
        good,
        BAD + 1,
    )


def parquet(folder: Path, tokenizer: Any, rng: Rng) -> Built:
    write = pytest.importorskip("pyarrow.parquet").write_table
    arrow = pytest.importorskip("pyarrow")
    captions = json.dumps({"a": "ü"})
    spoils: tuple[Spoil, ...] = (
        lambda rng: (PNG, cut(captions.encode(), rng).decode()),
        lambda rng: (PNG, None),
        lambda rng: (PNG, json.dumps(("text", 5, [5], {"a": 5}, {"a": " "}, [])[int(rng.integers(6))])),
        lambda rng: (PNG, "[" * 20_000),
        lambda rng: (None, captions),
        lambda rng: (captions.encode(), captions),
        *(lambda rng, spoil=spoil: (spoil(rng), captions) for spoil in BAD_PICTURES),
    )
    rows, good, count = [], set(), 0
    for is_good in mixed(rng):
        if is_good:
            good.add(f"good {len(good)}")
            rows.append((PNG, json.dumps({"a": f"good {len(good) - 1}"})))
        else:
            rows.append(spoils[count % len(spoils)](rng))
            count += 1

    def table(rows: list[tuple[bytes | None, str | None]]) -> Any:
        return arrow.table(
            {"image": arrow.array([r[0] for r in rows], "binary"), "captions": [r[1] for r in rows]}
        )

    write(table(rows), folder / "a.parquet", row_group_size=16)
    # Four rows more in two row groups, the pages of one of which are damaged.
    last = folder / "b.parquet"
    more = [(PNG, json.dumps({"a": f"good {i}"})) for i in ("b0", "b1", "b2", "b3")]
    write(table(more), last, row_group_size=2, compression="none", write_page_checksum=True)
    content = last.read_bytes()
    place = content.index(PNG)
    last.write_bytes(content[:place] + flip(PNG, rng) + content[place + len(PNG) :])
    good |= {"good b2", "good b3"}
    return Built(
        ParquetSource(folder), ParquetT2iDataset(tokenizer=tokenizer, vae_transform=TRANSFORM), good, BAD + 2
    )


def coco(folder: Path, tokenizer: Any, rng: Rng) -> Built:
    (folder / "good.png").write_bytes(PNG)
    (folder / "outside").mkdir()
    image = {"file_name": "good.png"}
    thing = {
        "category_id": 1,
        "bbox": [1, 1, 4, 4],
        "expressions": ["it"],
        "segmentation": [[1, 1, 6, 1, 6, 6]],
    }
    images: list[Any] = []
    annotations: list[Any] = []

    def add(image: Any, *annotation: Any) -> None:
        number = len(images)
        images.append({"id": number, **image} if isinstance(image, dict) else image)
        annotations.extend({"image_id": number, **a} if isinstance(a, dict) else a for a in annotation)

    def picture(content: bytes) -> dict[str, str]:
        name = f"{len(images)}.png"
        (folder / name).write_bytes(content)
        return {"file_name": name}

    def odd(rng: Rng, *but: Any) -> Any:
        left = [v for v in ODD if not any(v is b for b in but)]
        return left[int(rng.integers(len(left)))]

    spoils: tuple[Callable[[Rng], None], ...] = (
        lambda rng: add(odd(rng, {}, ODD[6], ODD[9])),
        lambda rng: annotations.append(odd(rng)),
        lambda rng: add({"id": [1]}),
        lambda rng: add({"id": images[0]["id"]}),
        lambda rng: annotations.append({**thing, "image_id": f"none {len(annotations)}"}),
        lambda rng: annotations.append({**thing, "image_id": {}}),
        lambda rng: add({"file_name": odd(rng)}, thing),
        lambda rng: add(
            {"file_name": ("../good.png", "/../../x.png", "outside", "gone.png")[int(rng.integers(4))]}, thing
        ),
        lambda rng: add(image, {**thing, "bbox": odd(rng, None)}),
        lambda rng: add(image, {**thing, "bbox": [1, 1, "x", 4]}),
        lambda rng: add(image, {**thing, "bbox": [10**400, 1, 4, 4]}),
        lambda rng: add(image, {**thing, "bbox": [float("nan"), 1, 4, 4]}),
        lambda rng: add(image, {**thing, "bbox": [100, 100, 4, 4]}),
        lambda rng: add(image, {**thing, "segmentation": odd(rng, None)}),
        lambda rng: add(image, {**thing, "segmentation": [[1, 2, 3]]}),
        lambda rng: add(image, {**thing, "segmentation": {"size": [9, 12], "counts": odd(rng)}}),
        lambda rng: add(image, {**thing, "segmentation": {"size": [9, 12], "counts": [1, -5, 10**30]}}),
        lambda rng: add(image, {**thing, "segmentation": {"size": [9000, 12], "counts": [108]}}),
        lambda rng: add(image, {**thing, "category_id": odd(rng, True)}),
        lambda rng: add(image, {**thing, "expressions": odd(rng)}),
        *(lambda rng, spoil=spoil: add(picture(spoil(rng)), thing) for spoil in BAD_PICTURES),
    )
    good, count = {"good first"}, 0
    add(image, {**thing, "expressions": ["good first"]})
    for is_good in mixed(rng):
        if is_good:
            good.add(f"good {len(good)}")
            add(image, {**thing, "expressions": [f"good {len(good) - 1}"]})
        else:
            spoils[count % len(spoils)](rng)
            count += 1
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}
    (folder / "a.json").write_text(json.dumps(content))
    dataset = ReferDataset(
        tokenizer=tokenizer,
        vit_transform=TRANSFORM,
        box_templates=["{ref}"],
        mask_templates=["{ref}"],
        max_turns=1,
    )
    return Built(CocoSource(folder / "a.json"), dataset, good, BAD)


def reasonseg(folder: Path, tokenizer: Any, rng: Rng) -> Built:
    row = {
        "text": ["the thing"],
        "is_sentence": True,
        "shapes": [{"label": "target", "points": [[0, 0], [5, 0], [5, 5]]}],
    }
    content = json.dumps(row).encode()
    spoils: tuple[Callable[[Rng], tuple[bytes, bytes | None]], ...] = (
        lambda rng: (cut(content, rng), PNG),
        lambda rng: (flip(content, rng, 0, 1), PNG),
        lambda rng: (b"\x81" + content, PNG),  # neither UTF-8 nor cp1252
        lambda rng: (json.dumps(row).encode("utf-16-le"), PNG),
        lambda rng: (b"[" * 50_000, PNG),
        lambda rng: (b"", PNG),
        lambda rng: (json.dumps(ODD[int(rng.integers(len(ODD)))]).encode(), PNG),
        lambda rng: (json.dumps({**row, "text": ODD[int(rng.integers(4))]}).encode(), PNG),
        lambda rng: (json.dumps({**row, "shapes": ODD[int(rng.integers(len(ODD)))]}).encode(), PNG),
        lambda rng: (json.dumps({**row, "shapes": [{"points": [[10**400, 1]]}]}).encode(), PNG),
        lambda rng: (content, None),
        *(lambda rng, spoil=spoil: (content, spoil(rng)) for spoil in BAD_PICTURES),
    )
    good, count = set(), 0
    for number, is_good in enumerate(mixed(rng)):
        text, picture = json.dumps({**row, "text": [f"good {number}"]}).encode(), PNG
        if is_good:
            good.add(f"good {number}")
        else:
            text, picture = spoils[count % len(spoils)](rng)
            count += 1
        (folder / f"{number}.json").write_bytes(text)
        if picture is not None:
            (folder / f"{number}.jpg").write_bytes(picture)
    return Built(
        ReasonSegSource(folder), ReasonSegDataset(tokenizer=tokenizer, vit_transform=TRANSFORM), good, BAD
    )


FORMATS = (jsonl, tar, parquet, coco, reasonseg)


def read_all(built: Built, tokenizer: Any) -> tuple[list[str], list[Reject]]:
    """One epoch as the trainer reads it: what the samples say, and what was rejected."""
    group = Group(name="g", weight=1.0, is_mandatory=False, dataset=built.dataset, source=built.source)
    plan = StreamPlan(
        groups=(group,),
        layout=LAYOUT,
        special=tokenizer.special,
        budget=PackBudget(expected=900, maximum=1000, per_sample=1000, max_buffer=8),
        seed=0,
        num_lanes=1,
        max_reject_fraction=1.0,
    )
    stream = LaneStream(plan, LaneCursor(lane=0))
    records = len(built.source)
    said, rejects, seen = [], [], set()
    while len(seen) < records:
        for sample in stream.next_samples():
            if sample.origin.position < records:
                seen.add(sample.origin.position)
                said.append(" ".join(tokenizer.decode(s.ids) for s in sample.segments if s.kind == "text"))
        for reject in stream.take_rejects():
            if reject.position < records:
                seen.add(reject.position)
                rejects.append(reject)
    return said, rejects


@pytest.mark.parametrize("build", FORMATS, ids=lambda build: build.__name__)
def test_each_corrupted_input_is_rejected_with_its_place_and_the_good_ones_arrive(build, tmp_path, tokenizer):
    folder = tmp_path / "data"
    folder.mkdir()
    built = build(folder, tokenizer, np.random.default_rng(7))
    said, rejects = read_all(built, tokenizer)
    arrived = [text.strip().removeprefix("?").strip().split("<")[0].strip() for text in said]
    assert sorted(arrived) == sorted(built.good)
    assert len(rejects) == len(built.source) - len(built.good) >= built.bad >= BAD
    for reject in rejects:
        assert reject.where.startswith(str(folder)), reject
        assert reject.where in reject.message and "\n" not in reject.message and reject.reason
        reject.message.encode()
    places = [r.where.removeprefix(str(folder)) for r in rejects]
    assert all(":" in p or "#" in p or p.endswith(".json") for p in places)
    assert len(set(places)) == len(places)  # a place of its own each


def test_a_damaged_picture_of_any_format_is_a_picture_or_an_error_that_is_known():
    rng = np.random.default_rng(3)
    picture = Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8))
    for name in ("JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "PNG"):
        file = io.BytesIO()
        picture.save(file, name)
        whole, refused = file.getvalue(), 0
        assert decode_image(whole).size == (24, 20)
        for i in range(80):
            try:
                decode_image(cut(whole, rng) if i % 4 == 0 else flip(flip(whole, rng, 0, 60), rng))
            except IMAGE_ERRORS:
                refused += 1
        assert refused >= 20, name  # at least what is cut


def test_files_that_are_broken_as_a_whole_are_named_before_anything_is_read(tmp_path):
    rng = np.random.default_rng(5)
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    parquet.write_table(arrow.table({"image": [PNG]}), tmp_path / "whole")
    table, document = (
        (tmp_path / "whole").read_bytes(),
        b'{"images": [], "annotations": [], "categories": []}',
    )
    for i in range(40):
        for open_source, content, message in (
            (ParquetSource, cut(table, rng), "not a readable Parquet file"),
            (ParquetSource, flip(table, rng, len(table) - 4), "not a readable Parquet file"),
            (CocoSource, cut(document, rng), "not valid JSON"),
            (CocoSource, flip(document, rng, bit=7), "not valid JSON"),
            (TarSource, rng.bytes(2000), "not a readable, uncompressed tar"),
        ):
            file = tmp_path / f"{i}.broken"
            file.write_bytes(content)
            with pytest.raises(ValueError, match=rf"^{file}(:1)?: {message}"):
                open_source(file)
