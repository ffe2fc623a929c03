"""Videos: which frames are chosen, and reading them from folders, lists, animations and files."""

import io
import json
import sys
import types

import numpy as np
import pytest
import yaml
from PIL import Image

from data.dataset_base import Record, SkipSample
from data.mixture import build_groups, load_mixture
from data.rgb_image import RgbImage
from data.sources import JsonlSource
from data.transforms import ImageTransform
from data.video import FrameSampler, read_frames
from data.vlm_dataset import VlmDataset


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def fixed(count: int, sample: str = "middle") -> FrameSampler:
    return FrameSampler(max_num_frames=count, min_num_frames=count, sample=sample)


def frame(value: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (value, value, value))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def values(frames: list[RgbImage]) -> list[int]:
    return [int(np.asarray(Image.fromarray(f.rgb).convert("L"))[0, 0]) for f in frames]


def test_one_frame_of_each_stretch_is_drawn():
    drawn = [fixed(4, "rand").choose(40, 1.0, rng(seed)) for seed in range(300)]
    # The published draw never takes the last frame of a stretch.
    assert [{d[i] for d in drawn} for i in range(4)] == [set(range(10 * i, 10 * i + 9)) for i in range(4)]


def test_stretches_of_one_frame_give_a_random_subset_in_order():
    drawn = [fixed(4, "rand").choose(6, 1.0, rng(seed)) for seed in range(300)]
    assert all(d == sorted(set(d)) and len(d) == 4 for d in drawn)
    assert len({tuple(d) for d in drawn}) == 15  # every choice of 4 among 6


def test_the_middle_of_each_stretch():
    assert fixed(4).choose(40, 1.0, rng()) == [4, 14, 24, 34]
    assert fixed(3).choose(7, 1.0, rng()) == [0, 2, 5]


@pytest.mark.parametrize("sample", ["rand", "middle"])
def test_a_short_video_has_its_last_frame_again(sample):
    assert fixed(5, sample).choose(3, 1.0, rng()) == [0, 1, 2, 2, 2]


def test_the_number_of_frames_is_drawn_evenly():
    sampler = FrameSampler(max_num_frames=12, min_num_frames=8)
    counts = [len(sampler.choose(100, 1.0, rng(seed))) for seed in range(300)]
    assert set(counts) == {8, 9, 10, 11, 12} and min(counts.count(n) for n in range(8, 13)) > 30


def test_frames_per_second():
    assert FrameSampler(sample="fps2").choose(25, 10.0, rng()) == [2, 8, 12, 18, 22]
    assert FrameSampler(sample="fps1", max_num_frames=3, min_num_frames=1).choose(100, 10.0, rng()) == [
        5,
        15,
        25,
    ]
    assert FrameSampler(sample="fps0.1").choose(3, 1.0, rng()) == [0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"max_num_frame": 8}, "unknown key 'max_num_frame'; did you mean 'max_num_frames'"),
        ({"max_num_frames": 4}, "min_num_frames 8 exceeds max_num_frames 4"),
        ({"max_num_frames": 0}, "max_num_frames must be a positive whole number, not 0"),
        ({"sample": "random"}, "sample must be rand, middle or fpsN"),
        ({"sample": "fps0"}, "sample must be rand, middle or fpsN"),
        ([8, 12], "must have keys such as 'max_num_frames'"),
    ],
)
def test_bad_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        FrameSampler.from_args(args)


@pytest.fixture
def folder(tmp_path):
    """A data set of videos: a folder of frames whose numbers are not in the order of their names."""
    (tmp_path / "clip").mkdir()
    for n in (1, 2, 10, 20):
        frame(n).save(tmp_path / "clip" / f"shot_{n}.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"video": "clip/"}) + "\n")
    return tmp_path


def test_frames_of_a_folder_come_by_number(folder):
    record = JsonlSource(folder / "rows.jsonl").read(0)
    assert values(read_frames(record, ("clip/",), fixed(4), rng())) == [1, 2, 10, 20]


@pytest.mark.parametrize("name", ["gone/", "../"])
def test_a_folder_that_is_not_there_is_refused(folder, name):
    with pytest.raises(SkipSample, match=r"rows.jsonl:1: .*(gone|\.\.)"):
        read_frames(JsonlSource(folder / "rows.jsonl").read(0), (name,), fixed(4), rng())


def test_a_list_of_frames():
    files = {f"{n}.png": encoded(frame(n)) for n in range(10)}
    record = Record(data={}, where="rows.jsonl:1", fetch=files.__getitem__)
    assert values(read_frames(record, tuple(files), fixed(5), rng())) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(("kind", "name"), [("GIF", "a.gif"), ("WEBP", "a.webp"), ("PNG", "a.png")])
def test_an_animation(kind, name):
    frames = [frame(20 * n) for n in range(8)]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=500, **options)
    record = Record(data={}, where="rows.jsonl:1", fetch={name: content}.__getitem__)
    assert values(read_frames(record, (name,), fixed(4), rng())) == [0, 40, 80, 120]
    assert values(read_frames(record, (name,), FrameSampler(sample="fps1"), rng())) == [20, 60, 100, 140]


def test_a_broken_animation_is_refused():
    record = Record(data={}, where="rows.jsonl:1", fetch={"a.gif": b"GIF89a"}.__getitem__)
    with pytest.raises(SkipSample, match="rows.jsonl:1: video 'a.gif' is broken or not a video") as e:
        read_frames(record, ("a.gif",), fixed(4), rng())
    assert e.value.reason == "bad_video"
    with pytest.raises(SkipSample, match="video 'b.gif' cannot be read") as e:
        read_frames(record, ("b.gif",), fixed(4), rng())
    assert e.value.reason == "missing_video"


