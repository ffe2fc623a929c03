"""COCO JSON: one record per image with its annotations.

The file is one JSON document, so the index holds the records themselves, as JSON text that is mapped and not kept in memory.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from data.sources.building import Arrays, Tick
from data.sources.indexed import IndexedSource
from data.sources.jsonl import folder_of
from data.sources.record import Record, SkipSample, parse_json, printable
from data.sources.storage import FileStamp, FolderFetch, expand, open_stream

logger = logging.getLogger(__name__)


def index_images(path: str, tick: Tick) -> Arrays:
    """`rows`: JSON texts end to end, that of the categories first. `end`: where each of them ends."""
    content = _tables(path)
    annotations: dict[int | str, list[dict[str, Any]]] = {}
    faults: list[tuple[str, str]] = []
    for number, annotation in enumerate(content["annotations"]):
        if isinstance(annotation, dict) and isinstance(annotation.get("image_id"), (int, str)):
            annotations.setdefault(annotation["image_id"], []).append(annotation)
        else:
            faults.append((f"annotations[{number}]", "not an object with the 'image_id' of an image"))
    rows: list[dict[str, Any]] = [{"categories": content["categories"]}]
    known: set[int | str] = set()
    empty = 0
    for number, image in enumerate(content["images"]):
        if not isinstance(image, dict) or not isinstance(image.get("id"), (int, str)):
            faults.append((f"images[{number}]", "not an object with an 'id'"))
        elif image["id"] in known:
            faults.append((f"images[{number}]", f"the id {image['id']!r} is there twice"))
        else:
            known.add(image["id"])
            if image["id"] in annotations:
                rows.append({"image": image, "annotations": annotations[image["id"]]})
            else:
                empty += 1
    faults += [
        (f"annotations of image {image_id!r}", "there is no such image")
        for image_id in annotations
        if image_id not in known
    ]
    rows += [{"at": at, "fault": fault} for at, fault in faults]
    if empty:
        logger.info("%s: %d images without annotations are left out", path, empty)
    texts = [json.dumps(row).encode() for row in rows]
    return {
        "rows": np.frombuffer(b"".join(texts), np.uint8),
        "end": np.cumsum([len(text) for text in texts]),
        "count": np.array([len(rows) - 1]),
    }


def _tables(path: str) -> dict[str, Any]:
    with open_stream(path) as file:
        text = file.read()
    try:
        content = parse_json(text)
    except json.JSONDecodeError as e:
        raise ValueError(
            f"{path}:{e.lineno}: not valid JSON ({e.msg}, column {e.colno}); a COCO file is one JSON object"
        ) from e
    except ValueError as e:
        raise ValueError(f"{path}: not valid JSON ({e}); a COCO file is one JSON object") from e
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path}: no list '{key}' at the top level; is this a COCO file?")
    for number, row in enumerate(content["categories"]):
        if not isinstance(row, dict) or not isinstance(row.get("id"), (int, str)):
            raise ValueError(f"{path}: categories[{number}] has no 'id'; COCO needs one")
    return content


class CocoSource(IndexedSource):
    """A COCO JSON: one record per image that has annotations, `{"image", "annotations", "categories"}`.

    `categories` maps the id to the category. Images without annotations are left out: they teach nothing.

    Args:
        path: the JSON file.
        data_dir: what `file_name`s are relative to (default: the file's directory).
        cache_dir: where the index is kept.

    Raises:
        ValueError: if the file is missing, is not COCO JSON, or has no annotated image.
    """

    def __init__(
        self, path: str | Path, data_dir: str | Path | None = None, cache_dir: str | Path | None = None
    ):
        files = expand(path, "coco_path")
        super().__init__(index_images, files, str(path), cache_dir)
        self._fetch = FolderFetch(folder_of(files[0], data_dir))
        self._categories: dict[str, dict[Any, Any]] = {}

    def read_in(self, file: FileStamp, arrays: Arrays, row: int) -> Record:
        if file.path not in self._categories:
            self._categories[file.path] = {c["id"]: c for c in _row(arrays, 0)["categories"]}
        found = _row(arrays, row + 1)
        if "fault" in found:
            where = f"{file.path}#{found['at']}"
            raise SkipSample("bad_entry", f"{where}: {found['fault']}; correct or remove it", where)
        where = printable(f"{file.path}#image {found['image']['id']}")
        return Record(
            data={**found, "categories": dict(self._categories[file.path])}, where=where, fetch=self._fetch
        )


def _row(arrays: Arrays, number: int) -> dict[str, Any]:
    end = arrays["end"]
    start = int(end[number - 1]) if number else 0
    return json.loads(arrays["rows"][start : int(end[number])].tobytes())
