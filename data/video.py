"""A video -> the few pictures of it that a sample shows.

A video is a folder of numbered frames, a list of frames, an animated picture (GIF, WebP, APNG), or a video file, which needs PyAV
(`pip install -e ".[video]"`).

Source: the frame sampler of upstream Bagel 056b5fd.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from data.rgb_image import RgbImage
from data.sources.record import IMAGE_ERRORS, Record, SkipSample
from modeling.optional import require

ANIMATED = (".gif", ".webp", ".png", ".apng")
STILL = (".jpg", ".jpeg")
FRAME_NUMBER = re.compile(r"(\d+)\.[a-z]+$", re.IGNORECASE)
FRAMES_PER_SECOND = 1.0
"""Of frames whose time nothing tells, as published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameSampler:
    """Which frames of a video are shown.

    Attributes:
        max_num_frames, min_num_frames: how many, drawn evenly between the two. A shorter video has its last frame again.
        sample: `rand` draws one frame of each of as many equal stretches, `middle` takes the one in the middle, `fps2` two per
            second from the beginning (`max_num_frames` at most).

    Raises:
        ValueError: naming the key that makes no sense.
    """

    max_num_frames: int = 12
    min_num_frames: int = 8
    sample: str = "rand"

    def __post_init__(self) -> None:
        for name in ("max_num_frames", "min_num_frames"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"frame_sampler_args.{name} must be a positive whole number, not {value!r}")
        if self.min_num_frames > self.max_num_frames:
            raise ValueError(
                f"frame_sampler_args: min_num_frames {self.min_num_frames} exceeds max_num_frames {self.max_num_frames}"
            )
        if self.sample not in ("rand", "middle") and self._per_second() <= 0:
            raise ValueError(
                f"frame_sampler_args.sample must be rand, middle or fpsN such as fps2, not {self.sample!r}"
            )

    @staticmethod
    def from_args(args: Mapping[str, Any]) -> "FrameSampler":
        """The sampler that the YAML's `frame_sampler_args` describe."""
        known = [f.name for f in fields(FrameSampler)]
        if not isinstance(args, Mapping):
            raise ValueError(f"frame_sampler_args must have keys such as {known[0]!r}, not {args!r}")
        for key in args:
            if key not in known:
                near = get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
                raise ValueError(f"frame_sampler_args: unknown key {key!r}; did you mean {near!r}?")
        return FrameSampler(**args)

    def choose(self, frames: int, fps: float, rng: np.random.Generator) -> list[int]:
        """Numbers of the frames to show, in order.

        Args:
            frames: how many there are, at least 1.
            fps: how many of them a second has.
            rng: of the sample.
        """
        if self.sample.startswith("fps"):
            return self._spaced(frames, fps)
        wanted = int(rng.integers(self.min_num_frames, self.max_num_frames + 1))
        edges = np.linspace(0, frames, min(wanted, frames) + 1).astype(int).tolist()
        if self.sample == "middle":
            chosen = [(low + high - 1) // 2 for low, high in pairwise(edges)]
        elif any(high - low < 2 for low, high in pairwise(edges)):
            chosen = np.sort(rng.permutation(frames)[: len(edges) - 1]).tolist()
        else:
            # As published, the last frame of a stretch is never drawn.
            chosen = [int(rng.integers(low, high - 1)) for low, high in pairwise(edges)]
        return chosen + chosen[-1:] * (wanted - len(chosen))

    def _spaced(self, frames: int, fps: float) -> list[int]:
        gap = 1.0 / self._per_second()
        seconds = np.arange(gap / 2, frames / fps + gap / 2, gap)
        chosen = [int(i) for i in np.around(seconds * fps) if i < frames]
        return chosen[: self.max_num_frames] or [0]

    def _per_second(self) -> float:
        try:
            return float(self.sample.removeprefix("fps")) if self.sample.startswith("fps") else 0.0
        except (ValueError, AttributeError):
            return 0.0


def read_frames(
    record: Record, video: Sequence[str], sampler: FrameSampler, rng: np.random.Generator
) -> list[RgbImage]:
    """The frames of a row's video that the sampler chooses.

    Args:
        record: reads what the row names.
        video: frames; or one folder of frames that ends with "/"; or one file.
        sampler, rng: choose among them.

    Raises:
        SkipSample: if the video or one of its frames is missing or broken.
        ImportError: if it is a video file and PyAV is not installed.
    """
    (first, *more) = video
    if not more and first.endswith("/"):
        frames: Sequence[str] = sorted(record.list_folder(first), key=_frame_number)
        if not frames:
            message = f"{record.where}: the folder {first!r} has no frames; restore them or remove the record"
            raise SkipSample("missing_video", message)
    elif more or first.lower().endswith(STILL):
        frames = video
    else:
        read = _read_file if file_for_pyav(video) else _read_animation
        return read(record, first, sampler, rng)
    return [record.open_image(frames[i]) for i in sampler.choose(len(frames), FRAMES_PER_SECOND, rng)]


def file_for_pyav(video: Sequence[str]) -> str:
    """The file of a row's `video` that PyAV reads; "" where it is a folder, a list, an animated picture, or there is none."""
    if len(video) != 1 or video[0].endswith("/") or video[0].lower().endswith((*STILL, *ANIMATED)):
        return ""
    return video[0]


def _frame_number(path: str) -> tuple[int, str]:
    number = FRAME_NUMBER.search(path)
    return (int(number[1]) if number else -1), path


def _read_animation(
    record: Record, name: str, sampler: FrameSampler, rng: np.random.Generator
) -> list[RgbImage]:
    content = record.read_file(name, "video")
    try:
        with Image.open(io.BytesIO(content), formats=("GIF", "WEBP", "PNG")) as picture:
            picture.load()  # of a WebP, the first frame's duration is known only then
            count = int(getattr(picture, "n_frames", 1))
            duration_ms = float(picture.info.get("duration") or 0)
            frames = []
            for i in sampler.choose(count, 1000 / duration_ms if duration_ms else FRAMES_PER_SECOND, rng):
                picture.seek(i)
                frame = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
                frames.append(RgbImage.of(frame))
    except IMAGE_ERRORS as e:
        raise _broken(record, name, e) from e
    return frames


def _read_file(record: Record, name: str, sampler: FrameSampler, rng: np.random.Generator) -> list[RgbImage]:
    content = record.read_file(name, "video")
    av = require("av", package="av", extra="video", why=f"the video file {name!r}")
    try:
        with av.open(io.BytesIO(content)) as container:
            stream = container.streams.video[0]
            fps = float(stream.average_rate or 0) or FRAMES_PER_SECOND
            count = sum(1 for packet in container.demux(stream) if packet.size)
        chosen = sampler.choose(max(count, 1), fps, rng)
        with av.open(io.BytesIO(content)) as container:
            decoded: dict[int, RgbImage] = {}
            for i, frame in enumerate(container.decode(video=0)):
                if i in chosen:
                    decoded[i] = RgbImage(frame.to_ndarray(format="rgb24"))
                if i >= chosen[-1]:
                    break
        return [decoded[i] for i in chosen]
    except (av.FFmpegError, LookupError, *IMAGE_ERRORS) as e:
        raise _broken(record, name, e) from e


def _broken(record: Record, name: str, error: BaseException) -> SkipSample:
    what = " ".join(str(error).split()) or type(error).__name__
    message = (
        f"{record.where}: video {name!r} is broken or not a video ({what}); replace it or remove the record"
    )
    return SkipSample("bad_video", message)
