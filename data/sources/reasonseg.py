"""ReasonSeg folders: `x.jpg` beside `x.json` with `text`, `is_sentence` and polygons in `shapes`."""

import logging
import os
from pathlib import Path

import numpy as np

from data.sources.building import Arrays, Tick
from data.sources.indexed import IndexedSource
from data.sources.record import Record, SkipSample, brief, parse_json, printable
from data.sources.storage import FileStamp, FolderFetch

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


def index_folder(path: str, tick: Tick) -> Arrays:
    """`names`: file names of JSON and picture by turns, each ended by "/". `end`: where each pair ends."""
    files = sorted(entry.name for entry in os.scandir(path) if entry.is_file())
    present = set(files)
    pairs = []
    for name in files:
        stem, extension = os.path.splitext(name)
        if extension == ".json":
            pictures = [f"{stem}.{e}" for e in IMAGE_EXTENSIONS if f"{stem}.{e}" in present]
            pairs.append((name, pictures[0] if pictures else f"{stem}.{IMAGE_EXTENSIONS[0]}"))
    alone = sum(name.lower().endswith(IMAGE_EXTENSIONS) for name in files) - len(
        {p for _, p in pairs} & present
    )
    if alone:
        logger.info("%s: %d pictures without a .json are left out", path, alone)
    texts = [os.fsencode(f"{a}/{b}/") for a, b in pairs]
    return {
        "names": np.frombuffer(b"".join(texts), np.uint8),
        "end": np.cumsum([len(text) for text in texts], dtype=np.int64),
        "count": np.array([len(pairs)]),
    }


class ReasonSegSource(IndexedSource):
    """A folder of pictures with their JSON: `{"image": "x.jpg", "text": [...], "is_sentence": true, "shapes": [...]}`.

    The fields are those of the file, unchecked; `image` is added. Files that are not UTF-8 are read as cp1252, as published.

    Args:
        path: the folder, on a local disk.
        cache_dir: where the index is kept.

    Raises:
        ValueError: if there is no such folder, or no JSON in it.
    """

    def __init__(self, path: str | Path, cache_dir: str | Path | None = None):
        folder = os.path.abspath(path)
        if not os.path.isdir(folder):
            raise ValueError(f"{path}: no such folder; check 'reasonseg_path' in dataset_info")
        super().__init__(index_folder, [folder], str(path), cache_dir)
        self._fetch = FolderFetch(folder)

    def read_in(self, file: FileStamp, arrays: Arrays, row: int) -> Record:
        end = arrays["end"]
        start = int(end[row - 1]) if row else 0
        name, picture, _ = os.fsdecode(arrays["names"][start : int(end[row])].tobytes()).split("/")
        where = printable(os.path.join(file.path, name))
        try:
            content = self._fetch(name)
        except OSError as e:
            message = f"{where}: cannot be read ({brief(e)}); restore it or remove its picture"
            raise SkipSample("missing_file", message, where) from e
        try:
            data = parse_json(_decoded(content))
        except ValueError as e:  # also UnicodeDecodeError
            message = f"{where}: not valid JSON ({brief(e)}); correct or remove the file"
            raise SkipSample("bad_json", message, where) from e
        if not isinstance(data, dict):
            message = f"{where}: expected a JSON object, found {type(data).__name__}"
            raise SkipSample("bad_json", message, where)
        return Record(data={**data, "image": picture}, where=where, fetch=self._fetch)


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252")