def test_a_video_file():
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for n in range(20):
            pixels = np.full((32, 32, 3), 10 * n, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    files = {"a.mp4": file.getvalue(), "cut.mp4": file.getvalue()[:300], "text.mp4": b"no video" * 50}
    record = Record(data={}, where="rows.jsonl:1", fetch=files.__getitem__)
    found = values(read_frames(record, ("a.mp4",), fixed(4), rng()))
    assert found == pytest.approx([20, 70, 120, 170], abs=6)  # the codec's own error; 10 a frame
    found = values(read_frames(record, ("a.mp4",), FrameSampler(sample="fps1"), rng()))
    assert found == pytest.approx([20, 80, 120, 180], abs=6)
    for name in ("cut.mp4", "text.mp4"):
        with pytest.raises(SkipSample, match=f"video '{name}' is broken or not a video"):
            read_frames(record, (name,), fixed(4), rng())


def test_a_video_file_without_its_decoder_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    record = Record(data={}, where="rows.jsonl:1", fetch={"a.mp4": b""}.__getitem__)
    with pytest.raises(ImportError, match=r"the video file 'a.mp4' needs av.*\[video\]"):
        read_frames(record, ("a.mp4",), fixed(4), rng())


def test_a_folder_without_frames_is_refused(folder):
    """It would be a question about nothing."""
    (folder / "empty").mkdir()
    with pytest.raises(SkipSample, match="rows.jsonl:1: the folder 'empty/' has no frames") as e:
        read_frames(JsonlSource(folder / "rows.jsonl").read(0), ("empty/",), fixed(4), rng())
    assert e.value.reason == "missing_video"


def test_a_missing_decoder_is_told_before_a_run(tmp_path, tokenizer, monkeypatch, caplog):
    """By the first video file among some rows; where they name none, by a line in the log."""

    def group(*videos: str) -> None:
        rows = [{"video": video, "message": MESSAGES} for video in videos] + [{"message": "not a row"}]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        place = {"vlm_sft": {"clips": {"jsonl_path": str(tmp_path / "rows.jsonl")}}}
        sizes = {"image_stride": 8, "max_image_size": 16, "min_image_size": 16}
        entry = {"dataset_names": ["clips"], "image_transform_args": sizes, "frame_sampler_args": {}}
        (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"dataset_info": place, "vlm_sft": entry}))
        build_groups(load_mixture(tmp_path / "mix.yaml"), tokenizer)

    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        ValueError,
        match=r"group 'vlm_sft': .*rows.jsonl:3: the video file 'c.mp4' needs PyAV, which is not inst",
    ):
        group("a.gif", "clip/", "c.mp4")
    assert "PyAV" not in caplog.text
    group("a.gif", "clip/")
    assert (
        "PyAV is not installed: the frames of 3 rows with `frame_sampler_args` may come from folders"
        in caplog.text
    )
    caplog.clear()
    monkeypatch.setitem(sys.modules, "av", types.SimpleNamespace(__spec__=object()))
    group("a.gif", "clip/", "c.mp4")
    assert "PyAV" not in caplog.text


# --------------------------------------------------------------------------------------------- rows with videos

VIT = ImageTransform(max_image_size=16, min_image_size=16, stride=8)
MESSAGES = [{"from": "human", "value": "<video>\nWhat moves?"}, {"from": "gpt", "value": "A 7."}]
FRAMES = {f"{n}.png": encoded(frame(n)) for n in range(10)}


def sample_of(tokenizer, row, **options):
    dataset = VlmDataset(tokenizer=tokenizer, vit_transform=VIT, **options)
    return dataset.to_sample(Record(data=row, where="rows.jsonl:1", fetch=FRAMES.__getitem__), rng())


SAMPLER = {"max_num_frames": 5, "min_num_frames": 5, "sample": "middle"}


def test_frames_stand_where_the_video_stands(tokenizer):
    row = {"video": list(FRAMES), "conversations": MESSAGES}
    sample = sample_of(tokenizer, row, frame_sampler_args=SAMPLER)
    assert [s.kind for s in sample.segments] == ["und_image"] * 5 + ["text"] * 2
    assert [int(s.pixels[0, 0, 0]) for s in sample.segments[:5]] == [0, 2, 4, 6, 8]
    assert tokenizer.decode(sample.segments[5].ids) == "What moves?"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": [{"from": "human", "value": "no place"}, MESSAGES[1]]}, "video_count"),
        ({"conversations": MESSAGES, "image": "1.png"}, "bad_video"),
        ({"conversations": MESSAGES, "video": ["1.png", "gone.png"]}, "missing_image"),
        ({"conversations": MESSAGES, "video": {"path": 3}}, "bad_video"),
        ({"conversations": [*MESSAGES, *MESSAGES]}, "video_count"),
    ],
)
def test_rows_whose_video_cannot_be_shown_are_refused(tokenizer, row, reason):
    row = {"video": list(FRAMES), **row}
    with pytest.raises(SkipSample) as e:
        sample_of(tokenizer, row, frame_sampler_args=SAMPLER)
    assert e.value.reason == reason


def test_a_video_needs_a_frame_sampler(tokenizer):
    with pytest.raises(SkipSample, match="add frame_sampler_args to the group"):
        sample_of(tokenizer, {"video": list(FRAMES), "conversations": MESSAGES})
