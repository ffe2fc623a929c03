"""Files and directories that are there whole or not at all: written aside, synced, renamed; hashed for manifests."""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, TextIO

CHUNK_BYTES = 1 << 22


def write_json(path: Path, value: Any, indent: int = 1) -> None:
    """Write JSON and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=indent)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, content: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    aside = path.with_suffix(f"{path.suffix}.{os.getpid()}.tmp")  # two processes may write the same file
    aside.write_text(content, encoding="utf-8", newline="")
    aside.replace(path)


def describe_file(path: Path) -> dict[str, Any]:
    """`{"bytes": size, "sha256": hash}` of a file, as manifests hold it."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def sync_directory(directory: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(draft: Path, target: Path) -> None:
    """Rename a complete directory to its place; what stood there goes, and comes back if that fails."""
    old = target.with_name(f"{target.name}.weft_old")  # a name that is nobody else's
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(draft, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def discard(path: Path) -> None:
    """Delete a directory. It is renamed first: killed in the middle, what is left must not look whole."""
    old = path.with_name(path.name + ".old")
    os.rename(path, old)
    shutil.rmtree(old)


def reopen_log(path: Path, last_step: int) -> TextIO:
    """Open a log of lines with a `step` for appending, after dropping what a killed run left.

    Args:
        path: the file; may not be there.
        last_step: lines beyond it will be written again, so they go, and so does a last line that is half-written.
    """
    if path.exists():
        draft = path.with_suffix(".tmp")
        with path.open(encoding="utf-8", errors="replace") as old, draft.open("w", encoding="utf-8") as new:
            new.writelines(line for line in old if _logged_step(line) <= last_step)
        os.replace(draft, path)
    return path.open("a", encoding="utf-8")


def _logged_step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
