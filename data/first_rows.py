"""Some rows of a group, looked at before a run: what they ask for and the run does not have is told then, not at a pack."""

import importlib.util
import logging
from collections.abc import Iterator

from data.dataset_base import RECORD_ERRORS, SkipSample, TaskDataset
from data.sources import Record, Source

logger = logging.getLogger(__name__)

LOOKED_AT = 32
"""Rows of a group, spread over all of it."""


def asked_heads(dataset: TaskDataset, source: Source) -> dict[str, str]:
    """The perception heads that single rows ask for, each with the place of such a row."""
    found: dict[str, str] = {}
    if type(dataset).asked_heads is not TaskDataset.asked_heads:
        for record in _some_rows(source):
            try:
                for head in dataset.asked_heads(record):
                    found.setdefault(head, record.where)
            except (SkipSample, *RECORD_ERRORS):
                continue  # rejected, and told, when its turn comes
    return found


def require_video_reader(dataset: TaskDataset, source: Source) -> None:
    """Stop over a group with video files where PyAV is missing; say that it is where videos are looked for and none is found.

    Raises:
        ValueError: naming the first row with such a file.
    """
    if not dataset.reads_videos or importlib.util.find_spec("av") is not None:
        return
    for record in _some_rows(source):
        try:
            name = dataset.video_file(record)
        except (SkipSample, *RECORD_ERRORS):
            continue
        if name:
            raise ValueError(
                f"{record.where}: the video file {name!r} needs PyAV, which is not installed: run `pip install "
                "av`, or write the videos as folders of frames"
            )
    logger.warning(
        "PyAV is not installed: the frames of %d rows with `frame_sampler_args` may come from folders, lists and animated "
        "pictures; a video file would stop the run (pip install av)",
        len(source),
    )


def _some_rows(source: Source) -> Iterator[Record]:
    count = min(LOOKED_AT, len(source))
    for number in range(count):
        try:
            yield source.read(len(source) * number // count)
        except SkipSample:
            continue
